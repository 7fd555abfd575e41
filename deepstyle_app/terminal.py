"""The person at the terminal: how far the run is, and how they ask it to stop."""

import contextlib
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import psutil

from deepstyle import Iteration, State
from deepstyle_support.console import console_on, shows_bars
from deepstyle_support.messages import Stream

if TYPE_CHECKING:
    from rich import progress
    from rich.console import Console

SAME_STOP = 0.25  # seconds: no finger presses Ctrl-C twice so fast, and a program that sends a signal twice does


def console_for(quiet: bool) -> "Console":
    """Where results are shown."""
    return console_on("stdout", quiet)


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Within, Python's warnings are dropped: libraries address them to programmers, who ask for them with python -W."""
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def progress_bar(
    console: "Console", totals: dict[tuple[int, int], int], steps: int, photo: str = ""
) -> Iterator[Callable[[tuple[int, int], int, float], None]]:
    """A bar for the evaluations at each size, and the function that moves it, told the size, their number and the loss.

    totals: the iterations at each size, the last being the picture's own; each has so many steps. photo: its name, of
    many. On anything but a terminal that can move its cursor it shows nothing.
    """
    from rich import progress

    # An evaluation takes time by its pixels. The time left is judged by all but the first, which has to compile:
    # of large pictures each takes longer than Rich looks back by itself.
    work = {size: steps * iterations * math.prod(size) for size, iterations in totals.items()}
    left = progress.TimeRemainingColumn(), "{task.fields[left]}"
    with moving(console, "{task.description}", progress.BarColumn(), "{task.fields[news]}", *left) as bar:
        task = bar.add_task("getting ready", total=None, news="", left="")

        def on_evaluation(at: tuple[int, int], count: int, loss: float) -> None:
            where = photo + ("" if at == list(totals)[-1] else f"{at[0]} x {at[1]}: ")
            name = f"{where}iteration {min(count // steps + 1, totals[at])}/{totals[at]}"
            before = sum(work[size] for size in work if math.prod(size) < math.prod(at))
            done = before + min(count * math.prod(at), work[at])
            news = f"loss {loss:.4g},"
            bar.update(task, total=sum(work.values()), completed=done, description=name, news=news, left="left")

        yield on_evaluation


@contextlib.contextmanager
def getting_ready(console: "Console") -> Iterator[None]:
    """Something moves within, on a terminal that can move its cursor: libraries take seconds to load."""
    from rich import progress

    with moving(console, progress.SpinnerColumn("line"), "{task.description}") as bar:
        bar.add_task("getting ready", total=None)
        yield


def moving(console: "Console", *columns: "str | progress.ProgressColumn") -> "progress.Progress":
    """Rich's line of these columns, which moves on a terminal that can move its cursor, and is gone at its end."""
    from rich import progress

    return progress.Progress(
        *columns,
        console=console,
        transient=True,
        disable=not shows_bars(console),
        speed_estimate_period=math.inf,
        # What goes to stderr is written above it where both are the terminal; in a file it belongs.
        redirect_stderr=Stream("stderr").isatty(),
    )


def stopping() -> list[int]:
    """The signals that ask a run to stop, less those that whoever started it has ignored.

    So `nohup` does with a dropped connection's, and a shell's script with Ctrl-C's for what it runs in the background.
    """
    known = (getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP"))  # Windows has no SIGHUP
    return [number for number in known if number and signal.getsignal(number) != signal.SIG_IGN]


def fill_closed_descriptors() -> None:
    """Open what the shell has closed (2>&-): or else the next file would get its number, and others' messages."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free


@contextlib.contextmanager
def signals_as_requests(received: list[int] | None = None) -> Iterator[list[int]]:
    """The list of SIGINT, SIGTERM and SIGHUP received: the first asks to stop, a second Ctrl-C leaves at once.

    One stop may come as several signals: `timeout` sends one to the program and then to its group, a logout sends two
    kinds. So only a SIGINT that comes a while after another one is a second Ctrl-C.
    received: the list of the same context further out, if there is one.
    """
    if received is not None:
        yield received
        return
    received, interrupted = [], math.inf

    def receive(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if number == signal.SIGINT and time.monotonic() > interrupted + SAME_STOP:
            os.write(1, b"\x1b[?25h" if os.isatty(1) else b"")  # the progress bar hid the cursor
            for process in psutil.Process().children(recursive=True):  # some of Ray's would stay for a minute
                with contextlib.suppress(psutil.Error):
                    process.kill()
            os._exit(128 + number)
        if number == signal.SIGINT:
            interrupted = min(interrupted, time.monotonic())
        received.append(number)

    previous = {number: signal.signal(number, receive) for number in stopping()}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def signals_kept_from_children() -> Iterator[None]:
    """A process that is started within gets none of the signals that ask to stop: sent to a group, they are for us."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stopping())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave(status: int) -> NoReturn:
    """End the program, which has written all that it will; after a stop at once.

    Python and its libraries take seconds to end, in which a signal that comes behind a stop would change the status.
    """
    if status > 128:
        for name in ("stdout", "stderr"):
            Stream(name).flush()
        os._exit(status)
    sys.exit(status)


def where_it_goes_on(state: State | None, size: tuple[int, int]) -> str:
    """What --resume finds for a picture of (rows, columns), in words."""
    if not state:
        return "there is nothing to resume: a new run"
    where = f" at {state.size[0]} x {state.size[1]}" if state.size != size else ""
    return f"going on after iteration {state.iteration}{where}"


def describe_iteration(iteration: Iteration, of: int, path: Path | None, width: float = math.inf) -> str:
    """The line that is shown for an iteration, or a part of it; if it is wider than `width`, a shorter one.

    of: how many there are to be at its size.
    """
    rows, columns = iteration.state.size
    name = f"{rows} x {columns}: " if iteration.is_coarse else ""
    name += f"iteration {iteration.number}/{of}{' in part' * iteration.state.partial}"
    where = f", {path}" if path else ""
    line = (
        f"{name}: loss {iteration.loss:.5g} (content {iteration.losses.content:.4g}, "
        f"style {iteration.losses.style:.4g}, total variation {iteration.losses.variation:.4g}), "
        f"improved by {iteration.improvement:.2f} %, {iteration.seconds:.1f} s{where}"
    )
    if len(line) <= width:
        return line
    return f"{name}: loss {iteration.loss:.4g}, {iteration.seconds:.1f} s{where}"


def describe_stop(last: Iteration | None, before: State | None, size: tuple[int, int]) -> str:
    """What is told to a person who has stopped the run.

    last: the last iteration, if it had any; before: what it went on from, if that is so; size: (rows, columns) of the
    picture.
    """
    goes_on = "and the same command with --resume goes on from there"
    reached = last.state if last else before
    if not reached:
        return "stopped before anything was found; nothing is saved yet, and the same command begins again"
    new = "" if last else " before anything new was found"
    rows, columns = reached.size
    if reached.size != size:
        at = "" if new else f" at {rows} x {columns} pixels"
        return f"stopped{new}{at}; the picture so far is saved, {goes_on}"
    number = reached.iteration + reached.partial
    if last and reached.partial:
        return f"stopped within iteration {number}; its picture so far is saved, {goes_on}"
    return f"stopped{new}; iteration {number} is saved, {goes_on}"
