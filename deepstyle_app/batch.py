"""The pictures of one command for many: which there are, and what became of each."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

from deepstyle_support.messages import UserError, counted, describe_error, notify, printable
from deepstyle_support.reading import read_picture

from .job import Job
from .locks import folder_for, lock_of
from .ownership import real, remove_unfinished
from .report import THUMBNAIL, Card, News, check_index, encoded, title_of, write_index
from .run import Ending


@dataclasses.dataclass(eq=False)
class Task:
    """One picture to be made, the folder for its results, and what became of it."""

    job: Job  # for it alone
    name: str  # what it is called: the photo's name, the style's, or both
    names: list[str]  # of the photo and the style, of which there are many
    results: Path
    ending: Ending | None = None  # of its run, unless that failed
    failure: str = ""  # why there is no result, in words
    thumbnail: str = ""  # of its last picture, for the page

    def card(self, report: str) -> Card:
        """What the page of all pictures says of it; `report` is the name of its own."""
        if self.is_done and self.ending and self.ending.picture and not self.thumbnail:
            with contextlib.suppress(UserError):  # it may have been taken away
                self.thumbnail = encoded(read_picture(str(self.ending.picture), allow_large=True)[0], THUMBNAIL)
        loss = f"loss {self.ending.loss:.5g}" if self.ending and self.ending.loss is not None else "stopped"
        # A picture that was made before may have no report.
        link = quote(os.fsencode("/".join([*self.names, report]))) if (self.results / report).exists() else ""
        return Card(self.names, self.failure or loss, self.thumbnail, link)

    def resume(self) -> None:
        """From now on it is to go on from what is saved; if nothing is, an earlier run is replaced as it was to be."""
        self.job = dataclasses.replace(self.job, resume=True)

    @property
    def is_left(self) -> bool:
        """Whether its run has neither ended nor failed."""
        return not (self.ending or self.failure)

    @property
    def is_done(self) -> bool:
        return self.ending is not None and self.ending.status == 0


@dataclasses.dataclass
class Batch:
    """The pictures of one command: it knows what became of each, and shows it."""

    tasks: list[Task]
    results: Path
    show: Callable[[str], None]  # a line of what there is to see
    thing: str = "photo"  # what one of them is called
    debug: bool = False
    _no_page: str = ""  # why the latest page could not be written, in words
    _page_goes_on: bool = False  # whether the page says so
    _seconds: list[float] = dataclasses.field(default_factory=list)  # of each picture that was painted
    # What it is wrong with, and what: with which of them first. A photo and a style may have the same name.
    _failed: dict[tuple[str, str], int] = dataclasses.field(default_factory=dict)
    _owners: dict[tuple[int, int], str] = dataclasses.field(default_factory=dict)

    def left(self) -> list[Task]:
        """Those whose run has neither ended nor failed."""
        return [task for task in self.tasks if task.is_left]

    def counted(self, number: int) -> str:
        return counted(number, self.thing)

    @contextlib.contextmanager
    def owned(self, report: str | None) -> Iterator[str]:
        """Make the folder of the results, and let no other batch write there; `report` is the name of the page in it.

        Yields what there is to say, if anything. Raises UserError if another batch writes there, or another run the
        page.
        """
        inside, page = self.results / "photos", self.results / (report or "")
        with folder_for(inside), lock_of(inside) as note, lock_of(page) if report else contextlib.nullcontext():
            if report:
                self.check_page(report)
            remove_unfinished(self.results, lambda path: path.name == report)
            yield note

    @contextlib.contextmanager
    def failures(self, tasks: list[Task], name: str = "") -> Iterator[None]:
        """What goes wrong within is shown, and kept as why these pictures are not made.

        name: what it is wrong with, if not with the only one of them.
        """
        try:
            yield
        except Exception as error:
            self.failed(tasks, printable(describe_error(error, self.debug)), name)

    def failed(self, tasks: list[Task], why: str, name: str = "") -> None:
        """Show, and keep, why these pictures are not made."""
        name = printable(name or tasks[0].name)
        for task in tasks:
            task.failure = task.failure or why
        if (name, why) not in self._failed:  # a file that is a photo and a style is bad once
            self._failed[name, why] = self.tasks.index(tasks[0])
            notify(f"{name} fails: {why}")

    def name_of(self, task: Task) -> str:
        """What to call the picture while it is painted."""
        return printable(f"{self.tasks.index(task) + 1}/{len(self.tasks)} {task.name}: ")

    def ended(self, task: Task, ending: Ending, seconds: float) -> None:
        """Keep how the picture's run ended, and show it. Raises UserError as `check_results`."""
        task.ending = ending
        self._seconds += [seconds] * ending.painted
        self.check_results(task)
        if task.is_done:
            loss = "nothing better was found, " if ending.loss is None else f"loss {ending.loss:.5g}, "
            how = f"{seconds:.1f} s" if ending.painted else "done before"
            where = printable(str(ending.picture or task.results))
            self.show(f"{self.name_of(task)}{loss}{how}, {where}")

    def check_results(self, task: Task) -> None:
        """Raise UserError if the results go where an earlier picture's are: some disks do not tell a.jpg from A.JPG."""
        if task.results.exists():
            found = os.stat(task.results)
            owner = self._owners.setdefault((found.st_dev, found.st_ino), task.name)
            if owner != task.name:
                raise UserError(f"its results would go where those of '{owner}' are; rename one of the two")

    def check_page(self, report: str) -> None:
        """Raise UserError if the page of all pictures cannot be written by this name."""
        if any(task.names[0] == report for task in self.tasks):
            raise UserError(f"--report is '{report}', and so is a {self.thing}, whose results have their folder there")
        check_index(self.results / report)

    def begin(self, on: str, source: str, job: Job) -> None:
        """Show what is going to be painted, on what, with weights from where; a new batch has a page at once."""
        left, of = len(self.left()), self.counted(len(self.tasks))
        some = f"{left} of " * (left < len(self.tasks))
        self.show(f"painting {some}{of} on {on}")
        self.show(source)
        if not job.resume:  # the page that is there may show more than what is known by now
            self.write_page(job)

    def write_page(self, job: Job, has_ended: bool = False) -> None:
        """Write the page, if one is asked for, of those whose runs have ended or failed, with links to their reports.

        has_ended: whether no more are to come. What goes wrong with it stops no picture; if with the last,
        `end` says so.
        """
        self._no_page = ""
        if not job.report:
            return
        self._page_goes_on = bool(self.left()) and not has_ended
        try:
            cards = {tuple(task.names): None if task.is_left else task.card(job.report) for task in self.tasks}
            title, news = title_of(job.content, *job.style), self._news(job.workers) if self._page_goes_on else None
            write_index(real(self.results / job.report), title, cards, self._so_far(has_ended), news)
        except Exception as error:
            self._no_page = describe_error(error, self.debug)

    def end_page(self, job: Job) -> None:
        """Write the page once more if it says that more is to come: nothing is."""
        if self._page_goes_on:
            self.write_page(job, has_ended=True)

    def _so_far(self, has_ended: bool) -> str:
        """How many are done, in words."""
        done, failed = sum(task.is_done for task in self.tasks), sum(bool(task.failure) for task in self.tasks)
        so_far = f"{done} of {self.counted(len(self.tasks))} done" + f", {failed} failed" * bool(failed)
        return f"{so_far}; the same command with --resume does what is not" if has_ended else so_far

    def _news(self, workers: int) -> News:
        """What is to come, judged by the pictures that were painted."""
        if not self._seconds:
            return News(0.0, 0.0)
        return News(sum(self._seconds) / len(self._seconds) * len(self.left()) / workers, max(self._seconds))

    def end(self, status: int = 0) -> int:
        """Show what is not done, and why. Returns the exit status, which is `status` unless that is 0."""
        if self._failed or status:
            done = sum(task.is_done for task in self.tasks)
            of = f"{done} of {self.counted(len(self.tasks))}"
            notify(f"{of} are done; the same command with --resume does what is not")
        for name, why in sorted(self._failed, key=lambda failed: self._failed[failed]):
            notify(f"failed: {name}: {why}")
        if self._no_page:
            notify(f"no page of the {self.thing}s: {self._no_page}")
        return status or int(bool(self._failed or self._no_page))
