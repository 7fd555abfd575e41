"""Transparent pictures: (H, W, 4) uint8, RGB and alpha, 255 where it is opaque. The network gets RGB without holes."""

from collections.abc import Callable
from typing import IO, cast

import numpy as np
from PIL import Image, ImageFile

from .bands import bands, cropped
from .tones import decoded_as

OPAQUE_BUT = {"L;2": 2, "L;4": 4, "L": 8, "RGB": 8}  # bits of a PNG's greys and colours, by what Pillow calls them


def alpha_of(picture: np.ndarray) -> np.ndarray | None:
    """How opaque each pixel is, (H, W) uint8; None if all are, or the picture, (H, W, 3), has no alpha."""
    alpha = picture[..., 3] if picture.shape[2:] == (4,) else None
    return None if alpha is None or alpha.min() == 255 else alpha


def clear_colour(file: ImageFile.ImageFile) -> Callable[[np.ndarray, slice], np.ndarray] | None:
    """Of a PNG before its pixels are read: where it has the one colour that its tRNS chunk calls transparent.

    Pillow knows such a colour of 8 bits, and only if what is said of it is put right: it is told in the numbers of the
    file, and Pillow makes greys of 2 and 4 bits brighter. Of 16 bits it keeps it to itself, and of RGB half the bits.
    Returns a function of a band as Pillow has read it, and its rows, to its alpha, (H, W) uint8; or None if Pillow
    knows.
    """
    colour = file.info.get("transparency")
    if file.format != "PNG" or not isinstance(colour, int | tuple) or not file.tile or file.mode == "P":
        return None
    rawmode = file.tile[0][3]
    if rawmode in OPAQUE_BUT:
        most = 2 ** OPAQUE_BUT[rawmode] - 1  # bits beyond do not count
        eight = (np.atleast_1d(colour) & most) * (255 // most)
        file.info["transparency"] = tuple(eight.tolist()) if isinstance(colour, tuple) else int(eight[0])
    # Of 1 bit only later versions of Pillow make use of it.
    if isinstance(colour, int) and (file.mode.startswith("I") or file.mode == "1"):
        del file.info["transparency"]
        return lambda band, rows: alpha_where(band == (colour & 1 if file.mode == "1" else colour))
    if rawmode != "RGB;16B":
        return None
    del file.info["transparency"]
    low = low_bytes(file)
    high_colour, low_colour = np.asarray(colour) >> 8, np.asarray(colour) & 255

    def alpha(band: np.ndarray, rows: slice) -> np.ndarray:
        same_low = np.asarray(cropped(low, rows)) == low_colour
        return alpha_where(((band == high_colour) & same_low).all(axis=-1))

    return alpha


def alpha_where(clear: np.ndarray) -> np.ndarray:
    """Alpha that is 0 where something holds, and else 255."""
    return np.where(clear, 0, 255).astype(np.uint8)


def low_bytes(file: ImageFile.ImageFile) -> Image.Image:
    """Of a PNG with 16 bits for each of RGB the lower 8; Pillow gives the higher ones."""
    low = Image.open(cast(IO[bytes], file.fp))
    low.tile = [decoded_as(tile, "RGB;16L") for tile in low.tile]  # of the other order of bytes these are first
    low.load()
    return low


def filled(picture: np.ndarray) -> np.ndarray:
    """The picture with its own colours continued to where it is transparent: (H, W, 3) uint8 RGB.

    What a file has beneath its transparency is anything, mostly black, and white would be as foreign: the network would
    see an outline that is not the picture's, and what it sees reaches far into the opaque part. So each pixel is laid
    on the mean of the opaque ones nearby, or of those farther away if there is none (the pull-push of Gortler,
    Grzeszczuk, Szeliski & Cohen, The Lumigraph, 1996). A half transparent edge keeps its colour as far as it is opaque.
    """
    if alpha_of(picture) is None:
        return picture[..., :3]
    opaque, continued = over_itself(Image.fromarray(picture)), np.empty((*picture.shape[:2], 3), np.uint8)
    for rows in bands(*picture.shape[:2]):
        continued[rows] = cropped(opaque, rows).convert("RGB")
    return continued


def over_itself(picture: Image.Image) -> Image.Image:
    """An RGBA picture laid on a copy of half its size, which is laid on one of a quarter, and so on."""
    if picture.getchannel("A").getextrema()[0] == 255 or picture.size == (1, 1):
        return picture
    smaller = picture.reduce(2)  # Pillow lets each pixel's colour count as much as it is opaque
    # One opaque pixel of four is enough: else what is small would fade before it has reached far.
    smaller.putalpha(smaller.getchannel("A").point(lambda alpha: min(255, 4 * alpha)))
    beneath = over_itself(smaller).resize(picture.size, Image.Resampling.BILINEAR)
    beneath.putalpha(255)
    return Image.alpha_composite(beneath, picture)


def on_colour(picture: np.ndarray, colour: str | None) -> np.ndarray:
    """The picture on a colour that Pillow's ImageColor knows, (H, W, 3); as it is without a colour or alpha."""
    if colour is None or picture.shape[2:] != (4,):
        return picture
    result = np.empty((*picture.shape[:2], 3), np.uint8)
    for rows in bands(*picture.shape[:2]):
        clear = Image.fromarray(picture[rows])
        result[rows] = Image.alpha_composite(Image.new("RGBA", clear.size, colour), clear).convert("RGB")
    return result


def with_alpha_of(content: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """The picture, (H, W, 3), with the content's alpha, resized to it: (H, W, 4); as it is if the content is opaque."""
    alpha = alpha_of(content)
    if alpha is None:
        return picture
    size = picture.shape[1], picture.shape[0]
    return np.dstack([picture, np.asarray(Image.fromarray(alpha).resize(size, Image.Resampling.BILINEAR))])
