"""Greys of other kinds than 8 bits, by what the file says of its numbers: which is black, and which is white.

Pillow gives them as they are: integers of 16 or 32 bits, or floats. What they mean is in a TIFF's tags.
"""

import contextlib
import numbers
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import numpy as np
from PIL import Image, ImagePalette, TiffImagePlugin

from .bands import bands, cropped

# Tags of TIFF 6.0.
BITS, PHOTOMETRIC, COMPRESSION, COLOR_MAP, SAMPLE_FORMAT, SMALLEST, LARGEST = 258, 262, 259, 320, 339, 340, 341
WHITE_IS_ZERO = 0
UNSIGNED, SIGNED, FLOATS = 1, 2, 3
PLANES = 284
FAX = (2, 3, 4, 32771)  # compressions of black on white

# Greys that Pillow's decoders know, and its table of what a TIFF can hold does not: WhiteIsZero, which is turned here,
# and unsigned numbers of 32 bits or of 12 in the other order of bytes.
LITTLE, BIG = TiffImagePlugin.II, TiffImagePlugin.MM
MORE_MODES: dict[Any, tuple[str, str]] = {
    (BIG, 0, (UNSIGNED,), 1, (16,), ()): ("I;16B", "I;16B"),
    (LITTLE, 0, (SIGNED,), 1, (16,), ()): ("I", "I;16S"),
    (BIG, 0, (SIGNED,), 1, (16,), ()): ("I", "I;16BS"),
    (BIG, 1, (SIGNED,), 1, (8,), ()): ("L", "L"),
    (LITTLE, 0, (SIGNED,), 1, (8,), ()): ("L", "L;I"),
    (BIG, 0, (SIGNED,), 1, (8,), ()): ("L", "L;I"),
    (BIG, 1, (UNSIGNED,), 1, (12,), ()): ("I;16", "I;12"),
    (LITTLE, 0, (UNSIGNED,), 1, (12,), ()): ("I;16", "I;12"),
    (BIG, 0, (UNSIGNED,), 1, (12,), ()): ("I;16", "I;12"),
    (BIG, 1, (UNSIGNED,), 1, (32,), ()): ("I", "I;32BS"),
    (LITTLE, 0, (UNSIGNED,), 1, (32,), ()): ("I", "I;32S"),
    (BIG, 0, (UNSIGNED,), 1, (32,), ()): ("I", "I;32BS"),
    (LITTLE, 0, (SIGNED,), 1, (32,), ()): ("I", "I;32S"),
    (BIG, 0, (SIGNED,), 1, (32,), ()): ("I", "I;32BS"),
}


class Numbers(NamedTuple):
    """What a grey picture's numbers are."""

    kind: np.dtype
    black: float | None = None  # None: not said
    white: float | None = None
    white_is_zero: bool = False


@contextlib.contextmanager
def more_modes() -> Iterator[None]:
    """Within, Pillow opens greys in TIFFs that it could decode, and does not know by its table."""
    added = {key: mode for key, mode in MORE_MODES.items() if key not in TiffImagePlugin.OPEN_INFO}
    TiffImagePlugin.OPEN_INFO.update(added)  # Pillow has no other way
    try:
        yield
    finally:
        for key in added:
            TiffImagePlugin.OPEN_INFO.pop(key, None)


@contextlib.contextmanager
def by_libtiff() -> Iterator[None]:
    """Within, Pillow lets libtiff read uncompressed TIFFs as well, not only compressed ones."""
    before, TiffImagePlugin.READ_LIBTIFF = TiffImagePlugin.READ_LIBTIFF, True
    try:
        yield
    finally:
        TiffImagePlugin.READ_LIBTIFF = before


def mend_tiff(file: Image.Image) -> list[str]:
    """Before its pixels are read: let Pillow's decoder take a TIFF's numbers for what they are.

    Returns notes for the person.
    """
    if not isinstance(file, TiffImagePlugin.TiffImageFile):
        return []
    notes, changed = mend_palette(file), {}
    if (
        file.tile and file.tile[0][0] == "libtiff"
    ):  # which gives them in this machine's order of bytes, and Pillow swaps them again
        changed = {"I;16BS": "I;16NS", "I;32BS": "I;32NS", "F;32BF": "F;32NF"}
    if PHOTOMETRIC not in file.tag_v2 and file.tag_v2.get(COMPRESSION) not in FAX and file.mode in ("1", "L"):
        changed |= {f"{mode}I{order}": mode + order for mode in ("1;", "L;2", "L;4", "L;") for order in ("", "R")}
        changed |= {"1;I": "1", "L;I": "L"}
    if PHOTOMETRIC not in file.tag_v2:
        notes.append("does not say whether 0 is black; it is taken as is usual")
    tiles = []
    for tile in file.tile:
        rawmode, *rest = cast(tuple, tile[3])
        tiles.append(decoded_as(tile, (changed.get(rawmode, rawmode), *rest)))
    file.tile = tiles
    return notes


def decoded_as(tile: Any, arguments: Any) -> Any:
    """A tile of a file that Pillow has opened, with other arguments for its decoder."""
    # A named tuple since Pillow 11, before a plain one.
    return tile._replace(args=arguments) if hasattr(tile, "_replace") else (*tile[:3], arguments)


def mend_palette(file: TiffImagePlugin.TiffImageFile) -> list[str]:
    """A TIFF's palette counts to 65535, but that of some programs to 255. Returns notes for the person."""
    numbers = file.tag_v2.get(COLOR_MAP, ())
    if file.mode not in ("P", "PA") or not 0 < max(numbers, default=0) < 256:
        return []
    file.palette = ImagePalette.raw("RGB;L", bytes(numbers))
    return ["has a palette that counts to 255 instead of 65535, and is taken so"]


def is_in_planes(file: Image.Image) -> bool:
    """Whether it is a TIFF with one channel after the other: Pillow's own reader takes each for 8 bits."""
    return isinstance(file, TiffImagePlugin.TiffImageFile) and file.tag_v2.get(PLANES) == 2


def is_deep(file: Image.Image) -> bool:
    """Whether its numbers are no greys of 8 bits as Pillow has them."""
    return file.mode.startswith(("I", "F")) or numbers_of(file).kind == np.int8


def numbers_of(file: Image.Image) -> Numbers:
    """What is said of the numbers of a grey picture by its tags if it is a TIFF, or else by its format.

    Integers go from black to white by all that they have bits for, floats, by custom, from 0 to 1, unless a TIFF says
    otherwise (SMinSampleValue and SMaxSampleValue).
    """
    if not isinstance(file, TiffImagePlugin.TiffImageFile):
        kind = np.dtype({"F": np.float32, "I": np.int32}.get(file.mode, np.uint16))
        of_16_bits = kind == np.uint16 or (kind == np.int32 and file.format in ("PNG", "PPM"))
        return Numbers(kind, 0, 65535) if of_16_bits else Numbers(kind)
    bits, sample_format = number_in(file, BITS) or 1, number_in(file, SAMPLE_FORMAT) or UNSIGNED
    kinds = {FLOATS: "f4", SIGNED: f"i{max(1, int(bits) // 8)}"}
    kind = np.dtype(kinds.get(int(sample_format), "u4" if bits == 32 else "u2"))
    black, white = number_in(file, SMALLEST), number_in(file, LARGEST)
    if kind.kind == "u":
        black = black or 0
        white = 2**bits - 1 if white is None and bits < 32 else white
    if black is None or white is None or not black < white:
        black, white = None, None
    # Pillow itself turns those of 8 bits and less.
    white_is_zero = file.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO and file.mode.startswith(("I", "F"))
    return Numbers(kind, black, white, white_is_zero)


def number_in(file: TiffImagePlugin.TiffImageFile, tag: int) -> float | None:
    """The tag's value, or the first of several; None if it is no number."""
    value = file.tag_v2.get(tag)
    value = value[0] if isinstance(value, tuple) and value else value
    return float(value) if isinstance(value, numbers.Real) else None


def levels_of(file: Image.Image) -> tuple[Callable[[Image.Image], np.ndarray], list[str]]:
    """How a band of a deep grey picture becomes (H, W) uint8 from black to white, and what is to be told of it."""
    kind, black, white, white_is_zero = numbers_of(file)
    notes = []
    if black is None or white is None:
        low, high, bright = extremes(file, kind)
        black, white = likely_range(kind, low, high, bright)
        usual = (0, 1) if kind.kind == "f" else (0, np.iinfo(kind).max)
        if (black, white) != usual or low < black or high > white or kind.kind == "i":
            notes.append(f"has numbers from {low:g} to {high:g}; {black:g} is taken for black, {white:g} for white")

    def levels(band: Image.Image) -> np.ndarray:
        values = values_of(band, kind).astype(np.float64)
        values -= black
        values *= 255 / (white - black)
        np.clip(np.rint(np.nan_to_num(values, copy=False, nan=0, posinf=255, neginf=0), out=values), 0, 255, out=values)
        grey = values.astype(np.uint8)
        return 255 - grey if white_is_zero else grey

    return levels, notes


def values_of(band: Image.Image, kind: np.dtype) -> np.ndarray:
    """A band's numbers: Pillow knows neither unsigned ones of 32 bits nor signed ones of 8."""
    values = np.asarray(band)
    return values.view(kind) if kind in (np.uint32, np.int8) else values


def extremes(file: Image.Image, kind: np.dtype) -> tuple[float, float, float]:
    """The smallest and the largest of its finite numbers, and the largest but for one of a thousand."""
    step = max(1, file.width * file.height // 2**20)
    low, high, some = np.inf, -np.inf, []
    for rows in bands(file.height, file.width):
        values = values_of(cropped(file, rows), kind)
        values = values[np.isfinite(values)]
        if values.size:
            low, high = min(low, float(values.min())), max(high, float(values.max()))
            some.append(values[::step])
    return (low, high, float(np.percentile(np.concatenate(some), 99.9))) if some else (0.0, 0.0, 0.0)


def likely_range(kind: np.dtype, low: float, high: float, bright: float) -> tuple[float, float]:
    """What is black and what white where the file does not say: all that its kind of number has, if that is used.

    low, high: the smallest and the largest number; bright: the largest but for a few. Some programs write the numbers
    of another kind into 32 bits or floats. Far below the usual whites it is what is used, or all would be nearly black.
    """
    beyond = 1.0
    if kind.kind == "f":  # what goes beyond white by a little, or at a few places, is clipped
        usual, high, beyond = [1.0, 255.0, 65535.0], bright, 1.1
    elif kind.kind == "u":
        usual = [255.0, 65535.0, 2.0**32 - 1]
    else:
        limits = np.iinfo(kind)
        if low < 0:
            widely = high - low > (limits.max - limits.min) / 16 or high == low
            return (limits.min, limits.max) if widely else (low, high)
        usual = [255.0, 32767.0, 65535.0, limits.max] if kind.itemsize == 4 else [limits.max]
    white = next((most for most in usual if high <= beyond * most), high)
    return 0.0, white if white == usual[0] or high >= white / 16 else high
