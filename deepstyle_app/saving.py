"""Saving and showing what painting hands over; however that ends, why it ended is what is told."""

import contextlib
from collections.abc import Callable, Generator

from .files import Outputs
from deepstyle_support.messages import reason, tell
from deepstyle import Iteration
from .terminal import describe_iteration


def save_all(
    iterations: Generator[Iteration, None, None],
    outputs: Outputs,
    totals: dict[tuple[int, int], int],
    show: Callable[[str], None],
    stopped: Callable[[], bool],
) -> Iteration | None:
    """Save and show all iterations, of which there are to be so many at each size; returns the last.

    What is written at the end of a run is written however it ends. If that fails after another failure, or when the
    person has `stopped` the run, it is told, and what came first is what counts.
    """
    last = unsaved = None

    def finish() -> None:
        for path in outputs.finish():
            show(f"saved {path}")

    try:
        # An evaluation that failed is raised behind a part of an iteration, or when that could not be saved.
        with contextlib.closing(iterations):
            for last in iterations:
                total = totals[last.state.size]
                try:
                    path = outputs.save(last, last.number == total)
                except Exception as error:
                    unsaved = error
                    raise
                show(describe_iteration(last, total, path))
    except BaseException as first:
        tell_besides(first, unsaved, failure_of(outputs.finish))
        raise
    if stopped():
        tell_besides(None, failure_of(finish))
    else:
        finish()
    return last


def failure_of(act: Callable[[], object]) -> Exception | None:
    """What goes wrong with it."""
    try:
        act()
    except Exception as error:
        return error
    return None


def tell_besides(first: BaseException | None, *others: Exception | None) -> None:
    """Tell what went wrong after `first`, which is told by whoever it is raised to, unless that says the same."""
    told = reason(first) if first else ""
    for said in dict.fromkeys(reason(error) for error in others if error):
        if said != told:
            tell(f"besides, {said}")
