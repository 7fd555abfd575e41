"""Saving and showing what painting hands over; however that ends, why it ended is what is said."""

import contextlib
from collections.abc import Callable, Generator
from pathlib import Path

from deepstyle import Iteration
from deepstyle_support.messages import notify, reason


def save_all(
    iterations: Generator[Iteration, None, None],
    save: Callable[[Iteration], None],
    finish: Callable[[], list[Path]],
    show: Callable[[str], None],
    was_stopped: Callable[[], bool],
) -> Iteration | None:
    """Save all iterations, each as it comes; returns the last.

    What is written at the end of a run is written, and shown, however it ends. If that fails after another failure, or
    when the person has stopped the run, it is said, and what came first is what counts.
    """
    last = unsaved = None

    def finish_and_show() -> None:
        for path in finish():
            show(f"saved {path}")

    try:
        # An evaluation that failed is raised behind a part of an iteration, or when that could not be saved.
        with contextlib.closing(iterations):
            for last in iterations:
                try:
                    save(last)
                except Exception as error:
                    unsaved = error
                    raise
    except BaseException as first:
        notify_also(first, unsaved, failure_of(finish))
        raise
    if was_stopped():
        notify_also(None, failure_of(finish_and_show))
    else:
        finish_and_show()
    return last


def failure_of(act: Callable[[], object]) -> Exception | None:
    """What goes wrong with it."""
    try:
        act()
    except Exception as error:
        return error
    return None


def notify_also(first: BaseException | None, *others: Exception | None) -> None:
    """Say what went wrong after `first`, which whoever it is raised to says, unless that is the same."""
    known = reason(first) if first else ""
    for said in dict.fromkeys(reason(error) for error in others if error):
        if said != known:
            notify(f"besides, {said}")
