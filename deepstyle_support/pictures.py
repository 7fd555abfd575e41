"""The pictures that a run works on, checked together."""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Collection, Iterable
from typing import Any

import numpy as np

from .bands import bands
from .colours import with_colours_of
from .images import from_input_space, resize
from .masks import mask_on_grid, shows, whitened
from .memory import MIN_SIDE
from .messages import UserError, require_choice
from .reading import read_picture
from .settings import Settings
from .transparency import alpha_of, filled, on_colour, with_alpha_of


@dataclasses.dataclass(frozen=True)
class Pictures:
    """What a run works on, each (H, W, 3) uint8 RGB of any size. Masks are white where something holds.

    What is no mask may be (H, W, 4), with alpha; a mask may be (H, W), and bool, which is kept as 0 and 255. Raises
    UserError for what is no such array or a single pixel, for what is all black or all transparent, and unless there
    is a style, and as many style masks as styles, or none.
    """

    content: np.ndarray
    styles: tuple[np.ndarray, ...]
    style_masks: tuple[np.ndarray, ...] = ()
    content_mask: np.ndarray | None = None
    color_mask: np.ndarray | None = None
    start: np.ndarray | None = None  # if neither the content nor noise

    def __post_init__(self) -> None:
        put = functools.partial(object.__setattr__, self)  # a frozen dataclass has no other way
        put("style_masks", tuple(map(whitened, self.style_masks)))
        put("content_mask", whitened(self.content_mask))
        put("color_mask", whitened(self.color_mask))
        for name, picture in self.named().items():
            check_array(name, picture)
            if (alpha := alpha_of(picture)) is not None and not alpha.any():
                raise UserError(f"the {name} picture is all transparent; --background COLOUR lays it on a colour")
            if "mask" in name and not any(shows(picture[rows]) for rows in bands(*picture.shape[:2])):
                raise UserError(f"the {name} is all black, so nothing is left; it must be white where something holds")
        if not self.styles:
            raise UserError("there is no style picture; give one or more")
        if len(self.style_masks) not in (0, len(self.styles)):
            raise UserError(
                f"there are {len(self.style_masks)} style masks for {len(self.styles)} styles; give one for each"
            )

    def named(self) -> dict[str, np.ndarray]:
        """Each picture that there is, by its name in words."""
        named: dict[str, np.ndarray | None] = {"content": self.content, "content mask": self.content_mask}
        named |= {"color mask": self.color_mask, "start": self.start}
        there = {name: picture for name, picture in named.items() if picture is not None}
        return there | numbered("style", self.styles) | numbered("style mask", self.style_masks)

    def masks(self, size: tuple[int, int]) -> dict[str, dict[str, np.ndarray]]:
        """What limits each kind of loss, "content", "style", or "style 2" of several: masks by name, to be multiplied.

        Where the content is transparent none of them counts: its alpha, as it is at (rows, columns), limits them all.
        """
        limits = {name.replace(" mask", ""): {name: mask} for name, mask in self.named().items() if "mask" in name}
        if (alpha := alpha_of(self.content)) is not None:
            shown = {"content's alpha": resize(alpha, size)}
            for kind in ("content", *([name for name in limits if name.startswith("style")] or ["style"])):
                limits[kind] = limits.get(kind, {}) | shown
        return limits

    def digests(self) -> dict[str, str]:
        """The SHA-256 of each picture's shape and pixels, by a name in words."""
        digests = {}
        for name, picture in self.named().items():
            digest = hashlib.sha256(repr(picture.shape).encode())
            digest.update(np.ascontiguousarray(picture).data)
            digests[f"the {name} picture's SHA-256"] = digest.hexdigest()
        return digests


def numbered(kind: str, pictures: Collection[Any]) -> dict[str, Any]:
    """Each of them by its name in words, which has a number if there are several."""
    return {f"{kind} {n}" if len(pictures) > 1 else kind: one for n, one in enumerate(pictures, 1)}


def several(given: Any) -> tuple[Any, ...]:
    """What a caller gives as a picture, or as several, or as none: as a tuple."""
    if given is None:
        return ()
    return tuple(given) if isinstance(given, Iterable) and not isinstance(given, np.ndarray) else (given,)


def check_array(name: str, picture: object) -> None:
    """Raise UserError unless the picture, or the mask, of this name is an array of a shape and kind that it may have.

    Numbers of other kinds are not taken: whether white is 1, 255 or 65535 there would have to be guessed.
    """
    is_mask = "mask" in name
    kind = "uint8, or bool, (H, W) or (H, W, 3)" if is_mask else "uint8, (H, W, 3), or (H, W, 4) with alpha"
    what, needed = f"the {name}{'' if is_mask else ' picture'}", f"it must be an array of {kind}"
    if not isinstance(picture, np.ndarray):
        raise UserError(f"{what} is of the type {type(picture).__name__}; {needed}")
    if picture.ndim not in (2, 3) or picture.shape[2:] not in ([(3,), ()] if is_mask else [(3,), (4,)]):
        raise UserError(f"{what}'s shape is {picture.shape}; {needed}")
    if picture.dtype != np.uint8:
        raise UserError(f"{what}'s numbers are {picture.dtype}; {needed}, with 255 as white")
    if picture.shape[0] * picture.shape[1] < 2:
        raise UserError(f"{what}'s shape is {picture.shape}; it must be of more than a single pixel")


def on_background(content: Any, style: Any, colour: str | None) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """The content, and the style or styles as a tuple, on the colour if there is one. Raises UserError as Pictures."""
    styles = several(style)
    for name, picture in ({"content": content} | numbered("style", styles)).items():
        check_array(name, picture)
    return on_colour(content, colour), tuple(on_colour(style, colour) for style in styles)


def read_start(
    settings: Settings, read: Callable[[str], np.ndarray] = lambda path: read_picture(path)[0]
) -> np.ndarray | None:
    """The picture that --init_image names. Raises UserError if it is none, nor one of the words that it takes."""
    known = ("content", "recolored", "noise", "gray")
    if settings.init_image in known:
        return None
    if not os.path.exists(settings.init_image):
        require_choice("--init_image", settings.init_image, (*known, "a picture's path"))
    return on_colour(read(settings.init_image), settings.background)


def picture_sizes(content_shape: tuple[int, ...], settings: Settings) -> list[tuple[int, int]]:
    """(rows, columns) of the generated picture at each scale, the last being its full size, for a content (H, W, 3).

    Raises UserError if any side is under 32.
    """
    sizes = []
    scales = min(settings.scales, settings.image_size.bit_length() + 1)  # of more, the coarsest has no rows either
    for scale in reversed(range(scales)):
        rows = columns = settings.image_size >> scale
        if settings.maintain_aspect_ratio:
            columns = rows * content_shape[1] // content_shape[0]
        sizes.append((rows, columns))
    if min(sizes[0]) < MIN_SIDE:
        raise UserError(
            f"the {'coarsest' if settings.scales > 1 else 'generated'} picture would have "
            f"{sizes[0][0]} x {sizes[0][1]} pixels, but needs at least {MIN_SIDE} on each side; raise --image_size, "
            + ("lower --scales, " if settings.scales > 1 else "")
            + "or set --maintain_aspect_ratio False"
        )
    return sizes


def finish(x: np.ndarray, content: np.ndarray, settings: Settings, color_mask: np.ndarray | None = None) -> np.ndarray:
    """The picture that is shown for x: rescaled, and with the content's colours where the mask is, if so set.

    x: (H, W, 3) float in input space; content, color_mask: uint8 RGB at their own sizes -> uint8 RGB, or RGBA with the
    content's alpha.
    """
    picture = from_input_space(x)
    if settings.rescale_image:
        picture = resize(picture, content.shape[:2], settings.rescale_method)
    if settings.preserve_color == "luma":
        # The content's chroma comes from its full size, so a rescaled picture has it sharp.
        coloured = with_colours_of(filled(resize(content, picture.shape[:2])), picture)
        share = 1 if color_mask is None else mask_on_grid(color_mask, picture.shape[:2])
        picture = np.rint(share * coloured + (1 - share) * picture).astype(np.uint8)
    return with_alpha_of(content, picture)
