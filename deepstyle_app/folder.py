"""A folder of photos: which there are, where the results of each go, their runs, and what became of each."""

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from deepstyle import check_agreement, picture_sizes, planned
from deepstyle_support.cache import Cache
from deepstyle_support.device import describe_device
from deepstyle_support.memory import MIN_SIDE, TooLarge, free_memory, plan_memory
from deepstyle_support.messages import UserError, counted, in_words, printable, tell, words
from deepstyle_support.pictures import Pictures
from deepstyle_support.reading import read_picture, shape_of
from deepstyle_support.weights import load_weights

from .inputs import read_others
from .job import Job
from .locks import folder_for, lock_of
from .ownership import RunFiles, base_path, real, remove_unfinished
from .report import THUMBNAIL, Card, check_index, encoded, title_of, write_index
from .run import Ending, Shared, run, workers_of
from .terminal import console_for, signals_as_requests

# Windows hides these in every folder that it has shown; where the folder is copied to, the name alone says so.
LEFT_BY_WINDOWS = ("thumbs.db", "desktop.ini")


@dataclasses.dataclass
class Photo:
    """A file of the folder, the folder for its results, and what became of it."""

    path: Path
    results: Path
    ending: Ending | None = None  # of its run, unless that failed
    failure: str = ""  # why there is no result, in words
    thumbnail: str = ""  # of its last picture, for the page of the folder

    def check(self) -> None:
        """Raise UserError if it is nothing to read from: to open a pipe would wait for its writer."""
        if self.path.exists() and not self.path.is_file():
            raise UserError(f"'{self.path}' is neither a file nor a folder")

    def card(self, report: str) -> Card:
        """What the page of the folder says of it; `report` is the name of its own."""
        if self.is_done and self.ending and self.ending.picture and not self.thumbnail:
            with contextlib.suppress(UserError):  # it may have been taken away
                self.thumbnail = encoded(read_picture(str(self.ending.picture), allow_large=True)[0], THUMBNAIL)
        loss = f"loss {self.ending.loss:.5g}" if self.ending and self.ending.loss is not None else "stopped"
        # A photo that was done before may have no report.
        link = quote(os.fsencode(f"{self.results.name}/{report}")) if (self.results / report).exists() else ""
        return Card(self.path.name, self.failure or loss, self.thumbnail, link)

    @property
    def is_done(self) -> bool:
        return self.ending is not None and self.ending.status == 0


def photos_in(folder: Path, results: Path) -> list[Photo]:
    """The files of the folder in the order of their names, less hidden ones; folders in it are not looked into.

    Each one's results go to a folder of the file's whole name: a.jpg and a.png are two, and no name gets longer.
    Raises UserError if there are none, or the results would go among the photos.
    """
    if results.resolve() == folder.resolve():
        raise UserError(f"'{results}' is the folder of the photos; the results need another one, which may be in it")
    files = sorted(path for path in entries(folder) if not path.is_dir())
    if not files:
        raise UserError(f"there is no picture in the folder '{folder}'; hidden files and folders do not count")
    return [Photo(path, results / path.name) for path in files]


def folders_in(folder: Path, results: Path) -> list[str]:
    """The names of the folders that are passed over, less that of the results."""
    own = results.resolve(), *results.resolve().parents
    return sorted(path.name for path in entries(folder) if path.is_dir() and path.resolve() not in own)


def entries(folder: Path) -> list[Path]:
    """What is in the folder and not hidden. Raises UserError if it cannot be read."""
    try:
        there = list(folder.iterdir())
    except OSError as error:
        raise UserError(f"cannot read the folder '{folder}': {error.strerror}") from error
    return [path for path in there if not (path.name.startswith(".") or path.name.lower() in LEFT_BY_WINDOWS)]


@dataclasses.dataclass
class Batch:
    """The photos of one command: it knows what became of each, and tells it."""

    photos: list[Photo]
    results: Path
    show: Callable[[str], None]  # a line of what there is to see
    debug: bool = False
    _no_page: str = ""  # why the latest page of the photos could not be written, in words
    _owners: dict[tuple[int, int], str] = dataclasses.field(default_factory=dict)

    def left(self) -> list[Photo]:
        """Those whose run has neither ended nor failed."""
        return [photo for photo in self.photos if not (photo.ending or photo.failure)]

    @contextlib.contextmanager
    def owned(self, report: str | None) -> Iterator[str]:
        """Make the folder of the results, and let no other batch write there; `report` is the name of the page in it.

        Yields what the person is to be told, if anything. Raises UserError if another batch writes there, or another
        run the page.
        """
        inside, page = self.results / "photos", self.results / (report or "")
        with folder_for(inside), lock_of(inside) as note, lock_of(page) if report else contextlib.nullcontext():
            if report:
                self.check_page(report)
            remove_unfinished(self.results, lambda path: path.name == report)
            yield note

    @contextlib.contextmanager
    def failures(self, photo: Photo) -> Iterator[None]:
        """What goes wrong within is told, and kept as why this photo has no result."""
        try:
            yield
        except Exception as error:
            photo.failure = printable(in_words(error, self.debug))
            tell(f"{printable(photo.path.name)} fails: {photo.failure}")

    def name_of(self, photo: Photo) -> str:
        """What to call the photo while it is painted.

        Raises UserError if its results would go where an earlier one's are: some disks do not tell a.jpg from A.JPG.
        """
        if photo.results.exists():
            self._check_owner(photo)
        return printable(f"{self.photos.index(photo) + 1}/{len(self.photos)} {photo.path.name}: ")

    def ended(self, photo: Photo, ending: Ending, seconds: float) -> None:
        """Keep how the photo's run ended, and show it. Raises UserError as `name_of`."""
        photo.ending = ending
        self._check_owner(photo)
        if photo.is_done:
            loss = "nothing better was found, " if ending.loss is None else f"loss {ending.loss:.5g}, "
            how = f"{seconds:.1f} s" if ending.painted else "done before"
            where = printable(str(ending.picture or photo.results))
            self.show(f"{self.name_of(photo)}{loss}{how}, {where}")

    def _check_owner(self, photo: Photo) -> None:
        found = os.stat(photo.results)
        owner = self._owners.setdefault((found.st_dev, found.st_ino), photo.path.name)
        if owner != photo.path.name:
            raise UserError(f"its results would go where those of '{owner}' are; rename one of the two")

    def check_page(self, report: str) -> None:
        """Raise UserError if the page of the photos cannot be written by this name."""
        if any(photo.path.name == report for photo in self.photos):
            raise UserError(f"--report is '{report}', and so is a photo, whose results have their folder there")
        check_index(self.results / report)

    def write_page(self, report: str, folder: str, styles: list[str]) -> None:
        """Write the page of those photos whose runs have ended or failed, with links to their own reports.

        What goes wrong with it stops no photo; if it goes wrong with the last, `end` says so.
        """
        self._no_page = ""
        try:
            cards = [photo.card(report) for photo in self.photos if photo.ending or photo.failure]
            write_index(real(self.results / report), title_of(folder, *styles), cards, len(self.photos))
        except Exception as error:
            self._no_page = in_words(error, self.debug)

    def end(self, status: int = 0) -> int:
        """Tell what is not done, and why. Returns the exit status, which is `status` unless that is 0."""
        failed = [photo for photo in self.photos if photo.failure]
        if failed or status:
            done = sum(photo.is_done for photo in self.photos)
            tell(f"{done} of {len(self.photos)} photos are done; the same command with --resume does what is not")
        for photo in failed:
            tell(f"failed: {printable(photo.path.name)}: {photo.failure}")
        if self._no_page:
            tell(f"no page of the photos: {self._no_page}")
        return status or int(bool(failed or self._no_page))


def run_folder(job: Job) -> int:
    """A run of each photo of a folder, one after another. Returns the exit status.

    What is wrong with all of them is raised before anything is created; what is wrong with one is said, and at the end
    once more, and stops no other.
    """
    settings, free = job.settings, free_memory(job.settings.max_memory)
    batch, others = check_folder(job, free)
    for photo in batch.photos:
        with batch.failures(photo):
            photo.check()
            picture_sizes(shape_of(str(photo.path), job.allow_large), settings)
    if not batch.left():
        return batch.end()
    weights, source = load_weights(settings.weights, settings.seed, settings.model, job.quiet)
    batch.show(f"painting {counted(len(batch.left()), 'photo')} on {describe_device()}; {source}")
    with signals_as_requests() as received, batch.owned(job.report) as note:
        if note and not job.quiet:
            tell(note)
        shared = Shared(others, free, weights, Cache(), received)
        for photo in batch.left():
            if not received:
                with batch.failures(photo):
                    name = batch.name_of(photo)
                    began = time.perf_counter()
                    ending = run(job.of_photo(photo.path, photo.results), shared, name)
                    batch.ended(photo, ending, time.perf_counter() - began)
                if job.report:
                    batch.write_page(job.report, job.content, list(job.style))
        return batch.end(128 + received[0] if received else 0)


def check_folder(job: Job, free: tuple[float, float]) -> tuple[Batch, dict[str, Any]]:
    """The photos, and the pictures that all share. Raises UserError for what is wrong whatever the photo."""
    workers_of(job)  # which a folder's photos do not have
    folder, results = Path(job.content), base_path(os.path.join(job.prefix, "")).parent
    batch = Batch(photos_in(folder, results), results, console_for(job.quiet).print, job.debug)
    common = job.of_photo(folder, results)
    RunFiles.of(common).check(common.inputs(), (MIN_SIDE, MIN_SIDE))
    if job.report:
        batch.check_page(job.report)
    others = read_others(job)
    # What a square photo would be refused for is no photo's fault, but that it is too large.
    square = Pictures(np.zeros((MIN_SIDE, MIN_SIDE, 3), np.uint8), **others)
    with contextlib.suppress(TooLarge):
        planned(square, job.settings, functools.partial(plan_memory, found=free))
        check_agreement(square, job.settings)
    if not job.quiet and (passed_over := folders_in(folder, results)):
        tell(f"folders in '{folder}' are not looked into: {words(passed_over)}")
    return batch, others
