"""All that a run writes to the user's disk while it goes on, and what it makes up for of an earlier one."""

import contextlib
import dataclasses
import functools
import json
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deepstyle_support.disk import write_whole
from deepstyle_support.lbfgs import Curvature
from deepstyle_support.messages import UserError, tell
from .outputs import (
    events_group,
    events_path,
    iterations_in_events,
    latest_rows,
    log_rows,
    read_log,
    write_animation,
    write_events,
    write_log,
)
from .ownership import RunFiles, base_path, files_of, real
from deepstyle_support.pictures import resize
from deepstyle_support.profiles import png_tags
from .provenance import read_made
from deepstyle_support.reading import read_picture
from deepstyle import Iteration, State
from .report import MOST_PICTURES, Report, facts_of, read_report, report_of, taken_over, thinned
from .state import Record, write_state

Size = tuple[int, int]  # (rows, columns)
Key = tuple[Size, int]  # an iteration: its size and its number


@dataclasses.dataclass
class Outputs(RunFiles):
    """The files of one run as they are written: pictures, state, log, events, animation and report."""

    made: dict[str, Any] = dataclasses.field(default_factory=dict)  # how the pictures are made, for their text
    note: Callable[[str], None] = tell  # what else there is to say

    def __post_init__(self) -> None:
        self._record = Record()
        self._events: Path | None = None  # the file of TensorBoard's that this run writes
        self._report: Report | None = None
        self._frames: list[np.ndarray] = []
        self._in_part = False  # whether the last frame is of a part of an iteration
        self._unsaved: Callable[[], Path] | None = None  # writes the latest picture, if that is not written yet
        self._before: tuple[State, Callable[[], np.ndarray]] | None = None  # what is gone on from, and its picture
        self._latest: State | None = None
        self._made_up: list[Path] = []

    def expect(self, state: State, coarse: bool, picture: Callable[[], np.ndarray]) -> None:
        """Write the picture of the state that is gone on from at the end, if it is missing and none comes after it.

        coarse: whether the state is of a size before the picture's own, so that the picture may be an older one's, if
        the run was killed; picture: makes it, of the size of the last.
        """
        self._before = state, picture
        number = 0 if coarse else state.iteration + state.partial
        if coarse or (number and read_saved(self.picture_path(number)) is None):
            loss = float(state.losses[-1][0])
            self._unsaved = lambda: self._write_picture(number, picture(), loss, state.shaped_by, exact=False)

    def is_behind(self, state: State) -> bool:
        """Whether something of a run that ended with this state, in full size, is not written, or not all of it."""
        record = self._record_of(state)
        return (
            self._unsaved is not None
            or (self.log is not None and not is_logged(self.log, record.rows))
            or (self.report is not None and not shows(self.report, state))
            or (self.animation is not None and not is_shown(self.animation, record, state))
            or (self.tensorboard is not None and bool(not record.rows or self._rows_without_events(record, state.size)))
        )

    def begin(
        self,
        start: Callable[[], np.ndarray],
        totals: dict[Size, int],
        state: State | None,
        inputs: dict[str, np.ndarray],
        defaults: dict[str, Any],
    ) -> None:
        """Open all that is written besides pictures and state; what it lacks of the iterations up to `state` is made.

        An animation and a report begin with start(), (H, W, 3) uint8. totals: how many iterations there are to be at
        each size, (rows, columns), the last being the picture's own. inputs: the pictures that are read, by their
        names in words; defaults: of the settings; both for the report. Raises UserError, status 1, if the disk does
        not take it.
        """
        full = list(totals)[-1]
        self._record = self._record_of(state) if state else Record()
        self._events = events_path(real(self.tensorboard)) if self.tensorboard else None
        before = self._paths_before(totals, state) if state else {}
        with advice_to_resume():
            self._claim(state)
            if state:
                self._make_up_rows(state, full, before)
            if self.report:
                facts = facts_of(self.made, defaults, inputs, max(full), self._record.run)
                self._begin_report(self.report, facts, totals, start(), state, before)
            if self.animation:
                self._begin_animation(start(), state, before)

    def _record_of(self, state: State) -> Record:
        """What is known of the other files up to `state`; an earlier version wrote the rows to the log alone."""
        record = self.record()
        rows = record.rows or (read_log(self.log, state) if self.log else [])
        return dataclasses.replace(record, extras=record.extras or [], rows=rows)

    def _claim(self, state: State | None) -> None:
        """Let the state say that what this run writes is its own, before it is there."""
        others = [real(path) for path in (self.animation, self.log, self.report) if path]
        written = [*others, self._events] if self._events else others
        before = self._record.extras or []
        self._record.extras = [*dict.fromkeys([*before, *written])]
        if state and not {*others} <= {*before}:
            self._write_state(state, state.learnt())

    def _make_up_rows(self, state: State, full: Size, before: dict[Key, Path]) -> None:
        """Write the rows that the log lacks, and what TensorBoard's events lack."""
        rows = self._record.rows
        if not rows and (self.log or self.tensorboard):
            self.note("an earlier version wrote the state, which does not tell the losses before at each layer")
        if rows and self.log and not is_logged(self.log, rows):
            write_log(real(self.log), rows)
            self._made_up.append(self.log)
        events, missing = self._events, self._rows_without_events(self._record, full)
        if not (self.tensorboard and events and missing):
            return
        self._write_state(state, state.learnt())  # which says that the file is ours
        for row in missing:
            key = key_of(row)
            losses = {name: float(value) for name, value in list(row.items())[5:]}
            picture = read_saved(before[key]) if key in before else None
            write_events(events, key[0], key[0] != full, key[1], losses, picture)
        self._made_up.append(self.tensorboard)

    def _rows_without_events(self, record: Record, full: Size) -> list[dict[str, str]]:
        """The rows whose losses are in none of the files that this run wrote for TensorBoard."""
        there = files_of(self.tensorboard) if self.tensorboard else []
        found = {one for path in there if real(path) in (record.extras or []) for one in iterations_in_events(path)}
        keys = ((row, *key_of(row)) for row in record.logged())
        return [row for row, size, number in keys if ("" if size == full else events_group(size), number) not in found]

    def _begin_report(
        self,
        path: Path,
        facts: dict[str, Any],
        totals: dict[Size, int],
        start: np.ndarray,
        state: State | None,
        before: dict[Key, Path],
    ) -> None:
        """Go on with the report that is there, or begin one; its `facts` stay the same."""
        # Of many iterations a report shows some, and the others are not missing.
        keys = thinned(list(before), MOST_PICTURES, [number for _, number in before])
        readers = {key: functools.partial(self._picture_before, key, before) for key in keys}
        taken = taken_over(path, readers, state, self._record.logged()) if state else ([], {})
        self._report = report_of(real(path), facts, totals, start, taken)
        shown = {(one.size, one.number) for one in self._report.shown}
        self._tell_missing("report", [before[key] for key in keys if key not in shown])
        if state and not shows(path, state):
            self._report.write(is_exact(before[list(before)[-1]]))
            self._made_up.append(path)

    def _begin_animation(self, start: np.ndarray, state: State | None, before: dict[Key, Path]) -> None:
        """Take the pictures of the iterations before as its first frames."""
        earlier = {key: self._picture_before(key, before) for key in before}
        frames = [resize(picture, start.shape[:2], "bicubic") for picture in earlier.values() if picture is not None]
        self._frames, self._in_part = [start, *frames], state is not None and state.partial
        self._tell_missing("animation", [before[key] for key, picture in earlier.items() if picture is None])

    def _picture_before(self, key: Key, before: dict[Key, Path]) -> np.ndarray | None:
        """The picture that was saved of an iteration before; the last one can be made. None if it is not there."""
        picture = read_saved(before[key])
        if picture is None and self._before and key == list(before)[-1]:
            return self._before[1]()
        return picture

    def _tell_missing(self, what: str, paths: list[Path]) -> None:
        more = f", nor can {len(paths) - 1} more" if len(paths) > 1 else ""
        if paths:
            self.note(f"the {what} goes on without '{paths[0]}', which is not there or cannot be read{more}")

    def _paths_before(self, totals: dict[Size, int], state: State) -> dict[Key, Path]:
        """Where the pictures of the iterations up to `state` are, if they were saved; the last may be of a part."""
        paths: dict[Key, Path] = {}
        # At a coarse size the optimiser may have ended before its time.
        reached = dict(map(key_of, self._record.logged()))
        for size, total in totals.items():
            coarse = None if size == list(totals)[-1] else size
            done = state.iteration + state.partial if size == state.size else reached.get(size, total)
            paths |= {(size, number): self.picture_path(number, coarse) for number in range(1, done + 1)}
            if size == state.size:
                break
        return paths

    def add_evaluation(self, size: Size, evaluations: int, losses: list[float]) -> None:
        """Keep an evaluation's loss and its three parts for the report."""
        if self._report:
            self._report.note(size, evaluations, losses)

    def save(self, iteration: Iteration, last: bool) -> Path | None:
        """Write an iteration's picture, unless --every leaves it out, its state and its logs; returns the path.

        Raises UserError, status 1, if the disk does not take it.
        """
        state, path = iteration.state, None
        # If the run ends at a coarse size, the picture so far is written as that before the first iteration.
        number, exact = (0, False) if iteration.coarse else (iteration.number, iteration.exact)
        shown = number, iteration.picture, iteration.loss, state.shaped_by, exact
        self._unsaved = lambda: self._write_picture(*shown)
        header, row = log_rows(iteration)
        if self._record.run or self._record.rows or self.log:  # of an earlier version's run some would be missing
            self._record.rows = [header, *self._record.rows[1:], row]
        with advice_to_resume():
            # A part of an iteration may have been saved by its number: it is written over.
            there = not iteration.coarse and self.picture_path(iteration.number).exists()
            if last or there or iteration.number % self.every == 0:
                if iteration.coarse:
                    own = iteration.number, iteration.own_size, iteration.loss, state.shaped_by, iteration.exact
                    path = self._write_picture(*own, coarse_size=state.size)
                else:
                    path, self._unsaved = self._unsaved(), None
            self._write_state(state)
            self._latest = state
            if not iteration.coarse:
                self.picture_path(0).unlink(missing_ok=True)
            self._write_extras(iteration)
        return path

    def _write_extras(self, iteration: Iteration) -> None:
        """Write what there is to be of an iteration besides its picture and its state, which says that it is ours."""
        size, number = iteration.state.size, iteration.number
        if self.animation:
            self._frames[len(self._frames) - self._in_part :] = [iteration.picture]
            self._in_part = iteration.state.partial
        if self.log:
            write_log(real(self.log), self._record.rows)
        if self._events:
            losses = {"loss": iteration.loss, **iteration.parts}
            write_events(self._events, size, iteration.coarse, number, losses, iteration.own_size)
        if self._report:
            self._report.add(iteration)

    def finish(self) -> list[Path]:
        """Write what is still to be written at the end of a run; returns the paths, and of what was made up for."""
        paths = [] if self._latest else self._made_up
        if self._unsaved:
            with advice_to_resume():
                paths.append(self._unsaved())
            self._unsaved = None
        if self.keeps and self._latest and (learnt := self._latest.learnt()):
            with advice_to_resume():
                self._write_state(self._latest, learnt)
        state = self._latest or (self._before[0] if self._before else None)
        is_new = self._latest is not None
        if self.animation and self._frames and state and (is_new or not is_shown(self.animation, self._record, state)):
            with advice_to_resume():
                write_animation(real(self.animation), self._frames, about(self._record, state))
            paths.append(self.animation)
        return paths

    def _write_state(self, state: State, learnt: Curvature | None = None) -> None:
        write_state(self.state_path, real(self.base), state, self._record, learnt)

    def _write_picture(
        self,
        number: int,
        picture: np.ndarray,
        loss: float,
        shaped_by: dict[str, str],
        exact: bool,
        coarse_size: tuple[int, int] | None = None,
    ) -> Path:
        """Save it as PNG, with what made it as its text. No metadata of the inputs goes in."""
        made: dict[str, Any] = {"iteration": number, "loss": loss}
        made |= {"at": f"{coarse_size[0]} x {coarse_size[1]} pixels"} if coarse_size else {}
        made |= {name: value for name, value in shaped_by.items() if name.endswith("SHA-256")}
        text = png_tags()
        text.add_itxt("Software", f"deepstyle {self.made.get('version', '')}")
        text.add_itxt("deepstyle", json.dumps(made | self.made | {"exact": exact}))
        path = self.picture_path(number, coarse_size)
        write_whole(path, lambda file: Image.fromarray(picture).save(file, format="PNG", pnginfo=text))
        return path


def outputs_of(arguments: Namespace) -> Outputs:
    """What the command is to write. Raises UserError if PREFIX cannot be the beginning of a file's name."""
    extras: dict[str, Any] = {
        name: Path(path) for name in ("animation", "log", "tensorboard", "report") if (path := getattr(arguments, name))
    }
    extras |= {"note": lambda note: None} if arguments.quiet else {}
    return Outputs(base_path(arguments.prefix), arguments.every, **extras)


def read_saved(path: Path) -> np.ndarray | None:
    """A picture that a run saved, (H, W, C) uint8; None if it is not there, or damaged."""
    try:
        return read_picture(str(path), allow_large=True)[0]
    except UserError:
        return None


def is_exact(path: Path) -> bool:
    """Whether a saved picture says that its command makes it again."""
    try:
        return bool(read_made(str(path)).get("exact"))
    except UserError:
        return False


def key_of(row: dict[str, str]) -> Key:
    """Which iteration a log's row is of."""
    return (int(row["rows"]), int(row["columns"])), int(row["iteration"])


def is_logged(path: Path, rows: list[str]) -> bool:
    """Whether all rows are in the log."""
    there = path.read_text(errors="replace").splitlines() if path.exists() else []
    return bool(there) and {*latest_rows(rows)} <= {*there}


def shows(path: Path, state: State) -> bool:
    """Whether a report shows the picture of this state."""
    return any((one.size, one.evaluations) == (state.size, state.evaluations) for one in read_report(path)[0])


def about(record: Record, state: State) -> str:
    """What stands in a run's animation: whose it is, and how far it goes."""
    return f"deepstyle {record.run}: {state.size[0]}x{state.size[1]}, {state.evaluations} evaluations"


def is_shown(path: Path, record: Record, state: State) -> bool:
    """Whether the animation goes as far as this state. One by an earlier version does not say it."""
    return path.exists() and (not record.run or about(record, state).encode() in path.read_bytes())


@contextlib.contextmanager
def advice_to_resume() -> Iterator[None]:
    """What cannot be written is told with what to do next."""
    try:
        yield
    except UserError as error:
        advice = "what was saved before is whole; make room, and the same command with --resume goes on from there"
        raise UserError(f"{error}; {advice}", error.status) from error
