"""Pictures as arrays: other sizes, and the network's input space. Nothing here is a setting's business."""

import numpy as np
from PIL import Image

from .bands import bands

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "cubic": Image.Resampling.BICUBIC,
}
MEAN_BGR = np.array([103.939, 116.779, 123.68], np.float32)  # of the ImageNet training pictures


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
