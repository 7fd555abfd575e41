"""Reading pictures as they come: from phones, cameras, scanners and the web, as arrays of sRGB."""

import contextlib
import importlib.util
import io
import os
import re
import sys
import warnings
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin, features

from .messages import UserError
from .profiles import to_srgb
from .transparency import laid_on

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


def read_picture(path: str, allow_large: bool = False, as_mask: bool = False) -> tuple[np.ndarray, list[str]]:
    """Any picture Pillow reads, upright, in sRGB: (H, W, 3) uint8 RGB, or (H, W, 4) RGBA if some of it is transparent.

    With it comes what is to be told of it, in words that go behind its name. A mask's values are numbers, not colours:
    they are taken as they are, whatever its colour profile says, and where it is transparent it is white. Of several
    pictures (an animation, pages) the first is taken. Raises UserError if it is missing, cannot be read, is a single
    pixel, is a camera's raw file, needs a package that is not there, or without `allow_large` is over Pillow's limit of
    pixels.
    """
    with opened(path, allow_large) as file:
        count = getattr(file, "n_frames", 1)
        notes = [f"holds {count} pictures; the first is used"] if count > 1 else []
        upright, profile = ImageOps.exif_transpose(file), file.info.get("icc_profile")
        converted, useless = to_rgb(upright, None if as_mask else profile)
        picture = np.asarray(converted)
        picture = laid_on(picture, "white") if as_mask else picture
    if picture.shape[0] * picture.shape[1] == 1:
        raise UserError(f"'{path}' is a single pixel; a picture is needed")
    if useless:
        notes.append(f"has a colour profile that is ignored, {useless}; its colours are taken for sRGB's")
    return picture, notes


def shape_of(path: str, allow_large: bool = False) -> tuple[int, int]:
    """(rows, columns) of what `read_picture` would give, from the file's beginning alone. Raises UserError as there."""
    with opened(path, allow_large) as file:
        lies_down = file.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return file.size if lies_down else file.size[::-1]


@contextlib.contextmanager
def opened(path: str, allow_large: bool) -> Iterator[Image.Image]:
    """The file as Pillow opens it; what goes wrong with it within is a UserError."""
    limit = Image.MAX_IMAGE_PIXELS
    try:
        with seekable(path) as raw, pixel_limit(lifted=allow_large):
            expect_readable(path, raw)
            file = Image.open(raw)
            refuse_previews(path, file)
            yield file
    except UserError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UserError(f"'{path}' has more than Pillow's limit of {limit} pixels; --allow_large lifts it") from error
    except Image.UnidentifiedImageError as error:
        raise UserError(f"'{path}' is no picture that Pillow can read") from error
    except Exception as error:  # on damaged files Pillow's decoders raise almost anything
        raise UserError(f"cannot read the picture '{path}': {getattr(error, 'strerror', None) or error}") from error


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
        with pixel_limit(lifted=True):
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
def pixel_limit(lifted: bool) -> Iterator[None]:
    """Pillow's limit of pixels against decompression bombs: an error within, also where it warns, or lifted."""
    limit = Image.MAX_IMAGE_PIXELS
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if lifted:
                Image.MAX_IMAGE_PIXELS = None  # Pillow has no other way
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def to_rgb(picture: Image.Image, profile: bytes | None) -> tuple[Image.Image, str]:
    """Any of Pillow's modes as 8-bit sRGB, or RGBA if some of it is transparent; and why its profile was of no use.

    Greys of 16, 32 bits or floats are scaled. A palette's colours are taken from it first: a profile is of them.
    """
    if picture.mode.startswith(("I", "F")):
        picture = scaled(picture)
    alpha = None
    if picture.has_transparency_data:
        grey = picture.mode in ("1", "L", "LA", "La")
        picture = picture.convert("LA" if grey else "RGBA")
        alpha, picture = picture.getchannel("A"), picture.convert("L" if grey else "RGB")
    if picture.mode not in ("RGB", "CMYK", "LAB"):
        picture = picture.convert("L" if picture.mode in ("1", "L") else "RGB")
    colours, useless = to_srgb(picture, profile) if profile else (picture.convert("RGB"), "")
    if alpha and alpha.getextrema() != (255, 255):
        colours.putalpha(alpha)
    return colours, useless


def scaled(picture: Image.Image) -> Image.Image:
    """Greys of more than 8 bits, or floats, with 8: Pillow's own conversion clips instead of scaling white to 255.

    White is by the format 1 for floats and 65535 for 16 bits; of 32 bits only what is used.
    """
    grey = np.nan_to_num(np.asarray(picture).astype(np.float64))
    usual = [1, 255, 65535] if picture.mode == "F" else [65535, 2**32 - 1]
    white = next((most for most in usual if grey.max() <= most), grey.max())
    return Image.fromarray(np.clip(np.rint(grey / white * 255), 0, 255).astype(np.uint8))
