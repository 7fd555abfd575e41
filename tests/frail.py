"""Photo workers with the tests' network, to which there happens what a test has planned: a death, a stop, a full disk.

A file `<folder>/<photo> <moment>` says what happens at that moment of the photo, a line for each time that it comes.
Moments are "begins", "saving N", when the picture of iteration N is there and its state is not, and "saved N". All that
came is in `<folder>/journal`.
"""

import contextlib
import os
import resource
import signal
import time
import warnings
from pathlib import Path

import conftest  # noqa: F401  # which makes the network narrow

from deepstyle_app import photo_workers
from deepstyle_app.files import Outputs
from deepstyle_app.photo_workers import PhotoWorker

FOLDER = "DEEPSTYLE_FRAIL"  # in the environment: the folder of what is planned


class FrailWorker(PhotoWorker):
    """A worker of the program's that does what is planned."""

    def __init__(self, *given):
        super().__init__(*given)
        self.folder_of_plans, self.name = Path(os.environ[FOLDER]), ""
        save, write_state = Outputs.save, Outputs._write_state

        def save_in_steps(outputs, iteration, *others):
            number = iteration.number
            outputs._write_state = lambda *state: self.comes(f"saving {number}", write_state, outputs, *state)
            path = save(outputs, iteration, *others)
            del outputs._write_state
            self.comes(f"saved {number}")
            return path

        Outputs.save = save_in_steps

    def paint(self, job, *others):
        self.name = Path(job.prefix).name
        self.comes("begins")
        return super().paint(job, *others)

    def comes(self, moment, act=lambda *given: None, *given):
        """What is planned for this moment happens; then it goes on with what it does."""
        with (self.folder_of_plans / "journal").open("a") as journal:
            journal.write(f"{self.name} {moment}\n")
        plan = self.folder_of_plans / f"{self.name} {moment}"
        what, *later = plan.read_text().splitlines() if plan.exists() else [""]
        if later:
            plan.write_text("\n".join(later))
        elif what:
            plan.unlink()
        with full_disk() if what == "full disk" else contextlib.nullcontext():
            self.happens(what)
            return act(*given)

    def happens(self, what):
        if what.startswith("death"):  # as soon as some files are there
            wait_until(lambda: all(os.path.exists(path) for path in what.split()[1:]))
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "sleep":
            time.sleep(60)
        if what == "warning":
            warnings.warn("for programmers", stacklevel=1)
        if what.startswith("SIG"):  # to a process, as soon as a file is there; until it has reached us
            name, pid, path, *then = what.split()
            wait_until(Path(path).exists)
            os.kill(int(pid), signal.Signals[name])
            wait_until(lambda: self.received)
            self.happens(*then or [""])


def wait_until(is_so, seconds=60):
    end = time.monotonic() + seconds
    while not is_so() and time.monotonic() < end:
        time.sleep(0.01)


@contextlib.contextmanager
def full_disk():
    """No file may grow."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


if __name__ == "__main__":  # the command with such workers
    import sys

    from frail import FrailWorker as Known  # by a name that the workers' processes know, too

    from deepstyle_app.command import main
    from deepstyle_app.terminal import leave

    photo_workers.PhotoWorker = Known  # type: ignore[misc]
    leave(main(sys.argv[1:]))
