"""Pictures as arrays: sizes, colours, masks. No network, and nothing of what a setting decides."""

import dataclasses
import functools
import hashlib
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from .bands import bands
from .messages import UserError
from .transparency import alpha_of, laid_on

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "cubic": Image.Resampling.BICUBIC,
}
MEAN_BGR = np.array([103.939, 116.779, 123.68], np.float32)  # of the ImageNet training pictures


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


def whitened(mask: Any) -> Any:
    """A mask of bool as uint8, 255 where it is true; any other as it is."""
    return mask * np.uint8(255) if isinstance(mask, np.ndarray) and mask.dtype == bool else mask


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


def laid(content: Any, style: Any, colour: str | None) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """The content, and the style or styles as a tuple, on the colour if there is one. Raises UserError as Pictures."""
    styles = several(style)
    for name, picture in ({"content": content} | numbered("style", styles)).items():
        check_array(name, picture)
    return laid_on(content, colour), tuple(laid_on(style, colour) for style in styles)


def shows(mask: np.ndarray) -> bool:
    """Whether some of a mask, (H, W) or (H, W, 3) uint8, is not black as a grey."""
    return Image.fromarray(mask).convert("L").getbbox() is not None


def resize(picture: np.ndarray, size: tuple[int, int], method: str = "bilinear") -> np.ndarray:
    """picture: (H, W, 3) uint8, or (H, W, 4) with alpha, resized by Pillow to (rows, columns, 3 or 4) uint8.

    Of transparent ones Pillow weights the colours by their alpha, so what is beneath does not show.
    """
    to = size[::-1], RESAMPLING[method]
    if picture.shape[2:] != (3,):
        return np.asarray(Image.fromarray(picture).resize(*to))
    resized = np.empty((*size, 3), np.uint8)
    for channel in range(3):  # one at a time, since all of them Pillow would copy
        resized[..., channel] = np.asarray(Image.fromarray(picture[..., channel]).resize(*to))
    return resized


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


def enlarge(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """x: (H, W, 3) float32, resized to (rows, columns, 3) float32 without rounding."""
    channels = [np.asarray(Image.fromarray(x[..., c]).resize(size[::-1], Image.Resampling.BICUBIC)) for c in range(3)]
    return np.stack(channels, axis=-1)


def to_input_space(picture: np.ndarray) -> np.ndarray:
    """picture: (H, W, 3) uint8 RGB -> (H, W, 3) float32, BGR, mean subtracted."""
    x = picture[..., ::-1].astype(np.float32)
    x -= MEAN_BGR  # in its place: of large pictures each copy counts
    return x


def from_input_space(x: np.ndarray) -> np.ndarray:
    """x: (H, W, 3) float, BGR, mean subtracted -> (H, W, 3) uint8 RGB, rounded and clipped."""
    picture = np.empty(x.shape, np.uint8)
    for rows in bands(*x.shape[:2]):
        picture[rows] = np.clip(np.rint(x[rows] + MEAN_BGR), 0, 255)[..., ::-1]
    return picture


def with_colours_of(content: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """The luma of `picture` with the chroma of `content` (YCbCr); all (H, W, 3) uint8 RGB."""
    coloured = np.empty_like(picture)
    for rows in bands(*picture.shape[:2]):
        luma = Image.fromarray(picture[rows]).convert("YCbCr").getchannel("Y")
        _, blue, red = Image.fromarray(content[rows]).convert("YCbCr").split()
        coloured[rows] = np.asarray(Image.merge("YCbCr", (luma, blue, red)).convert("RGB"))
    return coloured


def match_colours(style: np.ndarray, content: np.ndarray) -> np.ndarray:
    """The style with the mean and covariance of the content's colours; all (H, W, 3) uint8 RGB, or with alpha.

    Each pixel p becomes A (p - mean_style) + mean_content with A = S_content^(1/2) S_style^(-1/2), S being the
    covariance of RGB (Gatys et al. 2016, arXiv 1606.05897, section 5.1).
    """

    return with_colours(style, colours(style), colours(content))


class Colours(NamedTuple):
    """Of a picture's RGB values."""

    mean: np.ndarray  # (3,)
    covariance: np.ndarray  # (3, 3)


def colours(picture: np.ndarray, mask: np.ndarray | None = None) -> Colours:
    """Of a picture, (H, W, 3) uint8, each pixel counting as much as the mask, (H, W, 1) floats, is there.

    With alpha, (H, W, 4), it counts only as much as it is opaque.
    """
    alpha, size = alpha_of(picture), picture.shape[:2]

    def weighted(rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """The pixels of some rows, (n, 3), and how much each counts, (n, 1)."""
        counts = np.ones((picture[rows].shape[0], size[1], 1)) if mask is None else mask[rows].astype(np.float64)
        if alpha is not None:
            counts = counts * (alpha[rows, :, None] / 255)
        return picture[rows, :, :3].reshape(-1, 3).astype(np.float64), counts.reshape(-1, 1)

    total, mean, covariance = 0.0, np.zeros(3), np.zeros((3, 3))
    for rows in bands(*size):
        pixels, counts = weighted(rows)
        total, mean = total + counts.sum(), mean + (counts * pixels).sum(0)
    mean = mean / total
    for rows in bands(*size):
        pixels, counts = weighted(rows)
        covariance += (counts * (pixels - mean)).T @ (pixels - mean)
    # A mask may leave a single pixel.
    return Colours(mean, covariance / (total - 1 if mask is None and alpha is None else total))


def mixture(parts: list[Colours], shares: list[float]) -> Colours:
    """Those of a picture that holds so much of each part; the shares add up to 1."""
    mean = sum((share * part.mean for share, part in zip(shares, parts, strict=True)), np.zeros(3))
    offsets = [part.mean - mean for part in parts]
    spreads = [part.covariance + np.outer(off, off) for part, off in zip(parts, offsets, strict=True)]
    return Colours(mean, sum((share * one for share, one in zip(shares, spreads, strict=True)), np.zeros((3, 3))))


def with_colours(picture: np.ndarray, own: Colours, wanted: Colours) -> np.ndarray:
    """The picture with the wanted mean and covariance instead of its own; (H, W, 3) uint8 RGB, or with its alpha."""

    def root(covariance: np.ndarray, inverse: bool) -> np.ndarray:
        variances, axes = np.linalg.eigh(covariance)
        # Where the picture varies by less than a grey level, that is noise, and would be blown up.
        roots = np.maximum(variances, 1) ** -0.5 if inverse else np.sqrt(np.maximum(variances, 0))
        return axes * roots @ axes.T

    change = root(wanted.covariance, inverse=False) @ root(own.covariance, inverse=True)
    recoloured = picture.copy()
    for rows in bands(*picture.shape[:2]):
        values = (picture[rows, :, :3] - own.mean) @ change.T + wanted.mean
        recoloured[rows, :, :3] = np.clip(np.rint(values), 0, 255)
    return recoloured


def recolour(
    content: np.ndarray, styles: list[np.ndarray], weights: list[float], masks: list[np.ndarray]
) -> np.ndarray:
    """The content with the mean and covariance of the styles' colours, mixed by their weights.

    With masks, (H, W, 1) floats from 0 to 1, each style gives its own region its own colours; where no mask is, the
    content stays as it is. content, styles: (H, W, 3) uint8 RGB, or with alpha -> the content's shape.
    """
    if not sum(weights):
        return content
    if not masks:
        wanted = mixture([colours(style) for style in styles], [weight / sum(weights) for weight in weights])
        return with_colours(content, colours(content), wanted)
    given = [one for one in zip(weights, masks, styles, strict=True) if one[0] and one[1].any()]
    parts = [(weight, mask, colours(content, mask), colours(style)) for weight, mask, style in given]
    recoloured = content.copy()
    for rows in bands(*content.shape[:2]):
        shares = [weight * mask[rows] for weight, mask, _, _ in parts]
        covered = np.minimum(sum(mask[rows] for _, mask, _, _ in parts), 1.0)
        mixed = sum(
            share * with_colours(content[rows], own, wanted)
            for share, (_, _, own, wanted) in zip(shares, parts, strict=True)
        ) / np.maximum(sum(shares), np.finfo(np.float64).tiny)
        recoloured[rows] = np.rint(covered * mixed + (1 - covered) * content[rows])
    return recoloured
