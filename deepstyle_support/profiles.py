"""Colour profiles: pictures as they come are turned into sRGB, and pictures that are written say that they are."""

import io
import struct
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin

SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK", "LAB": "Lab"}  # Pillow's modes, and what ICC calls them
# Adobe RGB (1998): the linear XYZ of its primaries, adapted to D50, and the exponent of its curve.
ADOBE_PRIMARIES = {
    b"r": (0.60974, 0.31111, 0.01947),
    b"g": (0.20528, 0.62567, 0.06087),
    b"b": (0.14919, 0.06322, 0.74457),
}
ADOBE_GAMMA = 563 / 256
D50 = (0.9642, 1.0, 0.8249)


def to_srgb(mode: str, profile: bytes) -> tuple[Callable[[Image.Image], Image.Image], str]:
    """How any part of a picture becomes sRGB (IEC 61966-2-1), and why its ICC profile is of no use, or "".

    mode: the picture's, without transparency: RGB, L, CMYK or LAB; it becomes RGB. A profile of no use changes nothing.
    """
    try:
        embedded = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = embedded.profile.xcolor_space.strip()
        if space != SPACES[mode]:
            return as_it_is, f"it is for {space}, and the picture is {SPACES[mode]}"
        # Relative colorimetric: white stays white, and each colour that sRGB has is met exactly, which is what a
        # photo's colours are for; perceptual would move all of them, in whatever way the profile's maker liked. With
        # black point compensation the black of a scan or of ink, which is a dark grey, becomes black. LittleCMS makes a
        # table of it all; with a fine one no grey is off by more than 1 level, with the usual one dark ones by 1.5.
        transform = ImageCms.buildTransform(
            embedded,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION | ImageCms.Flags.HIGHRESPRECALC,
        )
        return as_it_is if changes_nothing(transform) else transform.apply, ""
    except ImportError:
        return as_it_is, "this Pillow is built without LittleCMS"
    except Exception as error:  # on a damaged profile Pillow raises almost anything
        return as_it_is, f"it is damaged: {error}"


def as_it_is(picture: Image.Image) -> Image.Image:
    """The picture as RGB by its numbers."""
    return picture.convert("RGB")


def adobe_rgb_profile() -> bytes:
    """Adobe RGB (1998) as an ICC profile (ICC.1:2022), by its numbers alone: for pictures that only say its name."""
    curve = struct.pack(">4s4xIH2x", b"curv", 1, round(256 * ADOBE_GAMMA))
    tags = {name + b"TRC": curve for name in ADOBE_PRIMARIES}
    for name, colour in {b"wtpt": D50, **{name + b"XYZ": xyz for name, xyz in ADOBE_PRIMARIES.items()}}.items():
        tags[name] = struct.pack(">4s4x3i", b"XYZ ", *fixed(colour))
    at = 128 + 4 + 12 * len(tags)
    directory = struct.pack(">I", len(tags))
    for name, content in tags.items():
        directory += struct.pack(">4sII", name, at, len(content))
        at += len(content)
    header = struct.pack(">I4xI4s4s4s12x4s28x3i48x", at, 0x04000000, b"mntr", b"RGB ", b"XYZ ", b"acsp", *fixed(D50))
    return header + directory + b"".join(tags.values())


def fixed(numbers: tuple[float, float, float]) -> list[int]:
    """As ICC has numbers: whole 65536ths."""
    return [round(65536 * number) for number in numbers]


def changes_nothing(transform: ImageCms.ImageCmsTransform) -> bool:
    """Whether it is one from sRGB, whatever its profile is called: there are many, all rounded a little differently.

    Tried on 18 levels of each channel, or all of a grey, it moves none by more than 2, which nobody sees.
    """
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(18, -1, 3)
    samples = {"RGB": cube, "L": np.arange(256, dtype=np.uint8)[None]}
    if transform.input_mode not in samples:
        return False
    tried = Image.fromarray(samples[transform.input_mode])
    moved = np.asarray(transform.apply(tried)).astype(int) - np.asarray(tried.convert("RGB"))
    return bool(np.abs(moved).max() <= 2)


def png_tags() -> PngImagePlugin.PngInfo:
    """For a PNG that is written: that its colours are sRGB, as the chunk of 13 bytes that the standard has for it.

    An ICC profile would say the same in some hundred bytes more, and each reader would have to find out that it is
    sRGB's. The intent that the chunk also names is relative colorimetric, 1 (PNG, 3rd edition, 11.3.2.5).
    """
    tags = PngImagePlugin.PngInfo()
    tags.add(b"sRGB", b"\x01")
    return tags


def srgb_profile() -> bytes | None:
    """sRGB as an ICC profile, for what has no better way to say it; None if this Pillow cannot make one."""
    try:
        return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    except ImportError:
        return None
