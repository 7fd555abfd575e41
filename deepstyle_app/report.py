"""The report: a run, or a folder of photos, as one HTML file, which any browser opens without a server.

What it looks like is in page.html, and report.html and folder.html, which fill that in.
"""

import base64
import dataclasses
import datetime
import functools
import io
import json
import math
import os
import re
import secrets
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from deepstyle import Iteration, State
from deepstyle_support.disk import write_whole
from deepstyle_support.messages import UserError, as_typed, counted
from deepstyle_support.settings import Settings

from .recipe import Recipe, how_close

LOSSES = ("total", "content", "style", "total variation")  # in the order of a State's losses
SIDE = 1200  # pixels of a shown picture's longer side at most: the pictures in full are files of their own
THUMBNAIL = 480  # the same of styles and masks
MAX_PICTURES, MAX_POINTS = 40, 2000  # of more, every second is left out, then three of four, and so on
GOES_ON = '<span id="follows">'  # stands in the page of a run that goes on
INDEX = '<meta name="generator" content="deepstyle: a folder">'
Size = tuple[int, int]  # (rows, columns)
Points = dict[tuple[Size, int], list[float]]  # the loss and its three parts at each evaluation of a size


@dataclasses.dataclass(frozen=True)
class Shown:
    """What the slider comes to: a picture, and what is said of it."""

    size: Size
    number: int  # of the iteration at this size; 0: the start
    evaluations: int
    losses: list[float]  # as in a State; empty where they are not known
    improvement: float
    seconds: float  # 0 where it is not known
    partial: bool
    picture: str  # a WebP file in base64


@dataclasses.dataclass(frozen=True)
class News:
    """What the page of a run that goes on says of what is to come, in seconds; 0 where it is not known.

    Only such a page loads itself again (page.html): one that has ended has none, and no script that would.
    """

    left: float  # until the end
    due: float  # until the page is written anew, at most, as far as one can tell

    @property
    def left_in_words(self) -> str:
        minutes = round(self.left / 60)
        if minutes < 1:
            return "less than a minute left" if self.left else ""
        return f"about {counted(minutes, 'minute') if minutes < 100 else counted(round(minutes / 60), 'hour')} left"


@dataclasses.dataclass
class Report:
    """The file and what it shows: `note` tells it of an evaluation, `add` of an iteration, which writes it anew."""

    path: Path
    facts: dict[str, Any]  # what stays the same: from `facts_of`
    totals: dict[Size, int]  # how many iterations there are to be at each size
    shown: list[Shown]
    points: Points
    _exact: bool = False  # as it was last written
    _goes_on: bool = False  # whether it says so

    def note(self, size: Size, evaluations: int, losses: list[float]) -> None:
        """Keep the loss and its three parts for the plot."""
        self.points[size, evaluations] = losses

    def add(self, iteration: Iteration, exact: bool) -> None:
        """Show an iteration, `exact` as in `write`; only its own picture is encoded.

        Raises UserError, status 1, if the page cannot be written.
        """
        state, losses = iteration.state, list(iteration.losses)
        self.points[state.size, state.evaluations] = losses
        whole = [one for one in self.shown if not one.partial]  # the iteration that was stopped is this one
        shown = Shown(
            size=state.size,
            number=iteration.number,
            evaluations=state.evaluations,
            losses=losses,
            improvement=iteration.improvement,
            seconds=iteration.seconds,
            partial=state.partial,
            picture=encoded(iteration.own_size, SIDE),
        )
        self.shown = thinned([*whole, shown], MAX_PICTURES, [one.number for one in [*whole, shown]])
        kept = thinned(list(self.points), MAX_POINTS, [count for _, count in self.points])
        self.points = {key: self.points[key] for key in kept}
        is_last = (state.size, iteration.number) == list(self.totals.items())[-1]
        self.write(exact, goes_on=not (is_last or state.partial))  # a part is what a run ends with

    def write(self, exact: bool, goes_on: bool) -> None:
        """Write what there is to show. exact: whether the command makes the same pictures."""
        how = {
            "again": how_close(exact, self.facts["recipe"].device),
            "plot": plot(self.points),
            "saved": saved(self.shown, self.points),
            "news": news_of(self.shown, self.totals) if goes_on else None,
        }
        write_page(self.path, "report.html", **self.facts, **how, shown=self.shown, totals=self.totals)
        self._exact, self._goes_on = exact, goes_on

    def end(self) -> None:
        """The run ends here, wherever that is: its page says so, if it does not yet."""
        if self._goes_on:
            self.write(self._exact, goes_on=False)


def news_of(shown: list[Shown], totals: dict[Size, int]) -> News:
    """What is to come after the last that is shown, judged by the latest iterations at its size and by the pixels."""
    latest = shown[-1]
    seconds = [one.seconds for one in shown if one.size == latest.size and one.seconds and not one.partial][-5:]
    if not seconds:
        return News(0.0, 0.0)
    sizes = list(totals)[list(totals).index(latest.size) :]
    left = {size: totals[size] * math.prod(size) / math.prod(latest.size) for size in sizes}
    left[latest.size] -= latest.number - latest.partial
    following = sizes[0] if left[sizes[0]] > 0 or len(sizes) == 1 else sizes[1]
    by_pixels = math.prod(following) / math.prod(latest.size)
    return News(statistics.median(seconds) * sum(left.values()), max(seconds) * by_pixels)


def facts_of(recipe: Recipe, inputs: dict[str, np.ndarray], side: int, run: str = "") -> dict[str, Any]:
    """What a report says of the whole run, as plain data.

    inputs: the pictures by their names in words, side: the longer one of the generated picture, which the content is
    shown in, run: by what the report is known as its own.
    """
    painted = [name for name in inputs if "mask" not in name and name != "start"]
    files = dict(zip(painted, recipe.pictures, strict=True))
    sides = {name: min(SIDE, side) if name == "content" else THUMBNAIL for name in inputs}
    defaults = dataclasses.asdict(Settings())
    return {
        "recipe": recipe,
        "run": run,
        "title": title_of(*recipe.pictures),
        "inputs": {name: (files.get(name, ""), encoded(picture, sides[name])) for name, picture in inputs.items()},
        "settings": {name: (as_typed(value), as_typed(defaults[name])) for name, value in recipe.settings.items()},
        "command": recipe.command(defaults),
    }


def report_of(
    path: Path, facts: dict[str, Any], totals: dict[Size, int], start: np.ndarray, earlier: tuple[list[Shown], Points]
) -> Report:
    """A report that goes on from what is `taken_over`, or that begins with the start, (H, W, 3) uint8."""
    shown, points = earlier
    if not any(one.number == 0 for one in shown):
        shown = [Shown(next(iter(totals)), 0, 0, [], 0.0, 0.0, False, encoded(start, SIDE)), *shown]
    return Report(path, facts, totals, shown, points)


def title_of(content: str, *styles: str) -> str:
    """What a page of these files is called."""
    painted = Path(content).stem or Path(content).resolve().name  # a folder may be named by a dot
    return f"{painted} in the style of {' and '.join(Path(style).stem for style in styles)}"


def taken_over(
    path: Path,
    before: Mapping[tuple[Size, int], Callable[[], np.ndarray | None]],
    state: State,
    logged: list[dict[str, str]],
) -> tuple[list[Shown], Points]:
    """What a report has to show of the iterations up to `state`: what it showed, and from disk what it did not.

    before: these iterations, with what reads the picture of each, if it can; the last may be a part of one. logged: a
    log's rows of them. `--every` leaves some out, so the report itself knows more; it may be missing, damaged, or one
    iteration behind, if the run was killed.
    """
    there, points = read_report(path)
    own = state.size, state.iteration + 1  # in part
    shown = {
        (one.size, one.number): one
        for one in there
        if not one.partial or ((one.size, one.number) == own and one.evaluations == state.evaluations)
    }
    rows = {((int(row["rows"]), int(row["columns"])), int(row["iteration"])): row for row in logged}
    found: list[Shown] = [one for one in there if one.number == 0]
    for key, read in before.items():
        if key in shown:
            found.append(shown[key])
        elif (picture := read()) is not None:
            size, number = key
            facts = facts_about(size, number, state, rows)
            found.append(Shown(size, number, *facts, state.partial and key == own, encoded(picture, SIDE)))
    numbers = {(state.size, number) for number in range(1, len(state.losses))}
    every = {key: facts_about(*key, state, rows) for key in sorted(numbers | {*rows})}
    ends = {(size, evaluations): losses for (size, _), (evaluations, losses, _, _) in every.items()}
    return found, points_before(points, ends | {(state.size, 1): list(state.losses[0])}, state)


def facts_about(
    size: Size, number: int, state: State, rows: dict[tuple[Size, int], dict[str, str]]
) -> tuple[int, list[float], float, float]:
    """The evaluations, losses, improvement and seconds of an iteration up to `state`, as far as they are known."""

    def losses_of(number: int) -> list[float]:
        if size == state.size and number < len(state.losses):
            return list(state.losses[number])
        parts = list(rows.get((size, number), {}).items())[6:]
        kinds = [sum(float(loss) for name, loss in parts if name.startswith(kind)) for kind in LOSSES[1:]]
        return [float(rows[size, number]["loss"]), *kinds] if parts else []

    row, losses, earlier = rows.get((size, number), {}), losses_of(number), losses_of(number - 1)
    evaluations = state.evaluations if size == state.size and number > state.iteration else 20 * number
    improvement = 100 * (earlier[0] - losses[0]) / earlier[0] if losses and earlier and earlier[0] else 0.0
    return int(row.get("evaluations", evaluations)), losses, improvement, float(row.get("seconds", 0))


def points_before(points: Points, ends: Points, state: State) -> Points:
    """The plot's points up to `state`, each size's in order; behind those that there are come `ends` of iterations."""
    sizes = {size for size, _ in ends}
    kept = {
        (size, count): losses
        for (size, count), losses in points.items()
        if size in sizes and (size != state.size or count <= state.evaluations)
    }
    last = {size: max((count for at, count in kept if at == size), default=0) for size in sizes}
    more = {(size, count): losses for (size, count), losses in ends.items() if losses and count > last[size]}
    return dict(sorted((kept | more).items()))


def saved(shown: list[Shown], points: Points) -> dict[str, Any]:
    """What `read_report` finds beside the pictures."""
    without = [dataclasses.asdict(one) | {"picture": ""} for one in shown]
    return {"shown": without, "points": [[*size, count, *losses] for (size, count), losses in points.items()]}


def read_report(path: Path) -> tuple[list[Shown], Points]:
    """What a report shows; nothing if it is missing or damaged."""
    try:
        page = path.read_text("utf-8", "surrogateescape")
        data = json.loads(page.split('<script type="application/json" id="saved">')[1].split("</script>")[0])
        pictures = re.findall('class="iteration".*?src="data:image/webp;base64,(.*?)"', page, re.DOTALL)
        shown = [
            Shown(**one | {"size": tuple(one["size"]), "picture": picture})
            for one, picture in zip(data["shown"], pictures, strict=True)
        ]
        return shown, {((rows, columns), count): losses for rows, columns, count, *losses in data["points"]}
    except (OSError, LookupError, TypeError, ValueError):
        return [], {}


def says_it_goes_on(path: Path) -> bool:
    """Whether a page is that of a run that goes on; if none does, it was killed."""
    return path.exists() and GOES_ON in path.read_text("utf-8", "replace")


def encoded(picture: np.ndarray, side: int) -> str:
    """picture: (H, W, C) uint8 -> a WebP file in base64, its longer side of so many pixels at most."""
    image, file = Image.fromarray(picture), io.BytesIO()
    image.thumbnail((side, side))
    image.save(file, format="WebP", quality=90, method=2)
    return base64.b64encode(file.getvalue()).decode()


def report_bytes(size: Size, pictures: int) -> int:
    """Bytes that a report of so many pictures of (rows, columns) holds; 0 pictures: there is none."""
    shrunk = min(1.0, SIDE / max(size)) ** 2
    # A pixel of a painting takes up to 2 bytes in base64; the page holds them once, and once more when it is written.
    return int(2 * 2 * min(pictures, MAX_PICTURES + 2) * shrunk * math.prod(size))


def thinned(items: list, most: int, numbers: list[int]) -> list:
    """At most about so many of the items, evenly spaced by their numbers, and the last one."""
    step = 1
    while max(numbers, default=0) // step > most:
        step *= 2
    return [one for one, number in zip(items, numbers, strict=True) if number % step == 0 or one is items[-1]]


def plot(points: Points) -> dict[str, Any]:
    """The losses over the evaluations of all sizes, as what report.html draws; places are percent of the plot.

    The losses are on a logarithmic scale of whole decades, eight at most; what is below them, as 0 is, has no place.
    """
    sizes = list(dict.fromkeys(size for size, _ in points))
    starts, end = {}, 0
    for size in sizes:
        starts[size] = end
        end += max(count for at, count in points if at == size)
    positive = [loss for losses in points.values() for loss in losses if loss > 0] or [1.0]
    top = math.floor(math.log10(max(positive))) + 1
    bottom = max(math.floor(math.log10(min(positive))), top - 8)

    def across(evaluation: float) -> float:
        return round(100 * evaluation / end, 2)

    def down(loss: float) -> float:
        return round(100 * (top - math.log10(loss)) / (top - bottom), 2)

    curves: dict[str, list[str]] = {}
    for number, name in enumerate(LOSSES):
        for size in sizes:
            own = [(count, losses[number]) for (at, count), losses in points.items() if at == size]
            line = " ".join(
                f"{across(starts[size] + count)},{down(loss)}" for count, loss in own if loss >= 10.0**bottom
            )
            curves.setdefault(name, []).append(line)
    step = next(step for step in (n * 10**e for e in range(9) for n in (1, 2, 5)) if end / step <= 6)
    return {
        "curves": {name: lines for name, lines in curves.items() if any(lines)},
        "decades": [(power, down(10.0**power)) for power in range(bottom, top + 1)],
        "evaluations": [(count, across(count)) for count in range(0, end + 1, step)],
        "sizes": [(size, across(starts[size])) for size in sizes],
        "starts": {size: across(start) for size, start in starts.items()},
        "end": end,
    }


@dataclasses.dataclass(frozen=True)
class Card:
    """A picture on the page of many."""

    names: list[str]  # its photo's, its style's, or both
    said: str  # how its run ended
    picture: str = ""  # its last, a WebP file in base64; empty if there is none
    link: str = ""  # its own report, from where the page is; empty if there is none


def write_index(
    path: Path, title: str, cards: dict[tuple[str, ...], Card | None], so_far: str, news: News | None
) -> None:
    """Write the page of many pictures, of which some are not made yet. so_far: how many are, in words.

    cards: by the names; where these are pairs, the page is a sheet, photos down and styles across. Raises UserError,
    status 1, if it cannot be written.
    """
    made = [card for card in cards.values() if card]
    is_sheet = all(len(names) == 2 for names in cards)
    photos, styles = (list(dict.fromkeys(names[n] for names in cards)) if is_sheet else [] for n in (0, 1))
    rows = [(photo, [cards[photo, style] for style in styles]) for photo in photos]
    write_page(path, "folder.html", title=title, cards=made, styles=styles, rows=rows, so_far=so_far, news=news)


def check_index(path: Path) -> None:
    """Raise UserError if something is there that is no page of a folder, or cannot be read."""
    if path.exists() and not (os.access(path, os.R_OK) and INDEX in path.read_text("utf-8", "replace")):
        raise UserError(f"'{path}' is there, and no page of a folder's photos; move it, or choose another name")


@functools.cache
def template(name: str) -> jinja2.Template:
    """A page's template; what is put into it is escaped."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    options: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    return jinja2.Environment(loader=loader, autoescape=True, **options).get_template(name)


def write_page(path: Path, name: str, **data: Any) -> None:
    """Write the page that a template makes of plain data, whole or not at all.

    Only what has the page's nonce is run or styles it, and nothing is fetched (Content Security Policy Level 3). A
    file's name may have bytes that are no text: they stay as they are.
    """
    now = datetime.datetime.now().astimezone()
    page = template(name).stream(**data, nonce=secrets.token_urlsafe(12), now=now)
    page.enable_buffering(100)
    write_whole(path, lambda file: page.dump(file, "utf-8", "surrogateescape"))
