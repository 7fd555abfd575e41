"""The person at the terminal: how far the run is, and how they ask it to stop."""

import contextlib
import math
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@contextlib.contextmanager
def progress_bar(
    console: "Console", totals: dict[tuple[int, int], tuple[int, int]], steps: int
) -> Iterator[Callable[[tuple[int, int], int, float], None]]:
    """A bar for the evaluations at each size, and the function that moves it, told the size, their number and the loss.

    totals: for each size, the last being the picture's own, the iterations done before and those in all, each of so
    many steps. On anything but a terminal it shows nothing.
    """
    from rich import progress

    # The time left is judged by all evaluations but the first, which has to compile: of large pictures each takes
    # longer than Rich looks back by itself.
    left = progress.TimeRemainingColumn(), "left"
    columns = "{task.description}", progress.BarColumn(), "{task.fields[news]}", *left
    shown = console.is_terminal and not console.quiet
    with progress.Progress(
        *columns, console=console, transient=True, disable=not shown, speed_estimate_period=math.inf
    ) as bar:
        task = bar.add_task("getting ready", total=None, news="")

        def on_evaluation(at: tuple[int, int], count: int, loss: float) -> None:
            before, total = totals[at]
            where = "" if at == list(totals)[-1] else f"{at[0]} x {at[1]}: "
            if count == 1:
                bar.reset(task, total=steps * total)
            completed = steps * before + count
            name = f"{where}iteration {min(completed // steps + 1, total)}/{total}"
            bar.update(task, completed=completed, description=name, news=f"loss {loss:.4g},")

        yield on_evaluation


def stopping() -> list[int]:
    """The signals that ask a run to stop; a dropped connection's unless whoever started it has it ignored (nohup)."""
    signals = [signal.SIGINT, signal.SIGTERM]
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    if hangup and signal.getsignal(hangup) != signal.SIG_IGN:
        signals.append(hangup)
    return list(signals)


def fill_closed_descriptors() -> None:
    """Open what the shell has closed (2>&-): or else the next file would get its number, and others' messages."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free


@contextlib.contextmanager
def signals_as_wishes() -> Iterator[list[int]]:
    """The list of SIGINT, SIGTERM and SIGHUP received: the first asks to stop, a second one leaves at once."""
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if received:
            os.write(1, b"\x1b[?25h" if os.isatty(1) else b"")  # the progress bar hid the cursor
            os._exit(128 + number)
        received.append(number)

    previous = {number: signal.signal(number, receive) for number in stopping()}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
