"""Many pictures shared out among workers, each of which paints one at a time."""

import contextlib
import io
import os
import sys
import time
from collections import deque
from typing import Any, NamedTuple

from deepstyle_support.cache import Cache
from deepstyle_support.limits import usable_cores
from deepstyle_support.memory import RAY, free_memory
from deepstyle_support.messages import UserError, describe_error, notify, print_line, printable
from deepstyle_support.weights import Weights

from .batch import Batch, Task
from .crew import Crew, crew_for, on_cluster
from .folder import Group
from .job import Job
from .ownership import RunFiles
from .run import Ending, Shared, run
from .terminal import without_warnings

POLL = 0.2  # seconds between two looks at whether the person has asked for a stop


class Outcome(NamedTuple):
    """What became of a picture that a worker was given."""

    ending: Ending | None  # unless it failed
    failure: str  # why, in words
    out: str  # what the run has said on stdout, and on stderr
    err: str
    seconds: float


class PhotoWorker:
    """A process that paints pictures, one at a time.

    bytes_free: of main memory, which it may use; None: its share of what its machine has free. threads: its cores.
    folder, program: where the command was typed, which relative paths begin from, and its name.
    """

    def __init__(self, weights: Weights, bytes_free: float | None, threads: int, folder: str, program: str):
        self.weights, self.bytes_free, self.threads, self.folder = weights, bytes_free, threads, folder
        sys.argv[0] = program  # a report says by which command a picture was made
        self.cache, self.received = Cache(), list[int]()
        self.found: tuple[float, float] | None = None

    def paint(self, job: Job, name: str, others: dict[str, Any]) -> Outcome:
        """Run a job as this process alone would."""
        began, out, err = time.perf_counter(), io.StringIO(), io.StringIO()
        ending, failure = None, ""
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), without_warnings():
            try:
                enter(self.folder)
                shared = Shared(others, self._free(job), self.weights, self.cache, self.received)
                ending = run(job, shared, name)
            except Exception as error:
                failure = printable(describe_error(error, job.debug))
        return Outcome(ending, failure, out.getvalue(), err.getvalue(), time.perf_counter() - began)

    def stop(self, number: int) -> None:
        """What a signal of this number would do: the picture that is painted ends within, and is saved."""
        self.received.append(number)

    def _free(self, job: Job) -> tuple[float, float]:
        """Bytes that this worker may use, and of its GPU; asked once, before it has taken any."""
        if not self.found:
            here, on_gpu = free_memory(job.settings.max_memory)
            share = here / max(1, usable_cores() // self.threads) if self.bytes_free is None else self.bytes_free
            self.found = min(here, share), on_gpu
        return self.found


def enter(folder: str) -> None:
    """Make it the working directory: on a cluster, Ray's is wherever it was started. Raises UserError if not."""
    try:
        os.chdir(folder)
    except OSError as error:
        raise UserError(f"a worker's machine has no folder '{folder}': {error.strerror}", status=1) from error


def run_by_workers(
    job: Job, groups: list[Group], batch: Batch, loaded: tuple[Weights, str], received: list[int]
) -> None:
    """A run of each picture, so many at a time as there are workers, until a stop is asked for.

    loaded: the weights, and where they are from, in words. received: the signals that ask for a stop, as they come.
    """
    weights, source = loaded
    crew = crew_for(min(job.workers, len(batch.left())))
    with contextlib.closing(Sharing(job, crew, groups, batch, weights)) as sharing:
        on = "" if received else crew.begin()  # which takes seconds
        if not received:
            batch.begin(on, source, job)
            sharing.run(received)


class Sharing:
    """The pictures on their way to workers and back."""

    def __init__(self, job: Job, crew: Crew, groups: list[Group], batch: Batch, weights: Weights):
        self.job, self.crew, self.batch, self.weights = job, crew, batch, weights
        self.waiting = deque((group, task) for group in groups for task in group.tasks if task.is_left)
        self.others: tuple[Group, Any] | None = None  # the latest group, and Ray's reference to what its pictures share
        self.runs_before: dict[Task, str] = {}  # by what the state is known that was there before a worker began
        self.retried: set[Task] = set()
        self.received: list[int] = []  # the signals that ask for a stop

    def run(self, received: list[int]) -> None:
        import ray

        self.received, stopped = received, False
        free, _ = free_memory(self.job.settings.max_memory)
        share = None if on_cluster() else max(0.0, free - RAY) / self.crew.number
        place = os.getcwd(), sys.argv[0]
        self.crew.employ(PhotoWorker, ray.put(self.weights), share, self.crew.threads, *place, calls_at_once=2)
        while (self.waiting and not received) or self.crew.is_working():
            while self.crew.free and self.waiting and not received:
                self.submit(*self.waiting.popleft())
            if received and not stopped:
                self.crew.call_all("stop", received[0])
                stopped = True
            if self.crew.busy and (done := self.crew.next_done(POLL)):
                self.take(*done)

    def submit(self, group: Group, task: Task) -> None:
        """Give a picture to a worker. What is wrong with it already is its failure."""
        import ray

        with self.batch.failures([task]):
            self.batch.check_results(task)
            if not self.others or self.others[0] is not group:
                self.others = group, ray.put(group.read_others())
            self.runs_before[task] = RunFiles.of(task.job).record().run
            self.crew.submit((group, task), "paint", task.job, self.batch.name_of(task), self.others[1])
        if task.failure:
            self.batch.write_page(self.job)

    def take(self, key: tuple[Group, Task], result: Any, died: bool) -> None:
        """Take what became of a picture."""
        group, task = key
        if died:
            self.try_again(group, task)
            return
        with self.batch.failures([task]):
            if isinstance(result, Exception):
                raise result
            for text, where in ((result.out, "stdout"), (result.err, "stderr")):
                if text and not (where == "stdout" and self.job.quiet):
                    print_line(text.rstrip("\n"), where)
            if result.failure:
                self.batch.failed([task], result.failure)
            else:
                self.batch.ended(task, result.ending, result.seconds)
        self.batch.write_page(self.job)

    def try_again(self, group: Group, task: Task) -> None:
        """A picture whose worker has died is given to another one, once: it goes on from what the first has saved."""
        if task in self.retried:
            self.batch.failed([task], "two workers have died of it; --debug without --workers may show why")
            self.batch.write_page(self.job)
            return
        if self.received:
            notify(f"{self.batch.name_of(task)}its worker died; --resume goes on from what it has saved")
            return
        notify(f"{self.batch.name_of(task)}its worker died; another one takes it over")
        self.retried.add(task)
        # A state that was there before is another run's, which is gone on with only if the person has asked for it.
        if RunFiles.of(task.job).record().run != self.runs_before[task]:
            task.resume()
        self.waiting.appendleft((group, task))

    def close(self) -> None:
        self.crew.end()
