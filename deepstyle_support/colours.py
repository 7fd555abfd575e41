"""The colours of a picture, and how one gets another's."""

from typing import NamedTuple

import numpy as np
from PIL import Image

from .bands import bands
from .transparency import alpha_of


def with_colours_of(content: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """The luma of `picture` with the chroma of `content` (YCbCr); all (H, W, 3) uint8 RGB."""
    coloured = np.empty_like(picture)
    for rows in bands(*picture.shape[:2]):
        luma = Image.fromarray(picture[rows]).convert("YCbCr").getchannel("Y")
        _, blue, red = Image.fromarray(content[rows]).convert("YCbCr").split()
        coloured[rows] = np.asarray(Image.merge("YCbCr", (luma, blue, red)).convert("RGB"))
    return coloured


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


def match_colours(style: np.ndarray, content: np.ndarray) -> np.ndarray:
    """The style with the mean and covariance of the content's colours; all (H, W, 3) uint8 RGB, or with alpha.

    Each pixel p becomes A (p - mean_style) + mean_content with A = S_content^(1/2) S_style^(-1/2), S being the
    covariance of RGB (Gatys et al. 2016, arXiv 1606.05897, section 5.1).
    """

    return with_colours(style, colours(style), colours(content))


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
