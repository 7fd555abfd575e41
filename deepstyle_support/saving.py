"""Saving and showing what painting hands over; however that ends, why it ended is what is told."""

import contextlib
from collections.abc import Callable, Generator
from pathlib import Path

from .files import Outputs
from .messages import reason, tell, told_besides
from .records import Iteration
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
    last = None
    try:
        with contextlib.closing(iterations):
            for last in iterations:
                total = totals[last.state.size]
                path = save(last, iterations, outputs, last.number == total)
                show(describe_iteration(last, total, path))
    except BaseException:
        with told_besides():
            outputs.finish()
        raise
    with told_besides() if stopped() else contextlib.nullcontext():
        for path in outputs.finish():
            show(f"saved {path}")
    return last


def save(
    iteration: Iteration, iterations: Generator[Iteration, None, None], outputs: Outputs, last: bool
) -> Path | None:
    """Save one of the iterations; returns its picture's path. `last`: of those at its size.

    If it is a part of one because an evaluation failed, and cannot be saved either, that evaluation's error is raised.
    """
    try:
        return outputs.save(iteration, last)
    except Exception as error:
        try:
            iterations.close()
        except BaseException:
            tell(f"besides, {reason(error)}")
            raise
        raise
