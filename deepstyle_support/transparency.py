"""Transparent pictures: (H, W, 4) uint8, RGB and alpha, 255 where it is opaque. The network gets RGB without holes."""

import numpy as np
from PIL import Image


def alpha_of(picture: np.ndarray) -> np.ndarray | None:
    """How opaque each pixel is, (H, W) uint8; None if all are, or the picture, (H, W, 3), has no alpha."""
    alpha = picture[..., 3] if picture.shape[2:] == (4,) else None
    return None if alpha is None or alpha.min() == 255 else alpha


def filled(picture: np.ndarray) -> np.ndarray:
    """The picture with its own colours continued to where it is transparent: (H, W, 3) uint8 RGB.

    What a file has beneath its transparency is anything, mostly black, and white would be as foreign: the network would
    see an outline that is not the picture's, and what it sees reaches far into the opaque part. So each pixel is laid
    on the mean of the opaque ones nearby, or of those farther away if there is none (the pull-push of Gortler,
    Grzeszczuk, Szeliski & Cohen, The Lumigraph, 1996). A half transparent edge keeps its colour as far as it is opaque.
    """
    if alpha_of(picture) is None:
        return picture[..., :3]
    return np.asarray(laid_on_itself(Image.fromarray(picture)).convert("RGB"))


def laid_on_itself(picture: Image.Image) -> Image.Image:
    """An RGBA picture laid on a copy of half its size, which is laid on one of a quarter, and so on."""
    if picture.getchannel("A").getextrema()[0] == 255 or picture.size == (1, 1):
        return picture
    smaller = picture.reduce(2)  # Pillow lets each pixel's colour count as much as it is opaque
    # One opaque pixel of four is enough: else what is small would fade before it has reached far.
    smaller.putalpha(smaller.getchannel("A").point(lambda alpha: min(255, 4 * alpha)))
    beneath = laid_on_itself(smaller).resize(picture.size, Image.Resampling.BILINEAR)
    beneath.putalpha(255)
    return Image.alpha_composite(beneath, picture)


def laid_on(picture: np.ndarray, colour: str | None) -> np.ndarray:
    """The picture on a colour that Pillow's ImageColor knows, (H, W, 3); as it is without a colour or alpha."""
    if colour is None or picture.shape[2:] != (4,):
        return picture
    clear = Image.fromarray(picture)
    return np.asarray(Image.alpha_composite(Image.new("RGBA", clear.size, colour), clear).convert("RGB"))


def with_alpha_of(content: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """The picture, (H, W, 3), with the content's alpha, resized to it: (H, W, 4); as it is if the content is opaque."""
    alpha = alpha_of(content)
    if alpha is None:
        return picture
    size = picture.shape[1], picture.shape[0]
    return np.dstack([picture, np.asarray(Image.fromarray(alpha).resize(size, Image.Resampling.BILINEAR))])
