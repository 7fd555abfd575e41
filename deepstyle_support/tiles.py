"""Tiles: the parts of a picture that are computed one at a time, each with what its features see around it."""

import math
from typing import Any, NamedTuple

import numpy as np

Tensor = Any  # an array, or one of the backend's
Size = tuple[int, int]  # (rows, columns)


class Positions(NamedTuple):
    """Where a tile is at some layer: its own positions, the same counted from its window's first, and the window."""

    interior: tuple[slice, slice]
    within: tuple[slice, slice]
    window: tuple[slice, slice]


class Tile(NamedTuple):
    """A part of the picture that is computed at a time: its own pixels, and with what is around them."""

    interior: tuple[slice, slice]
    window: tuple[slice, slice]

    def of(self, x: Tensor) -> Tensor:
        """The window of x, (H, W, 3): float32 of an array, or of a tensor where that is."""
        return np.float32(x[self.window]) if isinstance(x, np.ndarray) else x[self.window]

    def at(self, stride: int) -> Positions:
        """Where the tile is at a layer of this stride."""

        def positions(part: slice) -> slice:
            return slice(part.start // stride, part.stop // stride)

        (rows, columns), (top, left) = map(positions, self.interior), map(positions, self.window)
        within = (
            slice(rows.start - top.start, rows.stop - top.start),
            slice(columns.start - left.start, columns.stop - left.start),
        )
        return Positions((rows, columns), within, (top, left))

    def mask(self, stride: int) -> np.ndarray:
        """(h, w, 1) float32 over the window: 1 where a position is the tile's own, 0 elsewhere."""
        at = self.at(stride)
        mask = np.zeros([part.stop - part.start for part in at.window] + [1], np.float32)
        mask[at.within] = 1
        return mask


def cut(length: int, tile: int, halo: int) -> list[tuple[slice, slice]]:
    """(own, window) of the tiles along a side: as few as can be with at most `tile` pixels, about equal.

    Own parts start at multiples of 16, where every pooling does. A window reaches `halo` beyond its own part, but not
    beyond the picture's border: padding with zeros is for that border only. So windows of tiles that are larger than
    the halo have at most four lengths, and the backend few shapes to compile.
    """
    own = -(-length // math.ceil(length / (tile // 16 * 16)) // 16) * 16
    parts = [slice(start, min(start + own, length)) for start in range(0, length, own)]
    return [(part, slice(max(0, part.start - halo), min(part.stop + halo, length))) for part in parts]


def tiles_of(size: Size, tile: int, halo: int) -> list[Tile]:
    """The tiles of a picture of (rows, columns), row by row."""
    rows, columns = (cut(length, tile, halo) for length in size)
    return [Tile(*zip(row, column, strict=True)) for row in rows for column in columns]
