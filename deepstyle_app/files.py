"""All that a run writes to the user's disk while it goes on, and what it makes up for of an earlier one."""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from deepstyle import Iteration, Losses, Stage
from deepstyle_support.disk import write_whole
from deepstyle_support.images import resize
from deepstyle_support.lbfgs import Curvature
from deepstyle_support.messages import UserError
from deepstyle_support.profiles import png_tags
from deepstyle_support.reading import read_picture

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
from .ownership import RunFiles, files_of, real
from .recipe import Recipe, read_text
from .report import MAX_PICTURES, Report, facts_of, read_report, report_of, says_it_goes_on, taken_over, thinned
from .state import Record, Saved, write_state

Size = tuple[int, int]  # (rows, columns)
Key = tuple[Size, int]  # an iteration: its size and its number


class Painted(NamedTuple):
    """A picture to be saved, and what its text says of it alone."""

    number: int  # of its iteration
    picture: np.ndarray  # (H, W, 3 or 4) uint8
    loss: float
    exact: bool  # whether its command makes it again
    coarse_size: Size | None = None


class Outputs:
    """The files of one run as they are written: pictures, state, log, events, animation and report.

    files: their names. stages: of the painting. shaped_by: all that decides its pictures, in words. before: what the
    run goes on from, if there is something; its picture is written at the end, if it is missing and none comes after
    it. notify: shows what else there is to say.
    """

    def __init__(
        self,
        files: RunFiles,
        stages: list[Stage],
        shaped_by: dict[str, str],
        before: Saved | None,
        notify: Callable[[str], None],
    ):
        self.files, self.stages, self.before, self.notify = files, stages, before, notify
        self.shaped_by = before.shaped_by if before else shaped_by
        self.full_size = stages[-1].size
        self.record = self._record_before() if before else Record()
        self._recipe: Recipe | None = None
        self._keeps_curvature = False
        self._events: Path | None = None  # the file of TensorBoard's that this run writes
        self._report: Report | None = None
        self._frames: list[np.ndarray] = []
        self._is_last_frame_partial = False
        self._unsaved: Callable[[], Painted] | None = self._missing_picture()
        self._latest: Saved | None = None
        self._made_up: list[Path] = []

    def _missing_picture(self) -> Callable[[], Painted] | None:
        """The picture of the state that is gone on from, if it is not there.

        At a coarse size that of full size may be an older one's, if the run was killed.
        """
        if not self.before:
            return None
        state = self.before.state
        coarse = state.size != self.full_size
        number = 0 if coarse else state.iteration + state.partial
        if coarse or (number and read_saved(self.files.picture_path(number)) is None):
            return lambda: Painted(number, self._picture_of_before(), state.losses[-1].total, exact=False)
        return None

    def _picture_of_before(self) -> np.ndarray:
        """The picture of the state that is gone on from, of full size."""
        assert self.before
        state = self.before.state
        return next(stage for stage in self.stages if stage.size == state.size).finished(state.x)

    def is_behind(self) -> bool:
        """Whether something of the run that ended with the state before, in full size, is not written, or not all."""
        assert self.before
        files, state = self.files, self.before.state
        return (
            self._unsaved is not None
            or (files.log is not None and not is_logged(files.log, self.record.rows))
            or (files.report is not None and not shows(files.report, self.before))
            or (files.animation is not None and not is_shown(files.animation, self.record, self.before))
            or (files.tensorboard is not None and bool(not self.record.rows or self._rows_without_events(state.size)))
        )

    def begin(self, recipe: Recipe, keeps_curvature: bool = False, exact: bool = True) -> None:
        """Open all that is written besides pictures and state; what it lacks of the iterations before is made.

        keeps_curvature: whether the optimiser's is written at the end; exact: whether the recipe makes the pictures
        again, also those that come. Raises UserError, status 1, if the disk does not take it.
        """
        self._recipe, self._keeps_curvature, files = recipe, keeps_curvature, self.files
        self._events = events_path(real(files.tensorboard)) if files.tensorboard else None
        before = self._paths_before()
        with self._advice():
            self._claim()
            if self.before:
                self._make_up_rows(self.before, before)
            if not (files.report or files.animation):
                return
            start = self.stages[-1].finished(self.stages[-1].start())
            if files.report:
                inputs = self.stages[-1].pictures.named()
                facts = facts_of(recipe, inputs, max(self.full_size), self.record.run)
                self._begin_report(files.report, facts, start, before, exact)
            if files.animation:
                self._begin_animation(start, before)

    def _record_before(self) -> Record:
        """What is known of the other files until now; an earlier version wrote the rows to the log alone."""
        assert self.before
        record = self.files.record()
        record.rows = record.rows or (read_log(self.files.log, self.before.state) if self.files.log else [])
        record.extras = record.extras or []
        return record

    def _claim(self) -> None:
        """Let the state say that what this run writes is its own, before it is there."""
        paths = (self.files.animation, self.files.log, self.files.report)
        others = [real(path) for path in paths if path]
        written = [*others, self._events] if self._events else others
        extras = self.record.extras or []
        self.record.extras = [*dict.fromkeys([*extras, *written])]
        if self.before and not {*others} <= {*extras}:
            self._write_state(self.before, self.before.state.curvature())

    def _make_up_rows(self, saved: Saved, before: dict[Key, Path]) -> None:
        """Write the rows that the log lacks, and what TensorBoard's events lack."""
        rows, files = self.record.rows, self.files
        if not rows and (files.log or files.tensorboard):
            self.notify("an earlier version wrote the state, which does not tell the losses before at each layer")
        if rows and files.log and not is_logged(files.log, rows):
            write_log(real(files.log), rows)
            self._made_up.append(files.log)
        events, missing = self._events, self._rows_without_events(self.full_size)
        if not (files.tensorboard and events and missing):
            return
        self._write_state(saved, saved.state.curvature())  # which says that the file is ours
        for row in missing:
            key = key_of(row)
            losses = {name: float(value) for name, value in list(row.items())[5:]}
            picture = read_saved(before[key]) if key in before else None
            write_events(events, key[0], key[0] != self.full_size, key[1], losses, picture)
        self._made_up.append(files.tensorboard)

    def _rows_without_events(self, full: Size) -> list[dict[str, str]]:
        """The rows whose losses are in none of the files that this run wrote for TensorBoard."""
        there, extras = files_of(self.files.tensorboard) if self.files.tensorboard else [], self.record.extras or []
        found = {one for path in there if real(path) in extras for one in iterations_in_events(path)}
        keys = ((row, *key_of(row)) for row in self.record.logged())
        return [row for row, size, number in keys if ("" if size == full else events_group(size), number) not in found]

    def _begin_report(
        self, path: Path, facts: dict[str, Any], start: np.ndarray, before: dict[Key, Path], exact: bool
    ) -> None:
        """Go on with the report that is there, or begin one; its `facts` stay the same."""
        # Of many iterations a report shows some, and the others are not missing.
        keys = thinned(list(before), MAX_PICTURES, [number for _, number in before])
        readers = {key: functools.partial(self._picture_before, key, before) for key in keys}
        taken = taken_over(path, readers, self.before.state, self.record.logged()) if self.before else ([], {})
        totals = {stage.size: stage.iterations for stage in self.stages}
        self._report = report_of(real(path), facts, totals, start, taken)
        shown = {(one.size, one.number) for one in self._report.shown}
        self._notify_missing("report", [before[key] for key in keys if key not in shown])
        if self.before:
            if not shows(path, self.before):
                self._made_up.append(path)
            self._report.write(exact and is_exact(before[list(before)[-1]]), goes_on=True)

    def _begin_animation(self, start: np.ndarray, before: dict[Key, Path]) -> None:
        """Take the pictures of the iterations before as its first frames."""
        earlier = {key: self._picture_before(key, before) for key in before}
        frames = [resize(picture, start.shape[:2], "bicubic") for picture in earlier.values() if picture is not None]
        self._frames = [start, *frames]
        self._is_last_frame_partial = self.before is not None and self.before.state.partial
        self._notify_missing("animation", [before[key] for key, picture in earlier.items() if picture is None])

    def _picture_before(self, key: Key, before: dict[Key, Path]) -> np.ndarray | None:
        """The picture that was saved of an iteration before; the last one can be made. None if it is not there."""
        picture = read_saved(before[key])
        return self._picture_of_before() if picture is None and key == list(before)[-1] else picture

    def _notify_missing(self, what: str, paths: list[Path]) -> None:
        more = f", nor can {len(paths) - 1} more" if len(paths) > 1 else ""
        if paths:
            self.notify(f"the {what} goes on without '{paths[0]}', which is not there or cannot be read{more}")

    def _paths_before(self) -> dict[Key, Path]:
        """Where the pictures of the iterations before are, if they were saved; the last may be of a part."""
        paths: dict[Key, Path] = {}
        if not self.before:
            return paths
        state = self.before.state
        # At a coarse size the optimiser may have ended before its time.
        reached = dict(map(key_of, self.record.logged()))
        for stage in self.stages:
            size, coarse = stage.size, None if stage.is_full else stage.size
            done = state.iteration + state.partial if size == state.size else reached.get(size, stage.iterations)
            paths |= {(size, number): self.files.picture_path(number, coarse) for number in range(1, done + 1)}
            if size == state.size:
                break
        return paths

    def add_evaluation(self, size: Size, evaluations: int, losses: Losses) -> None:
        """Keep an evaluation's losses for the report."""
        if self._report:
            self._report.note(size, evaluations, list(losses))

    def save(self, iteration: Iteration, is_last: bool, exact: bool, way: str) -> Path | None:
        """Write an iteration's picture, unless --every leaves it out, its state and its logs; returns the path.

        exact: whether the command makes the same picture again; way: as in Saved. Raises UserError, status 1, if the
        disk does not take it.
        """
        path, saved = None, Saved(iteration.state, self.shaped_by, way)
        # If the run ends at a coarse size, the picture so far is written as that before the first iteration.
        number, exact_in_full = (0, False) if iteration.is_coarse else (iteration.number, exact)
        picture = Painted(number, iteration.picture, iteration.loss, exact_in_full)
        self._unsaved = lambda: picture
        header, row = log_rows(iteration)
        if self.record.run or self.record.rows or self.files.log:  # of an earlier version's run some would be missing
            self.record.rows = [header, *self.record.rows[1:], row]
        with self._advice():
            # A part of an iteration may have been saved by its number: it is written over.
            there = not iteration.is_coarse and self.files.picture_path(iteration.number).exists()
            if is_last or there or iteration.number % self.files.every == 0:
                if iteration.is_coarse:
                    own = Painted(iteration.number, iteration.own_size, iteration.loss, exact, iteration.state.size)
                    path = self._write_picture(own)
                else:
                    path, self._unsaved = self._write_picture(picture), None
            self._write_state(saved)
            self._latest = saved
            if not iteration.is_coarse:
                self.files.picture_path(0).unlink(missing_ok=True)
            self._write_extras(iteration, exact)
        return path

    def _write_extras(self, iteration: Iteration, exact: bool) -> None:
        """Write what there is to be of an iteration besides its picture and its state, which says that it is ours."""
        size, number = iteration.state.size, iteration.number
        if self.files.animation:
            self._frames[len(self._frames) - self._is_last_frame_partial :] = [iteration.picture]
            self._is_last_frame_partial = iteration.state.partial
        if self.files.log:
            write_log(real(self.files.log), self.record.rows)
        if self._events:
            losses = {"loss": iteration.loss, **iteration.parts}
            write_events(self._events, size, iteration.is_coarse, number, losses, iteration.own_size)
        if self._report:
            self._report.add(iteration, exact)

    def finish(self) -> list[Path]:
        """Write what is still to be written at the end of a run; returns the paths, and of what was made up for.

        Whatever cannot be written, the report is to say that the run has ended.
        """
        try:
            paths = self._finish_files()
        except BaseException:
            with contextlib.suppress(UserError):  # what came first is what counts
                self._end_report()
            raise
        self._end_report()
        return paths

    def _end_report(self) -> None:
        with self._advice():
            if self._report:
                self._report.end()

    def _finish_files(self) -> list[Path]:
        """`finish`, but for the report."""
        paths = [] if self._latest else self._made_up
        if self._unsaved:
            with self._advice():
                paths.append(self._write_picture(self._unsaved()))
            self._unsaved = None
        if self._latest and self._keeps_curvature and (curvature := self._latest.state.curvature()):
            with self._advice():
                self._write_state(self._latest, curvature)
        saved, animation, is_new = self._latest or self.before, self.files.animation, self._latest is not None
        if animation and self._frames and saved and (is_new or not is_shown(animation, self.record, saved)):
            with self._advice():
                write_animation(real(animation), self._frames, about(self.record, saved))
            paths.append(animation)
        return paths

    @contextlib.contextmanager
    def _advice(self) -> Iterator[None]:
        """To what cannot be written is added what to do next."""
        try:
            yield
        except UserError as error:
            advice = "nothing was saved before; make room, and give the command again"
            if self._latest or self.before:
                advice = (
                    "what was saved before is whole; make room, and the same command with --resume goes on from there"
                )
            raise UserError(f"{error}; {advice}", error.status) from error

    def _write_state(self, saved: Saved, curvature: Curvature | None = None) -> None:
        write_state(self.files.state_path, real(self.files.base), saved, self.record, curvature)

    def _write_picture(self, painted: Painted) -> Path:
        """Save it as PNG, with what made it as its text. No metadata of the inputs goes in."""
        assert self._recipe
        size = painted.coarse_size
        text: dict[str, Any] = {"iteration": painted.number, "loss": painted.loss}
        text |= {"at": f"{size[0]} x {size[1]} pixels"} if size else {}
        text |= {name: value for name, value in self.shaped_by.items() if name.endswith("SHA-256")}
        tags = png_tags()
        tags.add_itxt("Software", f"deepstyle {self._recipe.version}")
        tags.add_itxt("deepstyle", json.dumps(text | self._recipe.as_text() | {"exact": painted.exact}))
        path = self.files.picture_path(painted.number, size)
        write_whole(path, lambda file: Image.fromarray(painted.picture).save(file, format="PNG", pnginfo=tags))
        return path


def read_saved(path: Path) -> np.ndarray | None:
    """A picture that a run saved, (H, W, C) uint8; None if it is not there, or damaged."""
    try:
        return read_picture(str(path), allow_large=True)[0]
    except UserError:
        return None


def is_exact(path: Path) -> bool:
    """Whether a saved picture says that its command makes it again."""
    try:
        return bool(read_text(str(path)).get("exact"))
    except UserError:
        return False


def key_of(row: dict[str, str]) -> Key:
    """Which iteration a log's row is of."""
    return (int(row["rows"]), int(row["columns"])), int(row["iteration"])


def is_logged(path: Path, rows: list[str]) -> bool:
    """Whether all rows are in the log."""
    there = path.read_text(errors="replace").splitlines() if path.exists() else []
    return bool(there) and {*latest_rows(rows)} <= {*there}


def shows(path: Path, saved: Saved) -> bool:
    """Whether a report shows the picture of this state, and says that no run goes on."""
    state = saved.state
    is_there = any((one.size, one.evaluations) == (state.size, state.evaluations) for one in read_report(path)[0])
    return is_there and not says_it_goes_on(path)


def about(record: Record, saved: Saved) -> str:
    """What stands in a run's animation: whose it is, and how far it goes."""
    state = saved.state
    return f"deepstyle {record.run}: {state.size[0]}x{state.size[1]}, {state.evaluations} evaluations"


def is_shown(path: Path, record: Record, saved: Saved) -> bool:
    """Whether the animation goes as far as this state. One by an earlier version does not say it."""
    return path.exists() and (not record.run or about(record, saved).encode() in path.read_bytes())
