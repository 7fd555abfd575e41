"""What painting hands to whoever shows or saves it: small records, no behaviour."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .lbfgs import Curvature


@dataclasses.dataclass(frozen=True)
class State:
    """What a run needs to go on after an iteration."""

    x: np.ndarray  # (H, W, 3) float in input space, of the size that is painted: a coarse one, or the picture's
    losses: np.ndarray  # (iterations + 1, 4): the loss and its three parts, at the start and after each iteration
    shaped_by: dict[str, str]  # all that decides the pictures, in words
    evaluations: int  # at this size
    partial: bool  # whether it is within an iteration, not at the end of one
    way: str = ""  # how all was computed until here; nothing if in several ways, or if something learnt was forgotten
    learnt: Callable[[], Curvature | None] = lambda: None  # what the optimiser knows here; while it is here, or read

    @property
    def iteration(self) -> int:
        """The iterations that are finished at this size."""
        return len(self.losses) - 1

    @property
    def size(self) -> tuple[int, int]:
        return self.x.shape[0], self.x.shape[1]


class Iteration(NamedTuple):
    """What one iteration, or a part of it, brought. The three losses, weighted, add up to `loss`, as do its parts."""

    number: int
    picture: np.ndarray  # (H, W, 3) uint8 RGB, of the size of the last one; RGBA if the content has alpha
    own_size: np.ndarray  # the same, but at a coarse size of that size
    loss: float
    content_loss: float
    style_loss: float
    total_variation_loss: float
    improvement: float  # percent of the loss before; for the first, of the start picture's
    seconds: float
    evaluations: int  # at this size, in all
    parts: dict[str, float]  # the loss at each layer, by name
    exact: bool  # whether the same command makes the same picture
    coarse: bool  # whether it is of a size before the picture's own; the picture is enlarged
    state: State  # to go on from


class Ending(NamedTuple):
    """How the run of one photo ended."""

    status: int  # the command's
    painted: bool  # or all was done before
    loss: float | None = None  # the latest
    picture: Path | None = None  # the last that is saved
