"""Whose file it is: how a run's files are called, what an earlier run left of them, and that no others are touched."""

import contextlib
import dataclasses
import importlib.util
import itertools
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from deepstyle import Stage, saved_size
from deepstyle_support.memory import animation_bytes
from deepstyle_support.messages import UserError, counted

from .job import Job
from .locks import folder_for, lock_file, lock_of
from .outputs import MAX_SIDE, check_animation
from .report import report_bytes
from .state import EVENTS, Record, read_record


def base_path(prefix: str) -> Path:
    """The path that all of a run's files begin with; a folder means <folder>/result_image.

    A run that began before there was such a folder, which its own log or report may have made, stays what it was.
    Raises UserError if it is empty, or too long for a file's name.
    """
    in_folder = prefix.endswith(("/", os.sep)) or (os.path.isdir(prefix) and not run_is_at(Path(prefix)))
    base = Path(prefix, "result_image") if in_folder else Path(prefix)
    if not 0 < len(os.fsencode(base.name)) <= 200:  # most systems allow 255, and something comes behind it
        raise UserError(f"PREFIX is '{prefix}'; the name that files begin with must have 1 to 200 bytes")
    return base


def run_is_at(base: Path) -> bool:
    """Whether there is a run whose files begin so: its state, or what says that it has begun."""
    return bool(base.name) and (state_of(base).exists() or lock_file(base).exists())


def state_of(base: Path) -> Path:
    return base.with_name(f"{base.name}_state.npz")


def real(path: Path) -> Path:
    """Where all links lead."""
    return Path(os.path.realpath(path))


def files_of(extra: Path) -> list[Path]:
    """The file that a log, an animation or a report is, or TensorBoard's in a folder."""
    return sorted(extra.glob(f"{EVENTS}*")) if extra.is_dir() else [extra] * extra.is_file()


@dataclasses.dataclass
class RunFiles:
    """The names of one run's files, and what an earlier run left of them.

    `check` says what is wrong with them before anything is touched; within `owned` no other run can write them.
    """

    base: Path  # from base_path
    every: int = 1  # only each Nth picture is saved, and the last
    animation: Path | None = None
    log: Path | None = None
    tensorboard: Path | None = None
    report: Path | None = None

    @classmethod
    def of(cls, job: Job) -> "RunFiles":
        """What a job is to write. Raises UserError if PREFIX cannot be the beginning of a file's name."""
        return cls(base_path(job.prefix), job.every, **job.extras())

    @property
    def extras(self) -> dict[str, Path]:
        """What is written besides the pictures and the state, by its flag."""
        flags = {"--animation": self.animation, "--log": self.log, "--tensorboard": self.tensorboard}
        return {flag: path for flag, path in (flags | {"--report": self.report}).items() if path}

    @property
    def state_path(self) -> Path:
        return state_of(self.base)

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
        return bool(re.fullmatch(pattern, path.name)) and real(path.parent) == real(self.base.parent)

    # Before the run

    def bytes_kept(self, stages: list[Stage]) -> int:
        """What of a painting is kept in memory until it is written: an animation's frames, a report's pictures."""
        pictures = 1 + sum(stage.iterations for stage in stages)
        full = stages[-1]
        kept = 0
        if self.animation:
            channels = full.pictures.content.shape[2]
            kept += animation_bytes(saved_size(full.pictures, full.settings), channels, pictures)
        if self.report:
            kept += report_bytes(full.size, pictures)
        return kept

    def check(self, inputs: list[str], size: tuple[int, int], bytes_of_curvature: int = 0) -> None:
        """Raise UserError if this cannot be written, or if an input would be written over. Creates nothing.

        size: (rows, columns) of the saved pictures.
        """
        if self.every < 1:
            raise UserError(f"--every is {self.every}; it must be 1 or more")
        self._check_extras(size)
        for path in (*self.extras.values(), self.base):
            expect_folder(path if path == self.tensorboard else (real(path) if path.is_symlink() else path).parent)
        self._check_places()
        self._check_inputs(inputs)
        # The state's float picture, and one saved picture that hardly compresses, maybe with alpha.
        needed, folder = size[0] * size[1] * (3 * 4 + 4) + bytes_of_curvature, expect_folder(self.base.parent)
        if (free := shutil.disk_usage(folder).free) < needed:
            raise UserError(f"the disk of '{folder}' has {free} bytes free, and one iteration needs {needed}")

    def _check_extras(self, size: tuple[int, int]) -> None:
        """Raise UserError if what is written besides the pictures cannot be had by these names."""
        kinds = {"--animation": tuple(MAX_SIDE), "--log": (".csv",), "--report": (".html",)}
        for flag, path in self.extras.items():
            if flag == "--tensorboard":
                if path.exists() and not path.is_dir():
                    raise UserError(f"--tensorboard is '{path}', which is a file; it must be a folder")
                continue
            wrong = path.suffix not in kinds[flag] or (path.exists() and not path.is_file())
            if wrong or max(len(os.fsencode(one.name)) for one in (path, real(path))) > 200:
                ending = " or ".join(kinds[flag])
                raise UserError(
                    f"{flag} is '{path}'; it must be a file whose name ends in {ending}, of up to 200 bytes"
                )
            if path.is_symlink() and (real(path).is_symlink() or not real(path).parent.is_dir()):
                raise UserError(f"{flag} is '{path}', a link that leads to '{real(path)}', where no file can be")
        if self.animation:
            check_animation(self.animation, size)
        needs = [("imageio_ffmpeg", "imageio-ffmpeg")] if self.animation and self.animation.suffix == ".mp4" else []
        needs += [("tensorboard", "tensorboard")] if self.tensorboard else []
        for module, package in needs:
            if not importlib.util.find_spec(module):
                brings = f"'{sys.executable} -m pip install {package}' brings it"
                raise UserError(f"this needs the package {package}; {brings}")

    def _check_places(self) -> None:
        """Raise UserError if two of the files would be at one place, or a file where another needs a folder."""
        base, places = real(self.base), {flag: real(path) for flag, path in self.extras.items()}
        for flag, place in places.items():
            if any(self.owns(one) for one in (place, *place.parents)):
                raise UserError(f"{flag} is '{self.extras[flag]}', where this PREFIX has its pictures and its state")
            others = {other: path for other, path in places.items() if other != flag} | {"PREFIX": base}
            for other, path in others.items():
                if (path == place and other != "PREFIX") or (flag != "--tensorboard" and place in path.parents):
                    raise UserError(f"{flag} is '{self.extras[flag]}', where {other} needs another file or a folder")
        if self.base.parent.is_dir():
            for path in filter(self.owns, self.base.parent.iterdir()):
                if path.exists() and not path.is_file():
                    raise UserError(f"'{path}' is no file; a run with this PREFIX would write there; choose another")

    def _check_inputs(self, inputs: list[str]) -> None:
        """Raise UserError if one of the files that are read would be written over, moved or removed."""
        extras, before = [real(extra) for extra in self.extras.values()], self._extras_before()
        for given in inputs:
            if self.owns(real(Path(given))):
                raise UserError(f"'{given}' is an input, and a run with this PREFIX would write there; choose another")
            if real(Path(given)) in extras:
                raise UserError(f"'{given}' is an input, and would be written over; choose another name")
            if real(Path(given)) in before:
                raise UserError(f"'{given}' is an input, and an earlier run wrote it; choose another PREFIX")

    # What an earlier run left

    @contextlib.contextmanager
    def owned(self) -> Iterator[str]:
        """Make the folders, and let no other run write here. Where nothing is written, nothing is left of them.

        Yields a note for the person, if there is one. Raises UserError if another run writes here, if the folders
        cannot be made, or if something is there that is not this run's.
        """
        paths = [path / "events" if path == self.tensorboard else path for path in (self.base, *self.extras.values())]
        with contextlib.ExitStack() as locks:
            for path in paths:
                locks.enter_context(folder_for(path))
            # In one order: of two runs with the same files at once, one gets them all.
            in_order = sorted({real(path): path for path in paths}.items())
            notes = [locks.enter_context(lock_of(path)) for _, path in in_order]
            self.check_extras_are_ours()
            meant = [real(path) for path in self.extras.values() if path != self.tensorboard]
            for folder in {path.parent for path in (real(self.base), *meant)}:
                remove_unfinished(folder, lambda path: self.owns(path) or path in meant)
            yield next(filter(None, notes), "")

    def record(self) -> Record:
        """What the state that is there says of a run's other files."""
        return read_record(self.state_path, real(self.base))

    def _extras_before(self) -> list[Path]:
        """What an earlier run of this PREFIX wrote besides its pictures and state, and is still there."""
        record = self.record()
        if record.extras is None:  # what is there by these names is taken for it
            return [real(one) for path in self.extras.values() for one in files_of(path)]
        return [path for path in record.extras if path.is_file() and record.wrote(path)]

    def check_extras_are_ours(self) -> None:
        """Raise UserError if a log, an animation, a report or events are there that no run of this PREFIX wrote."""
        ours = self._extras_before()
        for path in self.extras.values():
            if any(real(one) not in ours for one in files_of(path)):
                if self.record().is_damaged:
                    raise UserError(
                        f"'{self.state_path}' is damaged, and cannot tell whether '{path}' is of a run with this "
                        "PREFIX; move them, or choose another name"
                    )
                raise UserError(
                    f"'{path}' is there, and not of a run with this PREFIX; move it, or choose another name"
                )

    def clear_the_way(self, overwrite: bool) -> str:
        """Move an earlier run's files together into <base>_earlier_<n>/, or remove them; says so if it did.

        Raises UserError if that cannot be.
        """
        there = filter(self.owns, self.base.parent.iterdir())
        # The state goes first: if we are killed on the way, nothing is left that could be gone on with.
        earlier = sorted(there, key=lambda path: path.suffix != ".npz") + self._extras_before()
        for path in earlier:
            if not os.access(path.parent, os.W_OK | os.X_OK):
                raise UserError(f"'{path}' is an earlier run's, and cannot be moved: no permission in its folder")
        if not earlier:
            return ""
        number = next(n for n in itertools.count(1) if not os.path.lexists(f"{self.base}_earlier_{n}"))
        folder = Path(f"{self.base}_earlier_{number}")
        try:
            if overwrite:
                for path in earlier:
                    path.unlink()
                return f"replacing {counted(len(earlier), 'file')} of an earlier run"
            folder.mkdir()
            for path in earlier:
                shutil.move(path, free_name(folder, path.name))
        except OSError as error:
            raise UserError(f"cannot move or remove '{path}': {error.strerror or error}", status=1) from error
        return f"moved {counted(len(earlier), 'file')} of an earlier run to {folder}"


def expect_folder(folder: Path) -> Path:
    """The nearest folder that is there. Raises UserError if the folder cannot be made in it, or no file put there."""
    nearest = folder
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    missing = folder.relative_to(nearest).parts
    if ".." in missing:  # which leads nowhere from what is not there
        raise UserError(f"cannot make the folder '{folder}': there is no '{nearest / missing[0]}'")
    if not nearest.is_dir():
        kind = f"a link that leads to '{real(nearest)}'" if nearest.is_symlink() else "a file"
        raise UserError(f"cannot make the folder '{folder}': '{nearest}' is {kind}")
    if not os.access(nearest, os.R_OK | os.W_OK | os.X_OK):
        raise UserError(f"cannot write in the folder '{nearest}': no permission")
    return nearest


def remove_unfinished(folder: Path, is_ours: Callable[[Path], bool]) -> None:
    """Remove what a killed run was writing in the folder, for files that are ours."""
    for path in folder.glob(".*.part"):
        unfinished = re.fullmatch(r"\.(.+?)(\.[0-9a-f]{8})?\.part", path.name)
        if is_ours(path.with_name(unfinished[1]) if unfinished else path):
            with contextlib.suppress(OSError):  # it is in nobody's way
                path.unlink()


def free_name(folder: Path, name: str) -> Path:
    """Where a file of this name can go in the folder; a second one gets a number."""
    stem, suffix = os.path.splitext(name)
    others = (f"{stem}_{number}{suffix}" for number in itertools.count(2))
    return next(folder / one for one in itertools.chain([name], others) if not os.path.lexists(folder / one))
