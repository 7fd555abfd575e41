"""The state of a run as a file: to go on from, and to know what else the run wrote."""

import csv
import dataclasses
import functools
import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deepstyle import Losses, State
from deepstyle_support.disk import write_whole
from deepstyle_support.lbfgs import Curvature, from_arrays, to_arrays
from deepstyle_support.messages import UserError

from .outputs import latest_rows

EVENTS = "events.out.tfevents."  # what TensorBoard's files are called; behind it come time, machine and process


@dataclasses.dataclass(frozen=True)
class Saved:
    """A state as it is saved: with what decides its pictures, and how it was computed."""

    state: State
    shaped_by: dict[str, str]  # all that decides the pictures, in words
    way: str = ""  # how all was computed until here; nothing if in several ways, or if a curvature was forgotten


@dataclasses.dataclass
class Record:
    """What a run knows of the files that it wrote besides its pictures and its state."""

    run: str = dataclasses.field(default_factory=lambda: secrets.token_hex(16))  # stands in its report and animation
    extras: list[Path] | None = dataclasses.field(default_factory=list)  # None: 0.2.0 did not say it
    rows: list[str] = dataclasses.field(default_factory=list)  # of a log: its header, then each that there ever was
    is_damaged: bool = False  # the state, which so says nothing

    def wrote(self, path: Path) -> bool:
        """Whether what is there now is this run's, and not what somebody has put in its place.

        Events have a name that no other run's have. States of earlier versions do not say more than the path.
        """
        if not self.run or path.name.startswith(EVENTS):
            return True
        try:
            contents = path.read_bytes() if path.is_file() else None
        except OSError:
            return False
        # A row without the size, which is not in a log by 0.2.0.
        marks = [self.run.encode(), *(row.split(",", 2)[2].encode() for row in self.rows[1:])]
        return contents is not None and (not contents or any(mark in contents for mark in marks))

    def logged(self) -> list[dict[str, str]]:
        """The rows of a log, by the names of the columns."""
        return list(csv.DictReader(latest_rows(self.rows)))


def read_record(path: Path, base: Path) -> Record:
    """What the state at `path`, of a run whose files begin with `base`, says of the run's other files.

    Of a folder that was copied or moved, only those in it count. If there is no state, or a damaged one, nothing does.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            if "extras" not in file:
                return Record(run="", extras=None)
            moved = str(file["base"]) != str(base)
            paths = [Path(extra) for extra in json.loads(str(file["extras"]))]
            extras = [base.parent / extra for extra in paths if not (moved and extra.is_absolute())]
            run = str(file["run"]) if "run" in file else ""
            return Record(run, extras, file["log"].tobytes().decode().splitlines() if "log" in file else [])
    except Exception:  # np.load and zipfile raise almost anything
        return Record(run="", is_damaged=path.exists())


def write_state(path: Path, base: Path, saved: Saved, record: Record, curvature: Curvature | None = None) -> None:
    """Write what is needed to go on from there. Raises UserError, status 1, if the disk does not take it.

    base: what the run's files begin with, with all links followed.
    """
    state = saved.state
    contents: dict[str, Any] = {"x": np.asarray(state.x, np.float32), "losses": np.array(state.losses)}
    contents |= {"iteration": state.iteration, "evaluations": state.evaluations, "partial": state.partial}
    contents |= {"in_full": state.in_full, "rounded": state.rounded}
    folder = base.parent
    extras = [
        str(extra.relative_to(folder) if extra.is_relative_to(folder) else extra) for extra in record.extras or []
    ]
    contents |= {"shaped_by": json.dumps(saved.shaped_by), "extras": json.dumps(extras), "base": str(base)}
    contents |= {"run": record.run} if record.run else {}
    contents |= {"log": np.frombuffer("\n".join(record.rows).encode(), np.uint8)} if record.rows else {}
    contents |= {"way": saved.way, **to_arrays(curvature)} if curvature else {}
    write_whole(path, lambda file: np.savez(file, **contents))


def read_state(path: Path, shaped_by: dict[str, str], defaults: dict[str, str]) -> Saved | None:
    """The state to go on from; None if there is none. Raises UserError if it is not of such a run.

    shaped_by: all that decides the pictures, defaults: what of it is so if nothing is said.
    """
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            saved = saved_in(file, path)
    except Exception as error:  # np.load and zipfile raise almost anything on a damaged file
        raise UserError(f"'{path}' is no state of a run, or damaged; without --resume the run starts anew") from error
    # A flag that the state does not know is newer than the state, which was made as its default makes it. A start
    # picture is known by its digest, and not by its path, which 0.2.0 wrote as well.
    absent = defaults | {"--init_image": saved.shaped_by.get("--init_image", defaults["--init_image"])}
    for name in {**shaped_by, **saved.shaped_by}:
        before, now = (shapes.get(name, absent.get(name, "not given")) for shapes in (saved.shaped_by, shaped_by))
        if before != now:
            raise UserError(f"cannot resume '{path}': {name} was {before} and now is {now}")
    return saved


def saved_in(file: Mapping[str, np.ndarray], path: Path) -> Saved:
    """What a state's file holds; its curvature is read only when it is asked for."""
    losses = tuple(Losses(*row) for row in file["losses"].tolist())
    # 0.2.0 did not write these two: its states are at the end of an iteration of 20 evaluations.
    evaluations = int(file["evaluations"]) if "evaluations" in file else 20 * (len(losses) - 1)
    partial = bool(file["partial"]) if "partial" in file else False
    # A curvature is written at the end of a run only, and with it how all was computed.
    has_curvature = "by_gradient" in file
    curvature = functools.partial(read_curvature, path) if has_curvature else lambda: None
    way = str(file["way"]) if has_curvature else ""
    in_full, rounded = (int(file[name]) if name in file else 0 for name in ("in_full", "rounded"))  # it rounded nothing
    state = State(file["x"], losses, evaluations, partial, curvature, bool(in_full), rounded)
    return Saved(state, json.loads(str(file["shaped_by"])), way)


def read_curvature(path: Path) -> Curvature:
    """The optimiser's curvature when the run of this state ended. Raises UserError if it cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return from_arrays(file)
    except Exception as error:  # np.load and zipfile raise almost anything on a damaged file
        raise UserError(f"'{path}' is damaged: {error}; without --resume the run starts anew") from error
