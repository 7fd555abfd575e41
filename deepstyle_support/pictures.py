"""Pictures as arrays: reading them, sizes, colours, masks. No network, and nothing of what a setting decides."""

import contextlib
import dataclasses
import hashlib
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps

from .messages import UserError

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

    Raises UserError for another shape, and unless there are as many style masks as styles, or none.
    """

    content: np.ndarray
    styles: tuple[np.ndarray, ...]
    style_masks: tuple[np.ndarray, ...] = ()
    content_mask: np.ndarray | None = None
    color_mask: np.ndarray | None = None
    start: np.ndarray | None = None  # if neither the content nor noise

    def __post_init__(self) -> None:
        for name, picture in self.named().items():
            if picture.shape[2:] != (3,) and not ("mask" in name and picture.ndim == 2):
                raise UserError(f"the {name} picture's shape is {picture.shape}; it must be (H, W, 3)")
            if "mask" in name and Image.fromarray(picture).convert("L").getbbox() is None:
                raise UserError(f"the {name} is all black, so nothing is left; it must be white where something holds")
        if len(self.style_masks) not in (0, len(self.styles)):
            raise UserError(
                f"there are {len(self.style_masks)} style masks for {len(self.styles)} styles; give one for each"
            )

    def named(self) -> dict[str, np.ndarray]:
        """Each picture that there is, by its name in words."""
        named: dict[str, np.ndarray | None] = {"content": self.content, "content mask": self.content_mask}
        named |= {"color mask": self.color_mask, "start": self.start}
        for kind, pictures in (("style", self.styles), ("style mask", self.style_masks)):
            named |= {f"{kind} {n}" if len(pictures) > 1 else kind: one for n, one in enumerate(pictures, 1)}
        return {name: picture for name, picture in named.items() if picture is not None}

    def masks(self) -> dict[str, np.ndarray]:
        """The masks by the names of their losses: "content", "style", or "style 2" of several."""
        return {name.replace(" mask", ""): mask for name, mask in self.named().items() if "mask" in name}

    def digests(self) -> dict[str, str]:
        """The SHA-256 of each picture's shape and pixels, by a name in words."""
        digests = {}
        for name, picture in self.named().items():
            digest = hashlib.sha256(repr(picture.shape).encode())
            digest.update(np.ascontiguousarray(picture).data)
            digests[f"the {name} picture's SHA-256"] = digest.hexdigest()
        return digests


def read_picture(path: str, allow_large: bool = False) -> tuple[np.ndarray, int]:
    """Any picture Pillow reads, upright, opaque on white, (H, W, 3) uint8 RGB; and how many it holds.

    Of several (an animation, pages) the first is taken. Raises UserError if it is missing, cannot be
    read, is a single pixel, or without `allow_large` is over Pillow's limit of pixels.
    """
    with opened(path, allow_large) as file:
        pictures = getattr(file, "n_frames", 1)
        picture = np.asarray(to_rgb(ImageOps.exif_transpose(file)))
    if picture.shape[0] * picture.shape[1] == 1:
        raise UserError(f"'{path}' is a single pixel; a picture is needed")
    return picture, pictures


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
        with pixel_limit(lifted=allow_large), Image.open(path) as file:
            yield file
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UserError(f"'{path}' has more than Pillow's limit of {limit} pixels; --allow_large lifts it") from error
    except Image.UnidentifiedImageError as error:
        raise UserError(f"'{path}' is no picture that Pillow can read") from error
    except Exception as error:  # on damaged files Pillow's decoders raise almost anything
        raise UserError(f"cannot read the picture '{path}': {getattr(error, 'strerror', None) or error}") from error


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


def to_rgb(picture: Image.Image) -> Image.Image:
    """Any of Pillow's modes as 8-bit RGB: grey of 16, 32 bits or floats scaled, transparency on white."""
    if picture.mode.startswith(("I", "F")):
        # Pillow's own conversion clips at 255 instead of scaling what white is to 255: by the format 1 for floats and
        # 65535 for 16 bits; of 32 bits only what is used.
        grey = np.nan_to_num(np.asarray(picture).astype(np.float64))
        usual = [1, 255, 65535] if picture.mode == "F" else [65535, 2**32 - 1]
        white = next((most for most in usual if grey.max() <= most), grey.max())
        picture = Image.fromarray(np.clip(np.rint(grey / white * 255), 0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def resize(picture: np.ndarray, size: tuple[int, int], method: str = "bilinear") -> np.ndarray:
    """picture: (H, W, 3) uint8, resized by Pillow to (rows, columns, 3) uint8."""
    rows, columns = size
    return np.asarray(Image.fromarray(picture).resize((columns, rows), RESAMPLING[method]))


def mask_on_grid(mask: np.ndarray, size: tuple[int, int], stride: int = 1) -> np.ndarray:
    """mask: (H, W) or (H, W, 3) uint8 -> (h, w, 1) float32 in 0..1: its mean over each position of a layer.

    size: (rows, columns) of the generated picture, stride: its pixels from one position to the next.
    """
    grey = Image.fromarray(mask).convert("L").convert("F").resize(size[::-1], Image.Resampling.BOX)
    rows, columns = (length // stride for length in size)  # pooling leaves out what remains
    blocks = np.asarray(grey)[: rows * stride, : columns * stride].reshape(rows, stride, columns, stride, 1)
    return blocks.mean((1, 3)) / 255


def enlarge(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """x: (H, W, 3) float32, resized to (rows, columns, 3) float32 without rounding."""
    channels = [np.asarray(Image.fromarray(x[..., c]).resize(size[::-1], Image.Resampling.BICUBIC)) for c in range(3)]
    return np.stack(channels, axis=-1)


def to_input_space(picture: np.ndarray) -> np.ndarray:
    """picture: (H, W, 3) uint8 RGB -> (H, W, 3) float32, BGR, mean subtracted."""
    return picture[..., ::-1].astype(np.float32) - MEAN_BGR


def from_input_space(x: np.ndarray) -> np.ndarray:
    """x: (H, W, 3) float, BGR, mean subtracted -> (H, W, 3) uint8 RGB, rounded and clipped."""
    return np.ascontiguousarray(np.clip(np.rint(x + MEAN_BGR), 0, 255).astype(np.uint8)[..., ::-1])


def with_colours_of(content: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """The luma of `picture` with the chroma of `content` (YCbCr); all (H, W, 3) uint8 RGB."""
    luma = Image.fromarray(picture).convert("YCbCr").getchannel("Y")
    _, blue, red = Image.fromarray(content).convert("YCbCr").split()
    return np.asarray(Image.merge("YCbCr", (luma, blue, red)).convert("RGB"))


def match_colours(style: np.ndarray, content: np.ndarray) -> np.ndarray:
    """The style with the mean and covariance of the content's colours; all (H, W, 3) uint8 RGB.

    Each pixel p becomes A (p - mean_style) + mean_content with A = S_content^(1/2) S_style^(-1/2), S being the
    covariance of RGB (Gatys et al. 2016, arXiv 1606.05897, section 5.1).
    """

    return with_colours(style, colours(style), colours(content))


class Colours(NamedTuple):
    """Of a picture's RGB values."""

    mean: np.ndarray  # (3,)
    covariance: np.ndarray  # (3, 3)


def colours(picture: np.ndarray, mask: np.ndarray | None = None) -> Colours:
    """Of a picture, (H, W, 3) uint8, each pixel counting as much as the mask, (H, W, 1) floats, is there."""
    pixels, counts = picture.reshape(-1, 3).astype(np.float64), None if mask is None else mask.ravel()
    covariance = np.cov(pixels.T, aweights=counts, ddof=1 if mask is None else 0)  # a mask may leave a single pixel
    return Colours(np.average(pixels, 0, counts), covariance)


def mixture(parts: list[Colours], shares: list[float]) -> Colours:
    """Those of a picture that holds so much of each part; the shares add up to 1."""
    mean = sum((share * part.mean for share, part in zip(shares, parts, strict=True)), np.zeros(3))
    offsets = [part.mean - mean for part in parts]
    spreads = [part.covariance + np.outer(off, off) for part, off in zip(parts, offsets, strict=True)]
    return Colours(mean, sum((share * one for share, one in zip(shares, spreads, strict=True)), np.zeros((3, 3))))


def with_colours(picture: np.ndarray, own: Colours, wanted: Colours) -> np.ndarray:
    """The picture with the wanted mean and covariance instead of its own; (H, W, 3) uint8 RGB."""

    def root(covariance: np.ndarray, inverse: bool) -> np.ndarray:
        variances, axes = np.linalg.eigh(covariance)
        # Where the picture varies by less than a grey level, that is noise, and would be blown up.
        roots = np.maximum(variances, 1) ** -0.5 if inverse else np.sqrt(np.maximum(variances, 0))
        return axes * roots @ axes.T

    change = root(wanted.covariance, inverse=False) @ root(own.covariance, inverse=True)
    return np.clip(np.rint((picture - own.mean) @ change.T + wanted.mean), 0, 255).astype(np.uint8)


def recolour(
    content: np.ndarray, styles: list[np.ndarray], weights: list[float], masks: list[np.ndarray]
) -> np.ndarray:
    """The content with the mean and covariance of the styles' colours, mixed by their weights.

    With masks, (H, W, 1) floats from 0 to 1, each style gives its own region its own colours; where no mask is, the
    content stays as it is. content, styles: (H, W, 3) uint8 RGB -> the content's shape.
    """
    if not sum(weights):
        return content
    if not masks:
        wanted = mixture([colours(style) for style in styles], [weight / sum(weights) for weight in weights])
        return with_colours(content, colours(content), wanted)
    shares = [weight * mask for weight, mask in zip(weights, masks, strict=True)]
    covered = np.minimum(sum(mask for weight, mask in zip(weights, masks, strict=True) if weight), 1.0)
    recoloured = sum(
        share * with_colours(content, colours(content, mask), colours(style))
        for share, mask, style in zip(shares, masks, styles, strict=True)
    ) / np.maximum(sum(shares), np.finfo(np.float64).tiny)
    return np.rint(covered * recoloured + (1 - covered) * content).astype(np.uint8)
