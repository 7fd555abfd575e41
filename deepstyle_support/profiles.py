"""Colour profiles: pictures as they come are turned into sRGB, and pictures that are written say that they are."""

import io

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin

SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK", "LAB": "Lab"}  # Pillow's modes, and what ICC calls them


def to_srgb(picture: Image.Image, profile: bytes) -> tuple[Image.Image, str]:
    """A picture without transparency as sRGB (IEC 61966-2-1), and why its ICC profile was of no use, or "".

    picture: RGB, L, CMYK or LAB -> RGB. A profile of no use changes nothing.
    """
    try:
        embedded = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = embedded.profile.xcolor_space.strip()
        if space != SPACES[picture.mode]:
            return picture.convert("RGB"), f"it is for {space}, and the picture is {SPACES[picture.mode]}"
        # Relative colorimetric: white stays white, and each colour that sRGB has is met exactly, which is what a
        # photo's colours are for; perceptual would move all of them, in whatever way the profile's maker liked. With
        # black point compensation the black of a scan or of ink, which is a dark grey, becomes black. LittleCMS makes a
        # table of it all; with a fine one no grey is off by more than 1 level, with the usual one dark ones by 1.5.
        transform = ImageCms.buildTransform(
            embedded,
            ImageCms.createProfile("sRGB"),
            picture.mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION | ImageCms.Flags.HIGHRESPRECALC,
        )
        return picture.convert("RGB") if changes_nothing(transform) else transform.apply(picture), ""
    except ImportError:
        return picture.convert("RGB"), "this Pillow is built without LittleCMS"
    except Exception as error:  # on a damaged profile Pillow raises almost anything
        return picture.convert("RGB"), f"it is damaged: {error}"


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
