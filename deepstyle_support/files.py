"""All that a run writes to the user's disk: one object owns it, from the first check to the last picture."""

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image

from .disk import write_whole
from .lbfgs import Curvature, from_arrays, to_arrays
from .messages import UserError
from .outputs import Log, csv_log, events_path, tensorboard_log, write_animation
from .pictures import resize
from .profiles import png_tags
from .reading import read_picture
from .records import Iteration, State
from .report import Report, facts_of, report_of, taken_over


def base_path(prefix: str) -> Path:
    """The path that all of a run's files begin with; a folder means <folder>/result_image.

    Raises UserError if it is empty, or too long for a file's name.
    """
    base = Path(prefix, "result_image") if prefix.endswith(("/", os.sep)) or os.path.isdir(prefix) else Path(prefix)
    if not 0 < len(os.fsencode(base.name)) <= 200:  # most systems allow 255, and something comes behind it
        raise UserError(f"PREFIX is '{prefix}'; the name that files begin with must have 1 to 200 bytes")
    return base


@dataclasses.dataclass
class Outputs:
    """The files of one run: pictures, state, logs, animation and report, and what an earlier run left of them.

    `check` says what is wrong with them before anything is touched; within `owned` no other run can write them.
    """

    base: Path  # from base_path
    every: int = 1  # only each Nth picture is saved, and the last
    animation: Path | None = None
    log: Path | None = None
    tensorboard: Path | None = None
    report: Path | None = None
    made: dict[str, Any] = dataclasses.field(default_factory=dict)  # how the pictures are made, for their text
    keeps: int = 0  # bytes of what the optimiser has learnt that are written at the end

    def __post_init__(self) -> None:
        self._logs: list[Log] = []
        self._report: Report | None = None
        self._frames: list[np.ndarray] = []
        self._unsaved: Callable[[], Path] | None = None  # writes the latest picture, if that is not written yet
        self._latest: State | None = None
        self._written: list[Path] = []  # beside pictures and state, by this run and those that it goes on from

    @property
    def extras(self) -> list[Path]:
        """What is written besides the pictures and the state."""
        return [path for path in (self.animation, self.log, self.tensorboard, self.report) if path]

    @property
    def state_path(self) -> Path:
        return self.base.with_name(f"{self.base.name}_state.npz")

    def picture_path(self, number: int, coarse_size: tuple[int, int] | None = None) -> Path:
        at = f"{coarse_size[0]}x{coarse_size[1]}_" if coarse_size else ""
        return self.base.with_name(f"{self.base.name}_at_{at}iteration_{number}.png")

    def latest_picture(self, number: int) -> Path | None:
        """The picture of the last iteration, if it is there."""
        path = self.picture_path(number)
        return path if path.exists() else None

    def owns(self, path: Path) -> bool:
        """Whether path is, by its name, a picture or the state of a run with this base."""
        pattern = re.escape(self.base.name) + r"(_at_(\d+x\d+_)?iteration_\d+\.png|_state\.npz)"
        return bool(re.fullmatch(pattern, path.name)) and path.parent.resolve() == self.base.parent.resolve()

    # Before the run

    def check(self, inputs: list[str], size: tuple[int, int]) -> None:
        """Raise UserError if this cannot be written, or if an input would be written over. Creates nothing.

        size: (rows, columns) of the saved pictures.
        """
        if self.every < 1:
            raise UserError(f"--every is {self.every}; it must be 1 or more")
        self._check_extras()
        extras, before = [extra.resolve() for extra in self.extras], self._extras_before()
        for given in inputs:
            if self.owns(Path(given).resolve()):
                raise UserError(f"'{given}' is an input, and a run with this PREFIX would write there; choose another")
            if Path(given).resolve() in extras:
                raise UserError(f"'{given}' is an input, and would be written over; choose another name")
            if Path(given).resolve() in before:
                raise UserError(f"'{given}' is an input, and an earlier run wrote it; choose another PREFIX")
        for path in (*self.extras, self.base):
            folder = path.parent.resolve()
            while not os.path.lexists(folder):
                folder = folder.parent
            if not folder.is_dir():
                raise UserError(f"cannot make the folder '{path.parent}': '{folder}' is a file")
            if not os.access(folder, os.W_OK | os.X_OK):
                raise UserError(f"cannot write in the folder '{folder}': no permission")
        # The state's float picture, and one saved picture that hardly compresses, maybe with alpha.
        needed, free = size[0] * size[1] * (3 * 4 + 4) + self.keeps, shutil.disk_usage(folder).free
        if free < needed:
            raise UserError(f"the disk of '{folder}' has {free} bytes free, and one iteration needs {needed}")

    def _check_extras(self) -> None:
        """Raise UserError if what is written besides the pictures cannot be had by these names."""
        for flag, path, kinds in (
            ("--animation", self.animation, (".gif", ".webp", ".mp4")),
            ("--log", self.log, (".csv",)),
            ("--report", self.report, (".html",)),
        ):
            if path and (path.suffix not in kinds or path.is_dir() or len(os.fsencode(path.name)) > 200):
                raise UserError(
                    f"{flag} is '{path}'; it must be a file whose name ends in {' or '.join(kinds)}, of up to 200 bytes"
                )
        if self.tensorboard and self.tensorboard.is_file():
            raise UserError(f"--tensorboard is '{self.tensorboard}', which is a file; it must be a folder")
        needs = [("imageio_ffmpeg", "imageio-ffmpeg")] if self.animation and self.animation.suffix == ".mp4" else []
        needs += [("tensorboard", "tensorboard")] if self.tensorboard else []
        for module, package in needs:
            if not importlib.util.find_spec(module):
                brings = f"'{sys.executable} -m pip install {package}' brings it"
                raise UserError(f"this needs the package {package}; {brings}")

    # What an earlier run left

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Make the folders, and let no other run write here. Raises UserError if one does, or the folders cannot be."""
        with contextlib.ExitStack() as locks:
            for path in dict.fromkeys((self.base, *self.extras)):
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    locks.enter_context(lock_of(path))
                except OSError as error:
                    raise UserError(f"cannot write in the folder '{path.parent}': {error.strerror}") from error
            self._remove_unfinished()
            yield

    def _remove_unfinished(self) -> None:
        """Remove what a killed run was writing."""
        extras = [path.resolve() for path in self.extras]
        for folder in {path.parent for path in (self.base.resolve(), *extras)}:
            for path in folder.glob(".*.part"):
                unfinished = re.fullmatch(r"\.(.+?)(\.[0-9a-f]{8})?\.part", path.name)
                meant = path.with_name(unfinished[1]) if unfinished else path
                if self.owns(meant) or meant in extras:
                    path.unlink()

    def read_state(self, shaped_by: dict[str, str], defaults: dict[str, str]) -> State | None:
        """The state to go on from; None if there is none. Raises UserError if it is not of such a run.

        shaped_by: all that decides the pictures, defaults: what of it is so if nothing is said.
        """
        path = self.state_path
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as file:
                losses, shapes = file["losses"], json.loads(str(file["shaped_by"]))
                # 0.2.0 did not write the last two: its states are at the end of an iteration of 20 evaluations.
                evaluations = int(file["evaluations"]) if "evaluations" in file else 20 * (len(losses) - 1)
                partial = bool(file["partial"]) if "partial" in file else False
                # What was learnt is written at the end of a run only, and is read when it is asked for.
                is_there = "by_gradient" in file
                way = str(file["way"]) if is_there else ""
                learnt = functools.partial(read_learnt, path) if is_there else lambda: None
                state = State(file["x"], losses, shapes, evaluations, partial, way, learnt)
        except Exception as error:  # np.load and zipfile raise almost anything on a damaged file
            raise UserError(f"'{path}' is no state of a run: {error}; without --resume the run starts anew") from error
        # A flag that the state does not know is newer than the state, which was made as its default makes it. A start
        # picture is known by its digest, and not by its path, which 0.2.0 wrote as well.
        absent = defaults | {"--init_image": state.shaped_by.get("--init_image", defaults["--init_image"])}
        for name in {**shaped_by, **state.shaped_by}:
            before, now = (shapes.get(name, absent.get(name, "not given")) for shapes in (state.shaped_by, shaped_by))
            if before != now:
                raise UserError(f"cannot resume '{path}': {name} was {before} and now is {now}")
        return state

    def _extras_before(self) -> list[Path]:
        """The files that an earlier run of this PREFIX wrote besides its pictures and state, as its state says.

        Of a folder that was copied or moved, only those in it are.
        """
        folder = self.base.parent.resolve()
        try:
            with np.load(self.state_path, allow_pickle=False) as file:
                if "extras" not in file:  # 0.2.0 did not say it: what is there by these names is taken for it
                    return [one.resolve() for path in self.extras for one in files_of(path)]
                moved = str(file["base"]) != str(self.base.resolve())
                paths = [Path(path) for path in json.loads(str(file["extras"]))]
                return [folder / path for path in paths if not (moved and path.is_absolute())]
        except Exception:  # there is none, or it is damaged: np.load raises almost anything
            return []

    def check_extras_are_ours(self) -> None:
        """Raise UserError if a log, an animation, a report or events are there that no run of this PREFIX wrote."""
        ours = self._extras_before()
        for path in self.extras:
            if any(one.resolve() not in ours for one in files_of(path)):
                raise UserError(
                    f"'{path}' is there, and not of a run with this PREFIX; move it, or choose another name"
                )

    def clear_the_way(self, overwrite: bool) -> str:
        """Move an earlier run's files together into <base>_earlier_<n>/, or remove them; says so if it did."""
        there = filter(self.owns, self.base.parent.iterdir())
        # The state goes first: if we are killed on the way, nothing is left that could be gone on with.
        earlier = sorted(there, key=lambda path: path.suffix != ".npz")
        earlier += [path for path in self._extras_before() if path.is_file()]
        if not earlier:
            return ""
        if overwrite:
            for path in earlier:
                path.unlink()
            return f"replacing the {len(earlier)} files of an earlier run"
        number = next(n for n in itertools.count(1) if not os.path.lexists(f"{self.base}_earlier_{n}"))
        folder = Path(f"{self.base}_earlier_{number}")
        folder.mkdir()
        for path in earlier:
            shutil.move(path, folder / path.name)
        return f"moved the {len(earlier)} files of an earlier run to {folder}"

    # While it goes on

    def expect(self, state: State, picture: Callable[[], np.ndarray]) -> None:
        """Write the picture of the state that is gone on from at the end, if it is missing and none comes after it."""
        number = state.iteration + state.partial
        if number and not self.picture_path(number).exists():
            loss = float(state.losses[-1][0])
            self._unsaved = lambda: self._write_picture(number, picture(), loss, state.shaped_by, exact=False)

    def begin(
        self,
        start: Callable[[], np.ndarray],
        totals: dict[tuple[int, int], int],
        state: State | None,
        inputs: dict[str, np.ndarray],
        defaults: dict[str, Any],
    ) -> None:
        """Open the logs. An animation and a report begin with start(), and the iterations before `state`.

        totals: how many iterations there are to be at each size, (rows, columns), the last being the picture's own.
        inputs: the pictures that are read, by their names in words; defaults: of the settings; both for the report.
        """
        events = events_path(self.tensorboard).resolve() if self.tensorboard else None
        self._logs = [csv_log(self.log.resolve())] if self.log else []
        self._logs += [tensorboard_log(events)] if events else []
        others = [path.resolve() for path in (self.animation, self.log, self.report) if path]
        written = [*others, events] if events else others
        self._written = [*dict.fromkeys([*(self._extras_before() if state else []), *written])]
        before = self._paths_before(totals, state) if state else {}
        if self.report:
            facts = facts_of(self.made, defaults, inputs, max(list(totals)[-1]))
            taken = taken_over(self.report, before, state) if state else ([], {})
            self._report = report_of(self.report.resolve(), facts, totals, start(), taken)
            self._logs.append(self._report.add)
        if self.animation:
            first = start()
            earlier = [read_picture(str(path), allow_large=True)[0] for path in before.values() if path.exists()]
            self._frames = [first, *(resize(picture, first.shape[:2], "bicubic") for picture in earlier)]

    def _paths_before(
        self, totals: dict[tuple[int, int], int], state: State
    ) -> dict[tuple[tuple[int, int], int], Path]:
        """Where the pictures of the iterations up to `state` are, if they were saved, by their size and number."""
        paths: dict[tuple[tuple[int, int], int], Path] = {}
        for size, total in totals.items():
            coarse = None if size == list(totals)[-1] else size
            done = state.iteration if size == state.size else total
            paths |= {(size, number): self.picture_path(number, coarse) for number in range(1, done + 1)}
            if size == state.size:
                break
        return paths

    def note(self, size: tuple[int, int], evaluations: int, losses: list[float]) -> None:
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
        self._frames += [iteration.picture] if self.animation else []
        for log in self._logs:
            log(iteration)
        return path

    def finish(self) -> list[Path]:
        """Write what is still to be written at the end of a run; returns the paths."""
        paths = []
        if self._unsaved:
            with advice_to_resume():
                paths.append(self._unsaved())
            self._unsaved = None
        if self.keeps and self._latest and (learnt := self._latest.learnt()):
            with advice_to_resume():
                self._write_state(self._latest, learnt)
        if self.animation and len(self._frames) > 1:  # else there is no more than the start
            write_animation(self.animation.resolve(), self._frames)
            paths.append(self.animation)
        return paths

    def _write_state(self, state: State, learnt: Curvature | None = None) -> None:
        """Write what is needed to go on from there."""
        contents: dict[str, Any] = {"x": np.asarray(state.x, np.float32), "losses": state.losses}
        contents |= {"iteration": state.iteration, "evaluations": state.evaluations, "partial": state.partial}
        folder = self.base.parent.resolve()
        extras = [str(path.relative_to(folder) if path.is_relative_to(folder) else path) for path in self._written]
        contents |= {"shaped_by": json.dumps(state.shaped_by), "extras": json.dumps(extras)}
        contents |= {"base": str(self.base.resolve())}
        contents |= {"way": state.way, **to_arrays(learnt)} if learnt else {}
        write_whole(self.state_path, lambda file: np.savez(file, **contents))

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


def read_learnt(path: Path) -> Curvature:
    """What the optimiser had learnt when the run of this state ended. Raises UserError if it cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return from_arrays(file)
    except Exception as error:  # np.load and zipfile raise almost anything on a damaged file
        raise UserError(f"'{path}' is damaged: {error}; without --resume the run starts anew") from error


def files_of(extra: Path) -> list[Path]:
    """The file that a log, an animation or a report is, or TensorBoard's in a folder."""
    return sorted(extra.glob("events.out.tfevents.*")) if extra.is_dir() else [extra] * extra.is_file()


@contextlib.contextmanager
def lock_of(path: Path) -> Iterator[None]:
    """Own what is written at this path. Raises UserError if another process does; a killed one does not."""
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0.1)
    except Timeout as held:
        raise UserError(f"another run is writing '{path}'; wait for its end, or choose another name") from held
    try:
        yield
    finally:
        # While it is held: whoever waits for it finds a new file. Some systems cannot remove an open one.
        with contextlib.suppress(OSError):
            os.unlink(lock.lock_file)
        lock.release()


@contextlib.contextmanager
def advice_to_resume() -> Iterator[None]:
    """What cannot be written is told with what to do next."""
    try:
        yield
    except UserError as error:
        advice = "what was saved before is whole; make room, and the same command with --resume goes on from there"
        raise UserError(f"{error}; {advice}", error.status) from error
