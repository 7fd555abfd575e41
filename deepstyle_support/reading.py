"""Reading pictures as they come: from phones, cameras, scanners and the web, as arrays of sRGB."""

import contextlib
import importlib.util
import io
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import Image, ImageFile, PngImagePlugin, PsdImagePlugin, TiffImagePlugin, features

from .bands import bands, cropped
from .messages import UserError, silenced_stderr
from .metadata import MAX_TEXT, orientation_of, read_exif, refuse_confusion, without_metadata
from .profiles import adobe_rgb_profile, as_it_is, to_srgb
from .tones import by_libtiff, is_deep, is_in_planes, levels_of, mend_tiff, more_modes
from .transparency import alpha_of, clear_colour, on_colour

# The brands that a file of ISO base media (ISO 14496-12) names at its beginning.
HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
AVIF_BRANDS = {b"avif", b"avis"}
HEIC_NAMES = (".heic", ".heif", ".hif")
RAW_NAME = re.compile(
    r".*\.(3fr|ari|arw|cr[23w]|dcr|dng|erf|fff|iiq|k25|kdc|mef|mos|mrw|nef|nrw|orf|pef|ra[fw]|rw[2l]|sr[2fw]|x3f)",
    re.IGNORECASE,
)
# Of CRW, RAF, ORF (three), RW2, X3F and MRW.
RAW_BEGINNINGS = (b"II\x1a\0\0\0HEAP", b"FUJIFILM", b"IIRO", b"IIRS", b"MMOR", b"IIU\0", b"FOVb", b"\0MRM")


# What is wrong with the pixels themselves, or too much of them.
REFUSALS = (UserError, Image.DecompressionBombWarning, Image.DecompressionBombError, MemoryError)
PASSED_OVER = "is damaged beside its picture, in metadata or in what follows it; that is ignored"
Taken = TypeVar("Taken")


def read_picture(path: str, allow_large: bool = False, as_mask: bool = False) -> tuple[np.ndarray, list[str]]:
    """Any picture Pillow reads, upright, in sRGB: (H, W, 3) uint8 RGB, or (H, W, 4) RGBA if some of it is transparent.

    With it come notes for the person, each to go behind its name. A mask's values are numbers, not colours:
    they are taken as they are, whatever its colour profile says, and where it is transparent it is white. Of several
    pictures (an animation, pages) the first is taken. Damage beside its pixels, in metadata or further pictures, is
    noted and passed over. Raises UserError if it is missing, cannot be read, is a single pixel, is a camera's raw file,
    needs a package that is not there, or without `allow_large` is over Pillow's limit of pixels.
    """
    (picture, turn, notes), more = taken(path, allow_large, lambda file: decoded(file, as_mask))
    if picture.shape[0] * picture.shape[1] == 1:
        raise UserError(f"'{path}' is a single pixel; a picture is needed")
    if as_mask:
        picture = on_colour(picture, "white")
    elif alpha_of(picture) is None:
        picture = picture[..., :3]
    return turned(picture, turn), notes + more


def shape_of(path: str, allow_large: bool = False) -> tuple[int, int]:
    """(rows, columns) of what `read_picture` would give, from the file's beginning alone. Raises UserError as there."""

    def shape(file: ImageFile.ImageFile) -> tuple[int, int]:
        # Of a TIFF Pillow has turned the size already.
        tags = file.tag_v2 if isinstance(file, TiffImagePlugin.TiffImageFile) else {}
        columns, rows = tags.get(256, file.width), tags.get(257, file.height)
        return (columns, rows) if orientation_of(file) >= 5 else (rows, columns)

    return taken(path, allow_large, shape)[0]


def taken(path: str, allow_large: bool, take: Callable[[ImageFile.ImageFile], Taken]) -> tuple[Taken, list[str]]:
    """What `take` makes of the file as Pillow opens it, or if that fails of what is left without its metadata.

    With it come notes for the person. Raises UserError for all that goes wrong.
    """
    with accessible(path, allow_large) as raw:
        try:
            return take(opened(path, raw, expect_whole_tags=True)), []
        except REFUSALS:
            raise
        except Exception as error:  # on damaged files Pillow's decoders raise almost anything
            failure = error
            traceback.clear_frames(error.__traceback__)  # they hold the picture
        rest = without_metadata(raw)
        if rest is None:
            raise failure
        try:
            with by_libtiff():
                return take(opened(path, rest)), [PASSED_OVER]
        except REFUSALS:
            raise
        except Exception:
            raise failure from None  # of the file as it is


@contextlib.contextmanager
def accessible(path: str, allow_large: bool) -> Iterator[BinaryIO]:
    """The file, to be read by Pillow; what goes wrong with it within is a UserError."""
    limit = Image.MAX_IMAGE_PIXELS
    try:
        with seekable(path) as raw, harmless(lifted=allow_large), more_modes():
            expect_readable(path, raw)
            yield raw
    except UserError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UserError(f"'{path}' has more than Pillow's limit of {limit} pixels; --allow_large lifts it") from error
    except Image.UnidentifiedImageError as error:
        raise UserError(f"'{path}' is no picture that Pillow can read") from error
    except Exception as error:
        raise UserError(f"cannot read the picture '{path}': {getattr(error, 'strerror', None) or error}") from error


def opened(path: str, raw: BinaryIO, expect_whole_tags: bool = False) -> ImageFile.ImageFile:
    """The file as Pillow opens it.

    Raises UserError if it is a camera's raw file, and ValueError if Pillow mixes something up, or, where whole tags are
    expected, has met a damaged one in a TIFF: of those that follow, some of which are used, it reads none.
    """
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        file = Image.open(raw)
        if is_in_planes(file):
            with by_libtiff():
                file = Image.open(raw)
    refuse_previews(path, file)
    refuse_confusion(file)
    damaged = any(not str(warning.message).startswith("Metadata Warning") for warning in warned)
    if expect_whole_tags and damaged and file.format == "TIFF":
        raise ValueError("its tags are damaged")
    return file


def decoded(file: ImageFile.ImageFile, as_mask: bool) -> tuple[np.ndarray, int, list[str]]:
    """The picture, (H, W, 3 or 4) uint8, how it has to be turned, as EXIF counts, and what is to be told of it."""
    notes = mend_tiff(file)
    alpha = clear_colour(file)
    adobe_rgb, of_exif = read_exif(file)
    # libtiff prints on stderr what it thinks of each tag, and Pillow lets it.
    with silenced_stderr() if file.format == "TIFF" else contextlib.nullcontext():
        file.load()
    refuse_confusion(file)  # text may follow the pixels
    levels, of_levels = levels_of(file) if is_deep(file) else (None, [])
    to_colours, of_profile = (as_it_is, []) if as_mask else colours_of(file, bool(levels), adobe_rgb)
    picture = in_bands(file, levels, alpha, to_colours)
    # Those of a TIFF are turned already, and it says so.
    return picture, orientation_of(file), [*of_frames(file), *notes, *of_levels, *of_exif, *of_profile]


def of_frames(file: Image.Image) -> list[str]:
    """What is to be told of a file of several pictures; a PSD's layers are those of one."""
    if isinstance(file, PsdImagePlugin.PsdImageFile):
        return []
    try:
        used, count = file.tell(), getattr(file, "n_frames", 1)
    except Exception:  # whatever the damage is
        return ["is damaged behind its first picture, which is used"]
    which = "first" if used == 0 else "main one"
    return [f"holds {count} pictures; the {which} is used"] if count > 1 else []


@contextlib.contextmanager
def seekable(path: str) -> Iterator[BinaryIO]:
    """The file at path, open; in memory if it is a pipe, whose beginning can be read only once."""
    with open(path, "rb") as file:
        yield file if file.seekable() else io.BytesIO(file.read())


def expect_readable(path: str, file: BinaryIO) -> None:
    """See that Pillow can read the file, as far as its name and its first bytes say what it is.

    Raises UserError if it cannot, with what would help.
    """
    head = file.read(64)
    file.seek(0)
    brands = {head[at : at + 4] for at in range(8, len(head), 4)} if head[4:8] == b"ftyp" else set()
    name = os.path.basename(path)
    canon = head.startswith(b"II*\0") and head[8:10] == b"CR"
    if RAW_NAME.fullmatch(name) or head.startswith(RAW_BEGINNINGS) or canon or b"crx " in brands:
        raise raw_file(path)
    if brands & AVIF_BRANDS:
        if not features.check("avif"):
            needs = f"'{sys.executable} -m pip install --upgrade pillow' brings one that does"
            raise UserError(f"'{path}' is an AVIF picture, which this Pillow does not read; {needs}")
    elif brands & HEIC_BRANDS or (name.lower().endswith(HEIC_NAMES) and not is_known(file)):
        if not importlib.util.find_spec("pillow_heif"):
            needs = f"'{sys.executable} -m pip install pillow-heif' brings it"
            raise UserError(f"'{path}' is a HEIC picture, which needs the package pillow-heif; {needs}")
        import pillow_heif

        pillow_heif.register_heif_opener()  # a second time changes nothing


def is_known(file: BinaryIO) -> bool:
    """Whether it is of a format that Pillow itself knows, whatever its name is: there are JPEGs that end in .heic."""
    try:
        with harmless(lifted=True):
            Image.open(file)
        return True
    except Image.UnidentifiedImageError:
        return False
    finally:
        file.seek(0)


def refuse_previews(path: str, file: Image.Image) -> None:
    """Raise UserError for a camera's raw file under the name of a TIFF: Pillow would read its small preview.

    Its first picture says that it is a reduced one, with the full one in a sub-file (tags 254 and 330 of TIFF 6.0 and
    its supplement 1), or it has DNG's version (tag 50706).
    """
    tags = file.tag_v2 if isinstance(file, TiffImagePlugin.TiffImageFile) else {}
    if 50706 in tags or (330 in tags and int(tags.get(254, 0)) & 1):
        raise raw_file(path)


def raw_file(path: str) -> UserError:
    programs = "the camera's own program, darktable or RawTherapee"
    return UserError(
        f"'{path}' is a camera's raw file: develop it with {programs}, and give the TIFF or JPEG from there"
    )


@contextlib.contextmanager
def harmless(lifted: bool) -> Iterator[None]:
    """Within, Pillow is quiet, and neither pixels nor text of a file fill the memory.

    Its limit of pixels against decompression bombs is an error also where it warns, or lifted; its limit of text in a
    PNG, which is less than some profiles have, is 16 MB.
    """
    limits, log = (Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK), logging.getLogger("PIL")
    level = log.level
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            log.setLevel(logging.CRITICAL)
            PngImagePlugin.MAX_TEXT_CHUNK = MAX_TEXT  # Pillow has no other way, neither here
            if lifted:
                Image.MAX_IMAGE_PIXELS = None  # nor here
            yield
    finally:
        Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = limits
        log.setLevel(level)


def in_bands(
    file: Image.Image,
    levels: Callable[[Image.Image], np.ndarray] | None,
    alpha: Callable[[np.ndarray, slice], np.ndarray] | None,
    to_colours: Callable[[Image.Image], Image.Image],
) -> np.ndarray:
    """Any of Pillow's modes as 8-bit sRGB, (H, W, 3), or RGBA, (H, W, 4), if some of it may be transparent.

    levels: how a band of deep greys becomes one of 8 bits; alpha: what of a band is opaque, if Pillow does not know;
    to_colours: how a band's colours become sRGB.
    """
    # A part is asked, since of an icon's palette Pillow itself knows nothing (ICNS), and fails.
    clear = alpha is not None or cropped(file, slice(0, 1)).has_transparency_data
    picture = np.empty((file.height, file.width, 4 if clear else 3), np.uint8)
    for rows in bands(file.height, file.width):
        band = cropped(file, rows)
        own_alpha: np.ndarray | int = 255
        colours = Image.fromarray(levels(band)) if levels else band
        if colours.has_transparency_data:
            colours = colours.convert("LA" if is_grey(file) else "RGBA")
            own_alpha = np.asarray(colours.getchannel("A"))
        if colours.mode not in ("CMYK", "LAB"):  # a palette's colours are taken first: a profile is of them
            colours = colours.convert("L" if levels or is_grey(file) else "RGB")
        picture[rows, :, :3] = np.asarray(to_colours(colours))
        if clear:
            picture[rows, :, 3] = own_alpha if alpha is None else alpha(np.asarray(band), rows)
    return picture


def is_grey(file: Image.Image) -> bool:
    """Whether its greys are of 8 bits at most, and no colours."""
    return file.mode in ("1", "L", "LA", "La")


def colours_of(
    file: Image.Image, deep: bool, adobe_rgb: bool
) -> tuple[Callable[[Image.Image], Image.Image], list[str]]:
    """How its colours become sRGB by its profile, or by what a camera says instead, and what is to be told of that."""
    profile = file.info.get("icc_profile")
    mode = file.mode if file.mode in ("CMYK", "LAB") else "L" if deep or is_grey(file) else "RGB"
    if adobe_rgb and not profile and "srgb" not in file.info and mode == "RGB":
        profile = adobe_rgb_profile()
    if profile is None and "icc_profile" not in file.info:
        return as_it_is, []
    to_colours, useless = to_srgb(mode, profile) if profile else (as_it_is, "it is damaged")
    ignored = f"has a colour profile that is ignored, {useless}; its colours are taken for sRGB's"
    return to_colours, [ignored] if useless else []


def turned(picture: np.ndarray, orientation: int) -> np.ndarray:
    """The picture upright; orientation: from 1, as it is, to 8, as EXIF counts."""
    if orientation >= 5:
        picture = picture.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        picture = picture[::-1]
    if orientation in (2, 3, 6, 7):
        picture = picture[:, ::-1]
    return np.ascontiguousarray(picture)
