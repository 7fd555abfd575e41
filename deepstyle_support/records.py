"""What painting hands to whoever shows or saves it: small records, no behaviour."""

import dataclasses
from typing import NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True)
class State:
    """What a run needs to go on after an iteration."""

    x: np.ndarray  # (H, W, 3) float32 in input space
    losses: np.ndarray  # (iterations + 1, 4): the loss and its three parts, at the start and after each iteration
    shaped_by: dict[str, str]  # all that decides the pictures, in words

    @property
    def iteration(self) -> int:
        return len(self.losses) - 1


class Iteration(NamedTuple):
    """What one iteration brought. The three losses are weighted and add up to `loss`, as do its parts."""

    number: int
    picture: np.ndarray  # (H, W, 3) uint8 RGB
    loss: float
    content_loss: float
    style_loss: float
    total_variation_loss: float
    improvement: float  # percent of the loss before; for the first, of the start picture's
    seconds: float
    evaluations: int  # since the start, or the resumption, at this size
    parts: dict[str, float]  # the loss at each layer, by name
    exact: bool  # whether the same command makes the same picture
    state: State  # to go on from
