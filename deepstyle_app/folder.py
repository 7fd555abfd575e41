"""Many pictures by one command: a folder of photos, a folder of styles, or all pairs of the two."""

import contextlib
import dataclasses
import functools
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from deepstyle import check_agreement, picture_sizes, planned
from deepstyle_support.cache import Cache
from deepstyle_support.device import describe_device
from deepstyle_support.memory import MIN_SIDE, TooLarge, free_memory, plan_memory
from deepstyle_support.messages import UserError, as_typed, notify
from deepstyle_support.pictures import Pictures
from deepstyle_support.reading import shape_of
from deepstyle_support.weights import load_weights

from .batch import Batch, Task
from .inputs import read_common, read_others
from .job import Job
from .ownership import RunFiles, base_path
from .run import Shared, run
from .terminal import console_for, signals_as_requests

# Windows hides these in every folder that it has shown; where the folder is copied to, the name alone says so.
LEFT_BY_WINDOWS = ("thumbs.db", "desktop.ini")


@dataclasses.dataclass
class Group:
    """The pictures that are to be made in one style, or in one mixture of styles."""

    job: Job  # with this style
    tasks: list[Task]
    common: dict[str, Any] | None = None  # all pictures but photos and styles, once they are read
    others: dict[str, Any] | None = None  # all pictures but the photos, if they are at hand

    def read_others(self) -> dict[str, Any]:
        """All pictures but the photos; what there is to say of them was said when they were checked."""
        return self.others or read_others(dataclasses.replace(self.job, quiet=True), self.common)


def is_many(job: Job) -> bool:
    """Whether the job is for many pictures."""
    return any(map(os.path.isdir, (job.content, *job.style)))


def run_many(job: Job) -> int:
    """A run of each picture, one after another or shared out among workers. Returns the exit status.

    What is wrong with all of them is raised before anything is created; what is wrong with one is said, and at the end
    once more, and stops no other.
    """
    settings, free = job.settings, free_memory(job.settings.max_memory)
    groups, batch = groups_of(job)
    if job.workers != 1:
        from .crew import crew_for

        crew_for(job.workers)  # before anything is read, it says what is wrong with them
    check(job, groups, batch, free)
    if not batch.left():
        return batch.end()
    weights, source = load_weights(settings.weights, settings.seed, settings.model, job.quiet)
    with signals_as_requests() as received, batch.owned(job.report) as note:
        if note and not job.quiet:
            notify(note)
        try:
            if job.workers > 1:
                from .photo_workers import run_by_workers  # only now: nobody else needs Ray

                run_by_workers(job, groups, batch, (weights, source), received)
            else:
                batch.begin(describe_device(), source, job)
                shared = Shared({}, free, weights, Cache(), received)
                for group in groups:
                    run_group(group, batch, shared, job)
        finally:
            batch.end_page(job)
        return batch.end(128 + received[0] if received else 0)


def run_group(group: Group, batch: Batch, shared: Shared, job: Job) -> None:
    """A run of each picture in one style, until a stop is asked for. shared: without the pictures that they share."""
    left = [task for task in group.tasks if task.is_left]
    if not left or shared.received:
        return
    with batch.failures(left, Path(group.job.style[0]).name):
        shared = dataclasses.replace(shared, others=group.read_others())
    for task in left:
        if not (task.failure or shared.received):
            with batch.failures([task]):
                batch.check_results(task)
                began = time.perf_counter()
                ending = run(task.job, shared, batch.name_of(task))
                batch.ended(task, ending, time.perf_counter() - began)
            batch.write_page(job)


def groups_of(job: Job) -> tuple[list[Group], Batch]:
    """All pictures that are to be made, by their styles. Raises UserError for what is wrong with the folders.

    Each one's results go to a folder of the photo's, or the style's, whole name: a.jpg and a.png are two, and no name
    gets longer.
    """
    results = base_path(os.path.join(job.prefix, "")).parent
    has_folder = [os.path.isdir(style) for style in job.style]
    if any(has_folder) and len(job.style) > 1:
        folder = job.style[has_folder.index(True)]
        raise UserError(
            f"'{folder}' is a folder; name it as the only style, and each of its pictures is one of its own"
        )
    photos = files_in(job.content, results) if os.path.isdir(job.content) else [Path(job.content)]
    styles = [(str(path),) for path in files_in(job.style[0], results)] if any(has_folder) else [job.style]
    by_photo, by_style = os.path.isdir(job.content), any(has_folder)
    groups = []
    for style in styles:
        tasks = []
        for photo in photos:
            names = [photo.name] * by_photo + [Path(style[0]).name] * by_style
            where = results.joinpath(*names)
            tasks.append(Task(job.of_one(str(photo), style, where), " in ".join(names), names, where))
        groups.append(Group(dataclasses.replace(job, style=style), tasks))
    batch = Batch(
        [task for group in groups for task in group.tasks],
        results,
        console_for(job.quiet).print,
        thing="picture" if by_style else "photo",
        debug=job.debug,
    )
    return groups, batch


def check(job: Job, groups: list[Group], batch: Batch, free: tuple[float, float]) -> None:
    """Check all that can be checked before anything is created. Raises UserError for what is wrong with all pictures.

    What is wrong with some is their failure.
    """
    common = job.of_one(job.content, job.style, batch.results)
    RunFiles.of(common).check(common.inputs(), (MIN_SIDE, MIN_SIDE))
    if job.report:
        batch.check_page(job.report)
    masks_and_start = read_common(job)
    if len(groups) > 1:  # what no style can be made with is wrong with the command, not with each of them
        check_others({"styles": (np.zeros((MIN_SIDE, MIN_SIDE, 3), np.uint8),), **masks_and_start}, job, free)
    for group in groups:
        group.common = masks_and_start
        with (
            batch.failures(group.tasks, Path(group.job.style[0]).name) if len(groups) > 1 else contextlib.nullcontext()
        ):
            for path in group.job.style:
                require_file(path)
            others = read_others(group.job, masks_and_start)
            check_others(others, group.job, free)
            group.others = others if len(groups) == 1 else None
    by_photo: dict[str, list[Task]] = {}
    for task in batch.left():
        by_photo.setdefault(task.job.content, []).append(task)
    for photo, tasks in by_photo.items():
        with batch.failures(tasks, Path(photo).name):
            require_file(photo)
            picture_sizes(shape_of(photo, job.allow_large), job.settings)
    for folder in dict.fromkeys((job.content, job.style[0])) if not job.quiet else ():
        if names := folders_in(folder, batch.results):
            notify(f"folders in '{folder}' are not looked into: {as_typed(names)}")


def check_others(others: dict[str, Any], job: Job, free: tuple[float, float]) -> None:
    """Raise UserError for what is wrong, whatever the photo, with pictures as `read_others` returns them."""
    # What a square photo would be refused for is no photo's fault, but that it is too large.
    square = Pictures(np.zeros((MIN_SIDE, MIN_SIDE, 3), np.uint8), **others)
    with contextlib.suppress(TooLarge):
        planned(square, job.settings, functools.partial(plan_memory, found=free))
        check_agreement(square, job.settings)


def require_file(path: str) -> None:
    """Raise UserError if it is nothing to read from: to open a pipe would wait for its writer."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"'{path}' is neither a file nor a folder")


def files_in(folder: str, results: Path) -> list[Path]:
    """The files of the folder in the order of their names, less hidden ones; folders in it are not looked into.

    Raises UserError if there are none, or the results would go among them.
    """
    if results.resolve() == Path(folder).resolve():
        raise UserError(f"'{results}' is the folder of the pictures; the results need another one, which may be in it")
    files = sorted(path for path in entries(Path(folder)) if not path.is_dir())
    if not files:
        raise UserError(f"there is no picture in the folder '{folder}'; hidden files and folders do not count")
    return files


def folders_in(folder: str, results: Path) -> list[str]:
    """If it is a folder: the names of the folders in it that are passed over, less that of the results."""
    if not os.path.isdir(folder):
        return []
    own = results.resolve(), *results.resolve().parents
    return sorted(path.name for path in entries(Path(folder)) if path.is_dir() and path.resolve() not in own)


def entries(folder: Path) -> list[Path]:
    """What is in the folder and not hidden. Raises UserError if it cannot be read."""
    try:
        there = list(folder.iterdir())
    except OSError as error:
        raise UserError(f"cannot read the folder '{folder}': {error.strerror}") from error
    return [path for path in there if not (path.name.startswith(".") or path.name.lower() in LEFT_BY_WINDOWS)]
