"""A folder of photos: which there are, where the results of each go, and what became of each."""

import contextlib
import dataclasses
import os
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

from .locks import folder_for, lock_of
from deepstyle_support.messages import UserError, in_words, printable, tell
from .ownership import real, remove_unfinished
from deepstyle_support.reading import read_picture
from deepstyle import Ending
from .report import THUMBNAIL, Card, check_index, encoded, title_of, write_index

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


def arguments_for(photo: Photo, arguments: Namespace) -> Namespace:
    """The command's arguments for this photo alone; what else is written of it (a log, a report) goes to its folder.

    Raises UserError if one of these has a folder in its name.
    """
    own = {"content": str(photo.path), "prefix": os.path.join(photo.results, "")}
    for flag in ("animation", "log", "tensorboard", "report"):
        name = getattr(arguments, flag)
        if name and (Path(name).name != name or name == ".."):
            raise UserError(
                f"--{flag} is '{name}'; with a folder of photos each gets its own beside its pictures, so give a name "
                "without a folder"
            )
        if name:
            own[flag] = str(photo.results / name)
    return Namespace(**vars(arguments) | own)


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

    @contextlib.contextmanager
    def line_for(self, photo: Photo) -> Iterator[str]:
        """What to call the photo while it is painted; then a line says how that ended.

        Raises UserError if its results would go where an earlier one's are: some disks do not tell a.jpg from A.JPG.
        """
        name, began = f"{self.photos.index(photo) + 1}/{len(self.photos)} {photo.path.name}: ", time.perf_counter()
        if photo.results.exists():
            self._check_owner(photo)
        yield printable(name)
        self._check_owner(photo)
        ending = photo.ending
        if photo.is_done and ending:
            loss = "nothing better was found, " if ending.loss is None else f"loss {ending.loss:.5g}, "
            how = f"{time.perf_counter() - began:.1f} s" if ending.painted else "done before"
            self.show(printable(f"{name}{loss}{how}, {ending.picture or photo.results}"))

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
