"""Masks: pictures, white where something holds, and what of them there is at each layer."""

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from .images import resize
from .messages import UserError
from .transparency import alpha_of
from .vgg import stride

Size = tuple[int, int]  # (rows, columns)


class Place(NamedTuple):
    """Where a loss looks; losses at the same place share what is computed there."""

    layer: str  # or "picture"
    mask: str = ""  # its name: "content", "style", or "style 2" of several


def whitened(mask: Any) -> Any:
    """A mask of bool as uint8, 255 where it is true; any other as it is."""
    return mask * np.uint8(255) if isinstance(mask, np.ndarray) and mask.dtype == bool else mask


def shows(mask: np.ndarray) -> bool:
    """Whether some of a mask, (H, W) or (H, W, 3) uint8, is not black as a grey."""
    return Image.fromarray(mask).convert("L").getbbox() is not None


def mask_on_grid(mask: np.ndarray | Collection[np.ndarray], size: tuple[int, int], stride: int = 1) -> np.ndarray:
    """mask: (H, W) or (H, W, 3) uint8 -> (h, w, 1) float32 in 0..1: its mean over each position of a layer.

    Several masks, of any sizes, are multiplied. size: (rows, columns) of the generated picture, stride: its pixels from
    one position to the next.
    """
    values, *others = (
        np.asarray(Image.fromarray(one).convert("L").convert("F").resize(size[::-1], Image.Resampling.BOX))
        for one in ([mask] if isinstance(mask, np.ndarray) else mask)
    )
    for other in others:
        values = values * (other / 255)
    rows, columns = (length // stride for length in size)  # pooling leaves out what remains
    blocks = values[: rows * stride, : columns * stride].reshape(rows, stride, columns, stride, 1)
    return blocks.mean((1, 3)) / 255


def masks_at_places(
    places: Iterable[Place], masks: dict[str, dict[str, np.ndarray]], size: Size
) -> dict[Place, np.ndarray]:
    """(h, w, 1) float32 for each place with a mask. A style's has a mean of 1, so a small part gets all of it.

    masks: from Pictures.masks, for a picture of (rows, columns). Raises UserError if nothing of a mask is left at a
    place.
    """
    found = {}
    for place in dict.fromkeys(places):
        if place.mask in masks:
            named = masks[place.mask]
            mask = mask_on_grid(named.values(), size, stride(place.layer))
            if not mask.any():
                what = " times the ".join(named)
                raise UserError(f"the {what} is all black at {place.layer}; it must be white somewhere")
            found[place] = mask if place.mask == "content" else mask / mask.mean()
    return found


def opaque_at_places(style: np.ndarray, size: Size, places: Iterable[Place]) -> dict[Place, np.ndarray]:
    """`masks_at_places` for a style shown as (rows, columns): how opaque it is there. Empty if it is opaque everywhere.

    So its Gram matrix is that of a whole picture like its opaque part.
    """
    alpha = alpha_of(style)
    alphas = {} if alpha is None else {"style": {"style's alpha": resize(alpha, size)}}
    return masks_at_places(places, alphas, size)
