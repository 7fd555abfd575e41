#!/usr/bin/env python3
"""deepstyle paints one photo in the style of another.

It is the method of Gatys, Ecker & Bethge, "A Neural Algorithm of Artistic Style" (2015, arXiv
1508.06576): find the picture whose VGG16 features resemble the content picture's, whose Gram
matrices of features resemble the style picture's, and which is smooth. The file reads from top
to bottom like the paper: settings and command line, network, losses, objective, optimiser,
painting, run. What surrounds the method is in deepstyle_support/, a concern a module.

"Input space" below is what VGG16 was trained on: BGR channels in 0..255 minus their ImageNet means.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import hashlib
import itertools
import math
import os
import re
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

if __name__ == "__main__":  # python -P and -I look for modules in no script's folder
    sys.path.insert(0, str(Path(__file__).resolve().parent))

if __name__ == "__main__" and not sys.warnoptions:
    warnings.simplefilter("ignore")  # of libraries, as in `main`

try:
    import numpy as np
    from PIL import Image, ImageColor

    from deepstyle_support.backend import all_finite, as_array, import_keras, on_cpu, out_of_memory, parts_and_gradient
    from deepstyle_support.callbacks import Closed, as_generator
    from deepstyle_support.convolution import Kernel, convolve, kernel_on_device
    from deepstyle_support.device import describe_device
    from deepstyle_support.files import Outputs, outputs_of
    from deepstyle_support.folder import Batch, Photo, arguments_for, folders_in, photos_in
    from deepstyle_support.inputs import input_paths, read_beside, read_inputs, read_start
    from deepstyle_support.lbfgs import Curvature, device_lbfgs, kept_bytes
    from deepstyle_support.memory import (
        MOST_CORRECTIONS,
        SMALLEST,
        Held,
        Plan,
        TooLarge,
        free_memory,
        held_beside,
        plan_memory,
        plan_or_advice,
        smaller_tile,
    )
    from deepstyle_support.messages import (
        Stream,
        UserError,
        answer,
        counted,
        in_words,
        printable,
        require_choice,
        tell,
        words,
    )
    from deepstyle_support.ownership import base_path
    from deepstyle_support.pictures import (
        MEAN_BGR,
        RESAMPLING,
        Pictures,
        enlarge,
        from_input_space,
        laid,
        mask_on_grid,
        match_colours,
        numbered,
        recolour,
        resize,
        several,
        to_input_space,
        with_colours_of,
    )
    from deepstyle_support.provenance import description
    from deepstyle_support.reading import read_picture as read_picture
    from deepstyle_support.reading import shape_of
    from deepstyle_support.records import Ending, Iteration, State
    from deepstyle_support.report import held_for_report
    from deepstyle_support.reuse import Reuse
    from deepstyle_support.rounding import computed_with
    from deepstyle_support.saving import save_all
    from deepstyle_support.state import read_state
    from deepstyle_support.terminal import (
        console_for,
        describe_stop,
        fill_closed_descriptors,
        leave,
        progress_bar,
        signals_as_wishes,
        where_it_goes_on,
        without_warnings,
    )
    from deepstyle_support.transparency import alpha_of, filled, with_alpha_of
    from deepstyle_support.values import ON_OFF, like_default, name_of, value_of
    from deepstyle_support.vgg import CHANNELS, halo, layer_name, stride
    from deepstyle_support.weights import Weights, load_weights, trunk_digest
except KeyboardInterrupt:
    if __name__ != "__main__":
        raise
    sys.stderr.write("deepstyle: interrupted before the painting began\n")
    sys.exit(130)
except ModuleNotFoundError as missing:
    if __name__ != "__main__":
        raise
    sys.exit(f"deepstyle: error: Python has no package {missing.name}; 'sh run.sh' installs what is needed")

__version__ = "0.2.0"

STYLE_LAYERS = ("conv1_1", "conv2_1", "conv3_1", "conv4_1", "conv5_1")
EVALUATIONS_PER_ITERATION = 20
MOST = {"image_size": 10**9, "style_size": 10**9, "history": MOST_CORRECTIONS}  # more is a mistake in typing
Tensor = Any  # one of the backend's, or an array where it takes one


# ------------------------------------------------------------------ settings and command line


def setting(default: Any, group: str, placeholder: str, help: str, shapes: bool = True) -> Any:
    """A field of Settings, with what the command line says of its flag. A tuple's flag takes several values.

    `shapes`: whether another value makes another picture; then a run is not resumed with another one.
    """
    metadata = {"group": group, "metavar": placeholder, "help": help, "shapes": shapes}
    return dataclasses.field(default=default, metadata=metadata)


# What may be another when a run is gone on with: when to end, and how to compute. The weights, and pictures on a
# background, are known by their digests.
steering = functools.partial(setting, shapes=False)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that shapes a run but its pictures; each is a flag, and each default exists only here.

    For a tuple a single value will do, and NumPy's numbers are taken. A layer is kept by its name in the paper:
    `block4_conv2` becomes `conv4_2`. Raises UserError for a value that is out of range, or of another kind.
    """

    image_size: int = setting(400, "the picture", "ROWS", "rows of the generated picture")
    maintain_aspect_ratio: bool = setting(True, "the picture", "BOOL", "columns as in the content; False: as rows")
    init_image: str = setting("content", "the picture", "START", "content, recolored, noise, gray, or a picture's path")
    preserve_color: bool | str = setting(False, "the picture", "HOW", "the content's colours: luma (True) or match")
    background: str | None = steering(None, "the picture", "COLOUR", "lay what is transparent on it: red or #ff0000")
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
    padding: str = setting("zeros", "the network", "HOW", "beyond the border: zeros, or the edge's own values")
    weights: str | None = steering(None, "the network", "FILE", "a file, or random; else they are found or fetched")
    num_iter: int = steering(10, "the optimisation", "N", f"iterations of {EVALUATIONS_PER_ITERATION} evaluations")
    scales: int = setting(1, "the optimisation", "N", "paint in N sizes, each twice the one before")
    coarse_iter: tuple[int, ...] = setting((5,), "the optimisation", "N", "iterations at each size but the last")
    min_improvement: float = steering(0.0, "the optimisation", "PERCENT", "stop when an iteration brings less")
    seed: int = setting(0, "the optimisation", "N", "for everything random")
    optimizer: str = steering("scipy", "the optimisation", "WHOSE", "scipy's L-BFGS-B, or one on the device")
    history: int = steering(10, "the optimisation", "N", "corrections that L-BFGS keeps")
    tile: str = steering("auto", "the optimisation", "auto|off|N", "compute in tiles of at most N x N pixels")
    max_memory: float = steering(0.0, "the optimisation", "GB", "use no more than this; 0: all that is free")

    def __post_init__(self) -> None:
        put = functools.partial(object.__setattr__, self)  # a frozen dataclass has no other way
        put("tile", str(self.tile))
        how = str(self.preserve_color)
        put("preserve_color", {word: on and "luma" for word, on in ON_OFF.items()}.get(how.lower(), how))
        for field in dataclasses.fields(self):
            if field.name != "preserve_color":
                put(field.name, like_default(f"--{field.name}", getattr(self, field.name), field.default))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.metadata["metavar"] == "LAYER":
                value = tuple(layer_name(f"--{field.name}", name, self.model) for name in value)
                if not value or len({*value}) < len(value):
                    raise UserError(f"--{field.name} names {'a layer twice' if value else 'no layer'}: {words(value)}")
                put(field.name, value)
            least = 1 if field.name in ("image_size", "num_iter", "scales", "coarse_iter", "history") else 0
            for one in value if isinstance(value, tuple) else (value,):
                if isinstance(one, int | float) and not least <= one < math.inf:
                    raise UserError(f"--{field.name} is {one}; it must be {least} or more, and finite")
                if type(one) is int and field.name in MOST and one > MOST[field.name]:
                    raise UserError(f"--{field.name} is {one}; it must be {MOST[field.name]} or less")
        require_choice("--preserve_color", self.preserve_color, (False, "luma", "match"))
        require_choice("--rescale_method", self.rescale_method, RESAMPLING)
        require_choice("--content_loss_type", self.content_loss_type, (0, 1, 2))
        require_choice("--style_fit", self.style_fit, ("stretch", "keep"))
        require_choice("--pool_type", self.pool_type, ("ave", "max"))
        require_choice("--padding", self.padding, ("zeros", "edge"))
        require_choice("--optimizer", self.optimizer, OPTIMIZERS)
        if self.weights == "":
            raise UserError("--weights is ''; it must be a file, or random")
        if self.background is not None:
            try:
                ImageColor.getrgb(self.background)
            except (AttributeError, ValueError):
                known = "it must be a colour's name, like red, or #rrggbb"
                raise UserError(f"--background is '{self.background}'; {known}") from None
        if self.tile not in ("auto", "off") and not (re.fullmatch("[0-9]{1,9}", self.tile) and int(self.tile) >= 16):
            known = "it must be auto, off, or a number of pixels from 16 on, of up to 9 digits"
            raise UserError(f"--tile is '{self.tile}'; {known}")
        if len(self.style_layer_weights) not in (1, len(self.style_layers)) or not (
            0 < sum(self.style_layer_weights) < math.inf
        ):
            raise UserError(
                f"--style_layer_weights are {words(self.style_layer_weights)}; there must be one, or one for each of "
                f"the {len(self.style_layers)} --style_layers, and not all 0"
            )
        if len(self.coarse_iter) not in (1, self.scales - 1):
            raise UserError(
                f"--coarse_iter has {len(self.coarse_iter)} numbers ({words(self.coarse_iter)}); with --scales "
                f"{self.scales} there are {self.scales - 1} coarse sizes: give one number, or one for each"
            )

    def decisive(self) -> dict[str, str]:
        """The settings that shape the picture, by their flags, in words."""
        fields = (field for field in dataclasses.fields(self) if field.metadata["shapes"])
        return {f"--{field.name}": words(getattr(self, field.name)) for field in fields}


def weights_of_styles(settings: Settings, styles: int) -> list[float]:
    """The weight of each style; a single weight is shared out evenly. Raises UserError if the numbers do not agree."""
    weights = settings.style_weight
    if len(weights) not in (1, styles):
        raise UserError(f"--style_weight has {len(weights)} weights for {styles} styles; give one, or one for each")
    return [settings.style_scale * weight * len(weights) / styles for weight in weights * (styles // len(weights))]


class Parser(argparse.ArgumentParser):
    """argparse, with errors raised for `main` to show in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")

    def _print_message(self, message: str, file: object = None) -> None:  # --help and --version have no other way
        answer(message.rstrip("\n"))


class Describe(argparse.Action):
    """--describe: as with --version, nothing else is done."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: object, path: Any, option: object = None) -> None:
        answer(description(path, dataclasses.asdict(Settings()), __version__, Stream("stdout").encoding))
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
    parser.add_argument("content", metavar="CONTENT", help="the photo to paint, or a folder of photos")
    parser.add_argument("style", metavar="STYLE", nargs="+", help="the picture to take the style from")
    parser.add_argument("prefix", metavar="PREFIX", help="pictures are PREFIX_at_iteration_N.png; or a folder")
    for title, members in itertools.groupby(dataclasses.fields(Settings), lambda field: field.metadata["group"]):
        group = parser.add_argument_group(title)
        for field in members:
            default: Any = field.default
            kind: Any = type(default)
            options: dict[str, Any] = {}
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
    group.add_argument("--animation", metavar="FILE", type=name_of, help="all iterations as .gif, .webp or .mp4")
    group.add_argument("--log", metavar="FILE", type=name_of, help="a row of losses for each iteration, .csv")
    group.add_argument("--tensorboard", metavar="DIR", type=name_of, help="losses and pictures for TensorBoard")
    group.add_argument("--report", metavar="FILE", type=name_of, help="a page that shows the run, .html")
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


# ----------------------------------------------------------------------------------- network


def on_device(weights: Weights, padding: str) -> dict[str, tuple[Kernel, Tensor]]:
    """The backend's tensors of each layer: its kernel as `convolve` needs it, its bias."""
    to_tensor = import_keras().ops.convert_to_tensor
    return {name: (kernel_on_device(kernel, padding), to_tensor(bias)) for name, (kernel, bias) in weights.items()}


def features(
    x: Tensor, weights: dict[str, tuple], layers: Collection[str], pool_type: str
) -> Iterator[tuple[str, Tensor]]:
    """The network's features of x at `layers`, one layer after another and no deeper than the deepest of them.

    x: (H, W, 3) tensor in input space, weights: from `on_device` -> (layer, (h, w, C)), after the ReLU. Each pooling
    halves the rows and columns, rounding down. "ave" is the paper's choice, "max" the network's own.
    """
    ops = import_keras().ops
    pool = {"ave": ops.average_pool, "max": ops.max_pool}[pool_type]
    x = x[None]
    for name, (kernel, bias) in weights.items():
        if name > max(layers, default=""):
            break
        if name.endswith("_1") and name != "conv1_1":
            x = pool(x, 2, strides=2, data_format="channels_last")
        x = ops.relu(convolve(x, kernel) + bias)
        if name in layers:
            yield name, x[0]


# ------------------------------------------------------------------------------------ losses


def gram_matrix(f: Tensor, mask: Tensor = None) -> Tensor:
    """G = F^T F over the positions (eq. 3 of the paper), each times the mask's value there if there is one.

    f: (h, w, C), mask: (h, w, 1) -> (C, C).
    """
    ops = import_keras().ops
    flat = ops.reshape(f, (-1, f.shape[-1]))
    own = flat if mask is None else flat * ops.reshape(mask, (-1, 1))
    # What is asked of G is symmetric, so both factors get the same gradient: one of them, twice, is enough.
    product = ops.einsum("pc,pd->cd", own, ops.stop_gradient(flat))
    return 2 * product - ops.stop_gradient(product)


def content_loss(f: Tensor, target: Tensor, mask: Tensor = None) -> Tensor:
    """Sum of squared differences (eq. 1 without its 1/2), times the mask. f, target: (h, w, C) -> scalar."""
    ops = import_keras().ops
    return ops.sum(ops.square(f - target) * (1.0 if mask is None else mask))


def style_loss(gram: Tensor, target: Tensor, size: int) -> Tensor:
    """sum (G_style - G)^2 / (4 * 3^2 * size^2) of one layer (eq. 4); gram, target: (C, C).

    A departure from the paper, kept because people's weights are tuned to it: 3 and `size` are
    the picture's channels and H*W at every layer, where the paper has the layer's own.
    """
    ops = import_keras().ops
    # Divided before squaring: the squares alone would near the end of float32's range.
    return ops.sum(ops.square((target - gram) / (2 * 3 * size)))


def total_variation(x: Tensor, mask: Tensor = None) -> Tensor:
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
    gradient: Any  # (H, W, 3): float64 where x is an array, a float32 tensor where x is one; or None

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

    def of(self, x: Tensor) -> Tensor:
        """The window of x, (H, W, 3): float32 of an array, or of a tensor where that is."""
        return np.float32(x[self.window]) if isinstance(x, np.ndarray) else x[self.window]

    def at(self, stride: int) -> tuple[tuple[slice, slice], tuple[slice, slice], tuple[slice, slice]]:
        """Own positions, own positions counted from the window's first, and the window, at a layer of this stride."""

        def positions(part: slice) -> slice:
            return slice(part.start // stride, part.stop // stride)

        (rows, columns), (top, left) = map(positions, self.own), map(positions, self.window)
        within = (
            slice(rows.start - top.start, rows.stop - top.start),
            slice(columns.start - left.start, columns.stop - left.start),
        )
        return (rows, columns), within, (top, left)

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


def tiles_of(size: tuple[int, int], tile: int, halo: int) -> list[Tile]:
    """The tiles of a picture of (rows, columns), row by row."""
    rows, columns = (cut(length, tile, halo) for length in size)
    return [Tile(*zip(row, column, strict=True)) for row in rows for column in columns]


class Place(NamedTuple):
    """Where a loss looks; losses at the same place share what is computed there."""

    layer: str  # or "picture"
    mask: str = ""  # its name


class Loss(NamedTuple):
    """One weighted part of the objective."""

    name: str  # "content conv5_2", "style conv1_1" (or "style 2 conv1_1", of several styles) or "total variation"
    weight: float  # with all its factors
    place: Place


def weighted_losses(settings: Settings, size: tuple[int, int], styles: int, masks: Collection[str]) -> list[Loss]:
    """The parts of the objective for a picture of (rows, columns), without targets. One of weight 0 is left out.

    `masks` are the names of those that there are: "content", "style" for any, or "style 2" of several. Raises UserError
    as `weights_of_styles` does.
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
    parts = []
    for name, layer, weight in losses:
        mask = next((mask for mask in (name, name.split()[0]) if mask in masks), "")
        parts.append(Loss(f"{name} {layer}", weight, Place(layer, mask)))
    parts.append(Loss("total variation", settings.total_variation_weight, Place("picture")))
    return [part for part in parts if part.weight]


def layers_of(losses: Iterable[Loss]) -> set[str]:
    """The layers at which they look."""
    return {loss.place.layer for loss in losses} - {"picture"}


@functools.lru_cache(maxsize=8)
def compiled(losses: tuple[Loss, ...], pixels: int, pool_type: str) -> Callable:
    """`weighted_parts` with its gradient, compiled once for all objectives with such losses.

    A backend keeps what it has compiled: without this each picture that a process paints would leave 12 to 25 MB.
    """
    return parts_and_gradient(functools.partial(weighted_parts, losses, pixels, pool_type))


def weighted_parts(
    losses: tuple[Loss, ...],
    pixels: int,
    pool_type: str,
    x: Any,
    weights: dict[str, tuple],
    content_targets: dict[str, Any],
    style_targets: dict[str, Any],
    masks: dict[Place, Any],
    whole_grams: dict[Place, Any],
) -> dict[str, Any]:
    """What the positions of a tile add to each part, weighted: {name: loss}. No mask means all of them.

    x: (h, w, 3) float32 tensor; pixels: of the whole picture. With `whole_grams` the value of a style loss is that of
    the whole picture, and only its gradient that of the tile.
    """
    found = dict(features(x, weights, layers_of(losses), pool_type))
    grams = {}
    for place in dict.fromkeys(loss.place for loss in losses if loss.name.startswith("style")):
        grams[place] = gram_matrix(found[place.layer], masks.get(place))
        if place in whole_grams:
            grams[place] = whole_grams[place] + grams[place] - import_keras().ops.stop_gradient(grams[place])
    parts = {}
    for name, weight, place in losses:
        mask = masks.get(place)
        if name.startswith("style"):
            loss = style_loss(grams[place], style_targets[name], pixels)
        elif name.startswith("content"):
            loss = content_loss(found[place.layer], content_targets[place.layer], mask)
        else:
            loss = total_variation(x, mask)
        parts[name] = weight * loss
    return parts


class TileLosses:
    """What is computed for one tile of a picture: its Gram matrices and, given the whole picture's, its gradient.

    It knows the targets and the masks of the whole picture, but not which tiles there are, nor where they are computed:
    it takes tiles and pictures (arrays, or tensors where they are), and gives arrays, but a gradient as a tensor. Until
    it has its targets (`aimed`) only features and Gram matrices can be asked for. All that it knows but the network's
    weights can be sent to another process.
    """

    def __init__(
        self,
        losses: list[Loss],
        masks: dict[Place, np.ndarray],
        size: tuple[int, int],
        weights: Weights,
        settings: Settings,
        reuse: Reuse,
    ):
        self.losses, self.masks, self.size, self.pool_type = tuple(losses), masks, size, settings.pool_type
        self.weights = reuse("the network", lambda: on_device(weights, settings.padding))
        self.content_targets: dict[str, np.ndarray] = {}  # {layer: (h, w, C)}, in NumPy: not on a GPU
        self.style_targets: dict[str, np.ndarray] = {}

    def places(self, kind: str = "") -> list[Place]:
        """Where the losses of this kind look."""
        return list(dict.fromkeys(loss.place for loss in self.losses if loss.name.startswith(kind)))

    def layers(self) -> set[str]:
        """The layers that an evaluation needs."""
        return layers_of(self.losses)

    def aimed(self, content_targets: dict[str, np.ndarray], style_targets: dict[str, np.ndarray]) -> "TileLosses":
        """With its targets: the content's features, {layer: (h, w, C)}, and the styles' Grams, {loss: (C, C)}."""
        aimed = copy.copy(self)
        aimed.content_targets, aimed.style_targets = content_targets, style_targets
        return aimed

    def only(self, name: str) -> "TileLosses":
        """The loss of this name alone."""
        alone = copy.copy(self)
        alone.losses = tuple(loss for loss in self.losses if loss.name == name)
        return alone

    def features(self, tile: Tile, x: Tensor, layers: Collection[str]) -> Iterator[tuple[str, Any]]:
        """(layer, features of the tile's window), one after another. x: (H, W, 3) in input space, the whole picture."""
        yield from features(tile.of(x), self.weights, layers, self.pool_type)

    def own_features(self, tile: Tile, x: Tensor, layers: Collection[str]) -> dict[str, np.ndarray]:
        """{layer: (h, w, C)} at the tile's own positions."""
        to_numpy = import_keras().ops.convert_to_numpy
        return {layer: to_numpy(f[tile.at(stride(layer))[1]]) for layer, f in self.features(tile, x, layers)}

    def grams(
        self, tile: Tile, x: Tensor, places: list[Place], masks: dict[Place, np.ndarray] | None = None
    ) -> dict[Place, np.ndarray]:
        """The first pass: what the tile's own positions add to the picture's Gram matrices, {place: (C, C)}.

        masks: those of another picture than the generated one, (h, w, 1) for each place that has one.
        """
        ops, found = import_keras().ops, {}
        for layer, f in self.features(tile, x, {place.layer for place in places}):
            for place in (place for place in places if place.layer == layer):
                mask = self.mask(tile, place, masks)
                found[place] = ops.convert_to_numpy(
                    gram_matrix(f, None if mask is None else ops.convert_to_tensor(mask))
                )
        return found

    def parts_and_gradient(
        self, tile: Tile, x: Tensor, whole_grams: dict[Place, np.ndarray]
    ) -> tuple[dict[str, float], Tensor]:
        """The second pass: what the tile's own positions add to each part, and the gradient of that in its window.

        whole_grams: the picture's Gram matrices, of which the style losses are; empty if the tile is the whole picture.
        """
        targets = {layer: f[tile.at(stride(layer))[2]] for layer, f in self.content_targets.items()}
        masks = {place: mask for place in self.places() if (mask := self.mask(tile, place)) is not None}
        differentiated = compiled(self.losses, math.prod(self.size), self.pool_type)
        given = self.weights, targets, self.style_targets, masks, whole_grams
        return differentiated(tile.of(x), *given)

    def mask(self, tile: Tile, place: Place, masks: dict[Place, np.ndarray] | None = None) -> np.ndarray | None:
        """(h, w, 1): how much each position of the tile's window counts; None where all count the same."""
        masks = self.masks if masks is None else masks
        step, mask = stride(place.layer), None
        if place in masks:
            mask = masks[place][tile.at(step)[2]]
        if tile.own != tile.window:
            mask = tile.mask(step) if mask is None else mask * tile.mask(step)
        return mask


class Objective:
    """The loss of a picture, and its gradient: the sum of weighted parts (eq. 7, with the total variation).

    content: (H, W, 3) uint8 RGB, the generated picture's size. style: such an array of any size, or a list of them;
    style_masks, one for each, and content_mask: (H, W) or (H, W, 3) uint8, white where it holds. Where the content is
    transparent, (H, W, 4) RGBA, neither content nor style counts, and of a transparent style only its opaque part.
    weights: None for the trained network, "random", a file, or what load_weights returned. reuse: shared with other
    objectives of the same weights and options. The options are the command's flags, that is the fields of Settings.
    With tile=N all is computed tile by tile in bounded memory, and comes out the same: Gram matrices are sums over
    positions, so the tiles' add up to the picture's, from which the style losses follow, and each tile's gradient
    adds to the picture's where its window is.

    Calling it with x, (H, W, 3) float in input space, returns (loss: float, gradient: (H, W, 3) float64). Where memory
    runs out it goes on in smaller tiles, of which `on_smaller_tiles` is told the pixels. Raises UserError for a bad
    option.
    """

    def __init__(
        self,
        content: np.ndarray,
        style: np.ndarray | list[np.ndarray],
        *,
        style_masks: Iterable[np.ndarray] = (),
        content_mask: np.ndarray | None = None,
        weights: Weights | str | None = None,
        on_smaller_tiles: Callable[[int], None] = lambda tile: None,
        reuse: Reuse | None = None,
        **options: Any,
    ):
        settings = Settings(**options, weights=None if isinstance(weights, dict) else weights)
        pictures = Pictures(*laid(content, style, settings.background), several(style_masks), content_mask)
        if not isinstance(weights, dict):
            weights, _ = load_weights(settings.weights, settings.seed, settings.model)
        self.size = pictures.content.shape[0], pictures.content.shape[1]
        self.model = settings.model
        self.tile = int(settings.tile) if settings.tile.isdigit() else None
        self.on_smaller_tiles = on_smaller_tiles
        masks = pictures.masks(self.size)
        losses = weighted_losses(settings, self.size, len(pictures.styles), masks)
        check_sides({"content": pictures.content}, layers_of(losses))
        shown = layers_of(loss for loss in losses if loss.name.startswith("style"))
        check_sides(numbered("style", pictures.styles), shown)
        placed = masks_at_places((loss.place for loss in losses), masks, self.size)
        self.reuse = reuse or Reuse()
        self.of_tile = TileLosses(losses, placed, self.size, weights, settings, self.reuse)
        content_targets = self._in_memory(self._content_targets, to_input_space(filled(pictures.content)))
        style_targets = self._in_memory(self._style_targets, pictures.styles)
        self.of_tile = self.of_tile.aimed(content_targets, style_targets)

    def __call__(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        evaluation = self.evaluate(x)
        return evaluation.loss, evaluation.gradient

    def evaluate(self, x: Tensor) -> Evaluation:
        """What calling does, with the loss's parts; where x is a tensor of the backend, so is the gradient, float32.

        Raises UserError if x has another shape, and with status 1 if they are not finite.
        """
        if tuple(getattr(x, "shape", ())) != (*self.size, 3):
            raise UserError(f"x is no array of the content's shape, {(*self.size, 3)}")
        parts, gradient = self._in_memory(self._two_passes, self.of_tile, x)
        evaluation = Evaluation(parts, gradient)
        if not (math.isfinite(evaluation.loss) and all_finite(gradient)):
            raise UserError(f"the {self._part_gone_wrong(x)} loss is no longer finite; lower its weight", status=1)
        return evaluation

    def _in_memory(self, compute: Callable, *given: Any) -> Any:
        """compute(*given), again in smaller tiles each time that memory runs out: only the rounding differs.

        Raises UserError, status 1, if it runs out in the smallest tiles too.
        """
        while True:
            try:
                return compute(*given)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                tile = smaller_tile(self.size, self.tile)
                if not tile:
                    raise UserError("out of memory even in the smallest tiles; lower --image_size", status=1) from error
            # Only here: as long as the error is handled, it holds on to what was computed until then.
            self.tile = tile
            self.on_smaller_tiles(tile)

    def _two_passes(self, of_tile: TileLosses, x: Tensor) -> tuple[dict[str, float], Tensor]:
        """Each part and the gradient of all of x: two maps over the tiles, with the sum of Grams between them."""
        tiles = self._tiles(self.size, of_tile.layers())
        grams = self._grams(of_tile, x, of_tile.places("style")) if len(tiles) > 1 else {}
        parts: dict[str, float] = {}
        is_array = isinstance(x, np.ndarray)
        gradient = np.zeros(x.shape, np.float64 if is_array else np.float32) if is_array or len(tiles) > 1 else None
        for tile, (added, part) in zip(tiles, self.for_each(tiles, of_tile.parts_and_gradient, x, grams), strict=True):
            if gradient is None:
                gradient = part  # of the whole picture, which so never leaves the device
            else:
                gradient[tile.window] += as_array(part)
            for name, value in added.items():
                parts[name] = value if name.startswith("style") else parts.get(name, 0.0) + value
        return parts, gradient if is_array else import_keras().ops.convert_to_tensor(gradient)

    def for_each(self, tiles: list[Tile], compute: Callable, *given: Any) -> Iterable:
        """compute(tile, *given) of each tile in their order. Here they are computed one after another, in this process.

        `compute` is a method of TileLosses; another way of computing tiles replaces this method, and nothing else.
        """
        return (compute(tile, *given) for tile in tiles)

    def _tiles(self, size: tuple[int, int], layers: Collection[str]) -> list[Tile]:
        """The tiles of a picture for what needs `layers`; as a whole, it is one tile."""
        # A style picture that is larger than the generated one is not computed in larger pieces than that.
        # Without layers there is only the total variation, which looks one pixel further.
        return tiles_of(size, self.tile or max(self.size) + 15, halo(layers, self.model) if layers else 1)

    def _grams(
        self, of_tile: TileLosses, x: Tensor, places: list[Place], masks: dict[Place, np.ndarray] | None = None
    ) -> dict[Place, np.ndarray]:
        """{place: (C, C)} of all of x: the sum of the tiles'. masks: as TileLosses.grams takes them."""
        # Style layers are seldom the deepest, so these tiles need less around them than those of the second pass.
        tiles = self._tiles(x.shape[:2], {place.layer for place in places})
        totals: dict[Place, np.ndarray] = {}
        for grams in self.for_each(tiles, of_tile.grams, x, places, masks):
            for place, gram in grams.items():
                totals[place] = totals.get(place, 0) + gram.astype(np.float64)
        return {place: total.astype(np.float32) for place, total in totals.items()}

    def _content_targets(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """{layer: (h, w, C)} of the content picture."""
        layers = [place.layer for place in self.of_tile.places("content")]
        found = {
            layer: np.empty([n // stride(layer) for n in self.size] + [CHANNELS[self.model][layer]], np.float32)
            for layer in layers
        }
        tiles = self._tiles(self.size, layers)
        for tile, own in zip(tiles, self.for_each(tiles, self.of_tile.own_features, x, layers), strict=True):
            for layer, f in own.items():
                found[layer][tile.at(stride(layer))[0]] = f
        return found

    def _style_targets(self, styles: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
        """For each loss of a style: that style's Gram matrix, as if the style were as large as the picture."""
        targets = {}
        for number, style in enumerate(styles, 1):
            kind = "style " if len(styles) == 1 else f"style {number} "
            layers = {loss.name: loss.place.layer for loss in self.of_tile.losses if loss.name.startswith(kind)}
            grams = self._grams_of_style(style, [Place(layer, "style") for layer in layers.values()])
            for name, layer in layers.items():
                own, other = (
                    math.prod(length // stride(layer) for length in size[:2]) for size in (self.size, style.shape)
                )
                targets[name] = grams[Place(layer, "style")] * np.float32(own / other)
        return targets

    def _grams_of_style(self, style: np.ndarray, places: list[Place]) -> dict[Place, np.ndarray]:
        """{place: (C, C)} of a style, (H, W, 3 or 4) uint8: at hand if it was shown so before."""
        # To the bit it also depends on the tiles, of which a small style is one.
        tile = min(self.tile or max(self.size) + 15, max(style.shape) + 15)
        key = hashlib.sha256(style.tobytes()).digest(), style.shape, tuple(places), tile

        def compute() -> dict[Place, np.ndarray]:
            opaque = opaque_at_places(style, style.shape[:2], places)
            return self._grams(self.of_tile, to_input_space(filled(style)), places, opaque)

        return self.reuse(key, compute)

    def _part_gone_wrong(self, x: Tensor) -> str:
        """The name of the part whose value or gradient is not finite, each computed alone."""
        for loss in self.of_tile.losses:
            parts, gradient = self._two_passes(self.of_tile.only(loss.name), x)
            if not (math.isfinite(parts[loss.name]) and all_finite(gradient)):
                return loss.name
        return "summed"


def check_sides(pictures: dict[str, np.ndarray], layers: Collection[str]) -> None:
    """Raise UserError if the deepest of the layers has no position of a picture, (H, W, C), each by its name."""
    least = max(map(stride, layers), default=1)
    for name, picture in pictures.items():
        if min(picture.shape[:2]) < least:
            raise UserError(f"the {name} picture's shape is {picture.shape}; {max(layers)} needs {least} pixels a side")


def masks_at_places(
    places: Iterable[Place], masks: dict[str, dict[str, np.ndarray]], size: tuple[int, int]
) -> dict[Place, np.ndarray]:
    """(h, w, 1) float32 for each place with a mask. A style's has a mean of 1, so a small part gets all of it.

    masks: from Pictures.masks. Raises UserError if nothing of a mask is left at a place.
    """
    found = {}
    for place in dict.fromkeys(places):
        if place.mask in masks:
            named = masks[place.mask]
            mask = mask_on_grid(named.values(), size, stride(place.layer))
            if not mask.any():
                what = " times the ".join(named)
                raise UserError(f"the {what} is all black at {place.layer}; it must be white somewhere")
            found[place] = mask if place.mask == "content" else mask / mask.mean()
    return found


def opaque_at_places(style: np.ndarray, size: tuple[int, int], places: list[Place]) -> dict[Place, np.ndarray]:
    """`masks_at_places` for a style shown as (rows, columns): how opaque it is there. Empty if it is opaque everywhere.

    So its Gram matrix is that of a whole picture like its opaque part.
    """
    alpha = alpha_of(style)
    alphas = {} if alpha is None else {"style": {"style's alpha": resize(alpha, size)}}
    return masks_at_places(places, alphas, size)


# --------------------------------------------------------------------------------- optimiser


@dataclasses.dataclass(frozen=True)
class Accepted:
    """A point that the optimiser accepted, with its evaluation less the gradient, and their number so far."""

    x: Tensor  # (H, W, 3) in input space, float64, or a float32 tensor on the device
    evaluation: Evaluation
    count: int
    learnt: Callable[[], Curvature | None]  # what the optimiser knows there, as long as it is there


# What an optimiser is given, and what it gives: x is (H, W, 3) float in input space.
Evaluate = Callable[[Tensor], Evaluation]
Points = Generator[tuple[Tensor, Evaluation, Curvature | None], None, None]


class Stopped(Exception):
    """Raised by `minimise` at an evaluation when it is not to go on."""


def minimise(
    objective: Objective,
    start: np.ndarray,
    on_evaluation: Callable[[int, Evaluation], None] = lambda count, evaluation: None,
    stop: Callable[[], bool] = lambda: False,
    history: int = 10,
    evaluations: int = 0,
    iterations: int = 0,
    optimizer: str = "scipy",
    learnt: Callable[[], Curvature | None] = lambda: None,
) -> Generator[Accepted, None, None]:
    """The start, then the accepted point after every 20 evaluations, until the caller has had enough.

    start: (H, W, 3) float in input space. `on_evaluation` is told the number of evaluations so far and the
    latest. When `stop()` is true before an evaluation, or one fails, what has been accepted since the last point is
    handed over as a last one. Then what failed is raised, also to a caller who has had enough, or who could not save
    that point. The optimiser ends by itself only when it finds nothing better.
    A run that goes on counts on from the `evaluations` and `iterations` that it has behind it, and the device's
    optimiser from what it has `learnt`.
    """
    count = max(0, evaluations - 1)  # the start, where an earlier run ended, is evaluated once more
    handed_over = 0  # evaluations up to the last point that was
    accepted: Accepted | None = None
    failure: BaseException | None = None
    curvature: Curvature | None = None

    def known_at(point: int) -> Curvature | None:
        return curvature if accepted and accepted.count == point else None

    def evaluate(x: np.ndarray) -> Evaluation:
        nonlocal count
        if accepted and stop():
            raise Stopped
        evaluation = objective.evaluate(x)
        count += 1
        on_evaluation(count, evaluation)
        return evaluation

    try:
        with contextlib.closing(OPTIMIZERS[optimizer](evaluate, start, history, learnt)) as points:
            for x, evaluation, known in points:
                first, curvature = not accepted, known
                accepted = Accepted(x, evaluation, count, functools.partial(known_at, count))
                if first:
                    yield accepted
                elif count >= (iterations + 1) * EVALUATIONS_PER_ITERATION:
                    iterations, handed_over = iterations + 1, count
                    yield accepted
    except Stopped:
        pass
    except (Exception, KeyboardInterrupt) as error:
        traceback.clear_frames(error.__traceback__)  # they hold what was computed, and memory may have run out
        failure = error
    try:
        if accepted and accepted.count != handed_over:
            yield accepted
    finally:
        if failure:
            raise failure


def scipy_lbfgs(evaluate: Evaluate, start: np.ndarray, history: int, learnt: object = None) -> Points:
    """Every point that SciPy's L-BFGS-B accepts, the start first; `evaluate` may raise whatever ends it.

    It works on the host in float64, and neither gives away what it has learnt nor can it be told.

    L-BFGS-B (Byrd, Lu, Nocedal & Zhu 1995) with `history` corrections runs once for the whole job, so that what it has
    learnt of the curvature survives from one iteration to the next, and with its own convergence tests off. When it
    gives up on a line search, as noise in float32 can make it, it is started again from where it is. It ends by itself
    only when that has brought nothing twice in a row.
    """
    from scipy import optimize

    def run(hand_over: Callable, closed: threading.Event) -> None:
        evaluation: Any = None  # the latest

        def loss_at(flat: np.ndarray) -> float:
            nonlocal evaluation
            if closed.is_set():
                raise Closed
            first = evaluation is None
            evaluation = evaluate(flat.reshape(start.shape))
            if first:
                accept(flat)
            return evaluation.loss

        def gradient_at(flat: np.ndarray) -> np.ndarray:
            # SciPy asks for it where it has just asked for the loss. Given both at once, it keeps one more copy of x.
            return evaluation.gradient.ravel()

        def accept(flat: np.ndarray) -> None:
            # Without the gradient, which is as large as the picture.
            hand_over((flat.reshape(start.shape).copy(), dataclasses.replace(evaluation, gradient=None), None))

        def callback(intermediate_result: optimize.OptimizeResult) -> None:
            # The line search stops at the point that it accepts, so the latest evaluation is that point's.
            assert intermediate_result.fun == evaluation.loss
            accept(intermediate_result.x)

        def solve(flat: np.ndarray) -> tuple[np.ndarray, float]:
            options = {"ftol": 0, "gtol": 0, "maxiter": sys.maxsize, "maxfun": sys.maxsize, "maxcor": history}
            result = optimize.minimize(
                loss_at, flat, jac=gradient_at, method="L-BFGS-B", callback=callback, options=options
            )
            # Not all of it: it refers to the corrections, which would stay while the next run makes its own.
            return result.x, result.fun

        (flat, loss), fruitless = solve(np.asarray(start, np.float64).ravel()), 0
        while fruitless < 2:
            before = loss
            flat, loss = solve(flat)
            fruitless = 0 if loss < before else fruitless + 1

    return as_generator(run)


OPTIMIZERS: dict[str, Callable[..., Points]] = {"scipy": scipy_lbfgs, "device": device_lbfgs}


# ---------------------------------------------------------------------------------- painting


def stylize(
    content: np.ndarray,
    style: np.ndarray | list[np.ndarray],
    *,
    style_masks: tuple[np.ndarray, ...] = (),
    content_mask: np.ndarray | None = None,
    color_mask: np.ndarray | None = None,
    **options: Any,
) -> Generator[Iteration, None, None]:
    """Paint `content` in the style of `style`, or of several: one Iteration after another.

    content, style: (H, W, 3) uint8 RGB, or (H, W, 4) RGBA, of any sizes; masks: (H, W, 3) or (H, W), white where
    something holds. A transparent content makes the iterations' pictures RGBA, with its alpha. The options
    are the command's flags, that is the fields of Settings, with the same defaults; all pictures are resized as the
    command does it. Raises UserError for what the caller can mend.
    """
    settings = Settings(**options)
    given = laid(content, style, settings.background)
    pictures = Pictures(*given, several(style_masks), content_mask, color_mask, read_start(settings))
    plan = planned(pictures, settings)
    check_agreement(pictures, settings)  # after the plan: masks of a size that is too large would fill the memory
    weights, _ = load_weights(settings.weights, settings.seed, settings.model)
    return (iteration for iteration in paint(pictures, settings, weights, plan) if not iteration.coarse)


def check_agreement(pictures: Pictures, settings: Settings) -> None:
    """Raise UserError if the pictures and the settings do not go together."""
    weights_of_styles(settings, len(pictures.styles))
    for size in picture_sizes(pictures.content.shape, settings):
        masks = pictures.masks(size)
        losses = weighted_losses(settings, size, len(pictures.styles), masks)
        masks_at_places((loss.place for loss in losses), masks, size)
        for style, shown in zip(pictures.styles, style_sizes(pictures.styles, size, settings), strict=True):
            opaque_at_places(style, shown, [Place(layer, "style") for layer in settings.style_layers])
    if pictures.color_mask is not None and settings.preserve_color != "luma":
        raise UserError("--color_mask says where --preserve_color luma applies; give that flag as well")


def picture_sizes(content_shape: tuple[int, ...], settings: Settings) -> list[tuple[int, int]]:
    """(rows, columns) of the generated picture at each scale, the last being its own, for a content (H, W, 3).

    Raises UserError if any side is under 32.
    """
    sizes = []
    scales = min(settings.scales, settings.image_size.bit_length() + 1)  # of more, the coarsest has no rows either
    for scale in reversed(range(scales)):
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


def saved_size(pictures: Pictures, settings: Settings) -> tuple[int, int]:
    """(rows, columns) of the pictures that are shown and saved."""
    rows, columns = pictures.content.shape[:2]
    return (rows, columns) if settings.rescale_image else picture_sizes((rows, columns), settings)[-1]


def held_by(pictures: Pictures, settings: Settings, frames: int = 0) -> Held:
    """What painting them holds beside what is computed, with an animation of so many frames."""
    size = picture_sizes(pictures.content.shape, settings)[-1]
    shown = style_sizes(pictures.styles, size, settings)
    return held_beside(pictures.named(), size, saved_size(pictures, settings), shown, settings, frames)


def planned(
    pictures: Pictures,
    settings: Settings,
    plan: Callable[..., Plan] = plan_memory,
    free: tuple[float, float] | None = None,
    outputs: Outputs | None = None,
) -> Plan:
    """The plan for painting them, and for the animation and report among the outputs.

    plan, free: as Computing and Shared have them. Raises UserError if they do not fit, with the size that does.
    """

    def plan_at(image_size: int) -> Plan:
        of = dataclasses.replace(settings, image_size=image_size)
        sizes = picture_sizes(pictures.content.shape, of)
        made = 1 + sum(iterations_at_sizes(sizes, of).values())
        held = held_by(pictures, of, made if outputs and outputs.animation else 0)
        reported = held_for_report(sizes[-1], made) if outputs and outputs.report else 0
        return plan(sizes[-1], of, held._replace(kept=held.kept + reported), free)

    return plan_or_advice(settings.image_size, plan_at)


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


def shown_picture(x: np.ndarray, size: tuple[int, int], pictures: Pictures, settings: Settings) -> np.ndarray:
    """What is shown of x, (H, W, 3) float in input space, as a picture of (rows, columns): a coarse one is enlarged."""
    full = x if x.shape[:2] == size else enlarge(x.astype(np.float32), size)
    return finish(full, pictures.content, settings, pictures.color_mask)


def paint(
    pictures: Pictures,
    settings: Settings,
    weights: Weights,
    plan: Plan | None = None,
    state: State | None = None,
    on_evaluation: Callable[[tuple[int, int], int, Evaluation], None] = lambda size, count, evaluation: None,
    stop: Callable[[], bool] = lambda: False,
    on_smaller_tiles: Callable[[int], None] = lambda tile: None,
    reuse: Reuse | None = None,
    make: Callable[..., Objective] = Objective,
) -> Generator[Iteration, None, None]:
    """`stylize` for settings, weights and maybe a plan that are at hand, going on from `state` if there is one.

    `on_evaluation` is told the size that is painted, and what `minimise` tells; `stop` is as there, `on_smaller_tiles`
    and `reuse` as in `Objective`. `make` is given what Objective is, and makes one.
    """
    shaped_by = state.shaped_by if state else what_shapes(pictures, settings, weights)
    sizes = picture_sizes(pictures.content.shape, settings)
    plan = plan or planned(pictures, settings)
    # Workers may have other threads than this process, and so round otherwise.
    way = way_of_computing(settings, plan) if make is Objective else ""
    exact = state is None or (state.way == way != "")
    x = state.x if state else start_picture(pictures, sizes[0], settings)
    totals = iterations_at_sizes(sizes, settings)
    for size in sizes[sizes.index(state.size) if state else 0 :]:
        if x.shape[:2] != size:
            x = carried_over(x, size, pictures, settings)
        if not state:
            state = State(x, np.empty((0, 4)), shaped_by, 0, False)
        watch = functools.partial(on_evaluation, size)
        objective = objective_at(size, pictures, settings, weights, plan.tile, on_smaller_tiles, reuse, make)
        full, tile = size == sizes[-1], objective.tile
        here = iterations_at(objective, state, settings, full, totals[size], watch, stop, plan.history)
        with contextlib.closing(here):
            for reached in here:
                x, exact = reached.state.x, exact and objective.tile == tile
                picture = shown_picture(x, sizes[-1], pictures, settings)
                as_it_is = dataclasses.replace(settings, rescale_image=False)
                yield reached._replace(
                    picture=picture,
                    own_size=picture if full else finish(x, pictures.content, as_it_is, pictures.color_mask),
                    exact=exact and not reached.state.partial,
                    state=dataclasses.replace(reached.state, way=way if exact else ""),
                )
        if stop():
            return
        state = None


def iterations_at(
    objective: Objective,
    state: State,
    settings: Settings,
    full: bool,
    most: int,
    on_evaluation: Callable[[int, Evaluation], None],
    stop: Callable[[], bool],
    history: int,
) -> Generator[Iteration, None, None]:
    """At most so many iterations at one size, from `state`; their pictures are not made yet. `full`: no coarse size."""
    losses = list(state.losses)
    if state.iteration >= most:
        return
    clock, given = time.perf_counter(), state.evaluations
    done = given, max(0, state.iteration)
    points = minimise(objective, state.x, on_evaluation, stop, history, *done, settings.optimizer, state.learnt)
    with contextlib.closing(points):  # behind a part of an iteration that raises the failure that it ended with
        if given == 0:
            losses.append(loss_row(next(points).evaluation))
        for accepted in points:
            if given and accepted.count == given:
                continue  # it is what was saved already
            row = loss_row(accepted.evaluation)
            number, before = len(losses), losses[-1][0]
            partial = accepted.count < number * EVALUATIONS_PER_ITERATION
            losses += [] if partial else [row]
            reached = State(
                as_array(accepted.x), np.array(losses), state.shaped_by, accepted.count, partial, learnt=accepted.learnt
            )
            improvement = improvement_of(before, row[0])
            yield Iteration(
                number=number,
                picture=(nothing := np.empty((0, 0, 3), np.uint8)),
                own_size=nothing,
                loss=row[0],
                content_loss=row[1],
                style_loss=row[2],
                total_variation_loss=row[3],
                improvement=improvement,
                seconds=time.perf_counter() - clock,
                evaluations=accepted.count,
                parts=accepted.evaluation.parts,
                exact=False,
                coarse=not full,
                state=reached,
            )
            del accepted  # its x is as large as the picture
            clock = time.perf_counter()
            if number >= most or (full and is_enough(number, improvement, settings)):
                return


def way_of_computing(settings: Settings, plan: Plan) -> str:
    """What must be the same for a run that goes on to make the same pictures, bit for bit, beside what shapes them."""
    computed = computed_with(import_keras().backend.backend(), __version__).values()
    return f"{settings.optimizer} with {plan.history} corrections, tile {plan.tile}, {', '.join(computed)}"


def what_shapes(pictures: Pictures, settings: Settings, weights: Weights) -> dict[str, str]:
    """All that decides a run's pictures, in words; runs of which it differs are not to be mixed."""
    shapes = settings.decisive() | pictures.digests() | {"the weights' SHA-256": trunk_digest(weights)}
    if pictures.start is not None:
        del shapes["--init_image"]  # it is known by its digest, whatever path it has
    return shapes


def iterations_at_sizes(sizes: list[tuple[int, int]], settings: Settings) -> dict[tuple[int, int], int]:
    """How many iterations there are to be at each of the sizes, coarsest first.

    Five at each, measured with three scales: to the loss that 200 plain evaluations reach it takes 65, 127, 126 and 127
    on four pairs at 256 rows, coarse ones counted by their pixels; with 2 it is 74, 166, 129 and 146, and with 10, then
    5, 69, 131, 129 and 128. With the device's optimiser, three pairs at 400 rows: 50, 77 and 138, and with 10 at each
    79, 101 and 168.
    """
    coarse = settings.coarse_iter * ((len(sizes) - 1) // len(settings.coarse_iter))
    return dict(zip(sizes, (*coarse, settings.num_iter), strict=True))


def objective_at(
    size: tuple[int, int],
    pictures: Pictures,
    settings: Settings,
    weights: Weights,
    tile: int | None,
    on_smaller_tiles: Callable[[int], None] = lambda tile: None,
    reuse: Reuse | None = None,
    make: Callable[..., Objective] = Objective,
) -> Objective:
    """The objective for the pictures resized for (rows, columns), whole or in tiles."""
    content, styles = shown_at(size, pictures, settings)
    given: dict[str, Any] = {"style_masks": pictures.style_masks, "content_mask": pictures.content_mask}
    given |= {"weights": weights, "tile": str(tile or "off"), "on_smaller_tiles": on_smaller_tiles, "reuse": reuse}
    given |= {"content_weight": content_weight_at(size, picture_sizes(pictures.content.shape, settings)[-1], settings)}
    return make(content, styles, **vars(settings) | given)


def content_weight_at(size: tuple[int, int], full: tuple[int, int], settings: Settings) -> float:
    """What the content weighs while (rows, columns) are painted of a picture that is to be `full`.

    With half the rows the mean over positions counts 4 times as much. Style losses fall less far there, so with its own
    weight hardly anything of the photo was left; now it is there to be seen. Measured on coffee by great_wave at 256
    rows, the loss of 200 plain evaluations took 101 with the own weight and 100 with this one; at 400 rows it takes 147
    with this one, and 164 with 16 times as much for each halving.
    """
    times = math.prod(full) / math.prod(size)
    weight = settings.content_weight * times ** (2 - settings.content_loss_type / 2)  # types have the positions in them
    return min(weight, sys.float_info.max)  # of an absurd weight the loss is what is told to be no longer finite


def shown_at(size: tuple[int, int], pictures: Pictures, settings: Settings) -> tuple[np.ndarray, list[np.ndarray]]:
    """The content and the styles as they are for a picture of (rows, columns), uint8 RGB, or with alpha."""
    content = resize(pictures.content, size)
    shapes = style_sizes(pictures.styles, size, settings)
    styles = [resize(style, shape) for style, shape in zip(pictures.styles, shapes, strict=True)]
    if settings.preserve_color == "match":
        styles = [match_colours(style, content) for style in styles]
    return content, styles


def start_picture(pictures: Pictures, size: tuple[int, int], settings: Settings) -> np.ndarray:
    """(rows, columns, 3) float in input space."""
    if settings.init_image == "noise":
        return np.random.default_rng(settings.seed).uniform(0, 255, (*size, 3)) - MEAN_BGR
    if settings.init_image == "recolored":
        content, styles = shown_at(size, pictures, settings)
        masks = [mask_on_grid(mask, size) for mask in pictures.style_masks]
        recoloured = recolour(content, styles, weights_of_styles(settings, len(styles)), masks)
        return to_input_space(filled(recoloured))
    start = pictures.content if pictures.start is None else pictures.start
    if settings.init_image == "gray":
        start = np.asarray(Image.fromarray(filled(start)).convert("L").convert("RGB"))
    return to_input_space(filled(resize(start, size)))


def carried_over(x: np.ndarray, size: tuple[int, int], pictures: Pictures, settings: Settings) -> np.ndarray:
    """x of a coarser size as the start at (rows, columns): enlarged, with the detail that the first start has there.

    Where the network finds the photo's edges it keeps them: measured, less of the photo is lost so, and the loss is
    lower.
    """
    enlarged = enlarge(x.astype(np.float32), size)
    if settings.init_image == "noise":
        return enlarged
    coarse = start_picture(pictures, (x.shape[0], x.shape[1]), settings)
    return enlarged + start_picture(pictures, size, settings) - enlarge(coarse.astype(np.float32), size)


def loss_row(evaluation: Evaluation) -> list[float]:
    """The loss and its three parts."""
    return [evaluation.sum_of(kind) for kind in ("", "content", "style", "total variation")]


def improvement_of(before: float, loss: float) -> float:
    """What an iteration brought, in percent of the loss before."""
    return 100 * (before - loss) / before if before else 0.0


def is_enough(number: int, improvement: float, settings: Settings) -> bool:
    """Whether iteration `number` brought less than the user's minimum; the first always brings enough."""
    return number > 1 and improvement < settings.min_improvement


# --------------------------------------------------------------------------------------- run


class Shared(NamedTuple):
    """What the runs of a folder's photos have in common."""

    beside: dict[str, Any]  # all pictures but the content, from read_beside
    free: tuple[float, float]  # from free_memory: TensorFlow takes a GPU's with the first photo, and keeps it
    weights: Weights
    reuse: Reuse
    received: list[int]  # signals


class Computing(NamedTuple):
    """How a run computes: in this process, or as another program has it that is this one in all else."""

    plan: Callable[[tuple[int, int], Settings, Held, tuple[float, float] | None], Plan] = plan_memory
    device: Callable[[], str] = describe_device  # in words; it must be there before anything is moved
    make: Callable[..., Objective] = Objective
    program: tuple[str, ...] = ("deepstyle.py",)  # and flags of its own, for the command that makes the picture again
    end: Callable[[], None] = lambda: None  # lets go of what `device` has begun
    repeatable: Callable[[], bool] = on_cpu  # whether sums are rounded alike from run to run, on the same machine


HERE = Computing()


def run(
    arguments: argparse.Namespace,
    settings: Settings,
    shared: Shared | None = None,
    name: str = "",
    computing: Computing = HERE,
) -> Ending:
    """One photo: check everything, paint, show and save each iteration.

    Of a folder's, by its name, there are only the bar and what is moved aside to see.
    """
    pictures = read_inputs(arguments, settings, shared.beside if shared else None)
    *coarser, size = picture_sizes(pictures.content.shape, settings)
    outputs = outputs_of(arguments)
    totals = iterations_at_sizes([*coarser, size], settings)
    plan = planned(pictures, settings, computing.plan, shared.free if shared else None, outputs)
    outputs.keeps = kept_bytes(size, plan.history) if settings.optimizer == "device" else 0
    check_agreement(pictures, settings)  # after the plan, as in `stylize`
    outputs.check(input_paths(arguments, settings), saved_size(pictures, settings))
    outputs.check_extras_are_ours()
    named = settings.weights, settings.seed, settings.model, arguments.quiet
    weights, source = (shared.weights, "") if shared else load_weights(*named)
    console = console_for(arguments.quiet)
    show: Callable[[str], None] = (lambda line: None) if shared else console.print
    shapes, defaults = what_shapes(pictures, settings, weights), Settings().decisive()

    def begin(state: State | None, device: str) -> None:
        device = "CPU" if computing.repeatable() else device
        outputs.made = how_it_is_made(arguments, settings, plan, computing.program, device)
        outputs.begin(
            lambda: shown_picture(start_picture(pictures, size, settings), size, pictures, settings),
            totals,
            state,
            pictures.named(),
            dataclasses.asdict(Settings()),
        )

    with (
        signals_as_wishes(shared.received if shared else None) as received,
        outputs.owned() as note,
        contextlib.ExitStack() as at_the_end,
    ):
        at_the_end.callback(computing.end)
        if note and not shared:
            outputs.note(note)
        state = read_state(outputs.state_path, shapes, defaults) if arguments.resume else None
        full = state if state and state.size == size else None
        done = full.iteration if full else 0
        if state:
            outputs.expect(state, not full, lambda: shown_picture(state.x, size, pictures, settings))
        if full and (nothing := why_nothing_to_do(full, settings)):
            if outputs.is_behind(full):
                begin(full, "another device")
            for path in outputs.finish():
                show(f"saved {path}")
            if not (arguments.quiet or shared):
                tell(f"nothing to do: {nothing}")
            return Ending(0, False, float(full.losses[-1][0]), outputs.latest_picture(done))
        device = computing.device()
        if received:
            tell(f"{name}stopped before the painting began")
            return Ending(128 + received[0], False)
        if not state and (moved := outputs.clear_the_way(arguments.overwrite)):
            console.print(printable(moved) if shared else moved)
        if arguments.resume:
            show(where_it_goes_on(state, size))
        show(f"painting {size[0]} x {size[1]} pixels on {device}; {source}")
        show(plan.in_words(settings.history))
        if settings.optimizer == "device" and not outputs.keeps:
            show("what L-BFGS learns would be gigabytes and is not kept: after --resume it is learnt again")
        if coarser and not full:
            show("first " + ", then ".join(f"{rows} x {columns}" for rows, columns in coarser) + " pixels")

        def on_smaller_tiles(tile: int) -> None:
            console.print(f"{name}out of memory: trying again in tiles of at most {tile} pixels")

        begin(state, device)
        with progress_bar(console, totals, EVALUATIONS_PER_ITERATION, name) as advance:

            def on_evaluation(size: tuple[int, int], count: int, evaluation: Evaluation) -> None:
                advance(size, count, evaluation.loss)
                outputs.add_evaluation(size, count, loss_row(evaluation))

            reuse = shared.reuse if shared else None
            watch = on_evaluation, lambda: bool(received), on_smaller_tiles
            iterations = paint(pictures, settings, weights, plan, state, *watch, reuse, computing.make)
            last = save_all(iterations, outputs, totals, show, lambda: bool(received))
        if received:
            tell(name + describe_stop(last, state, size))
            return Ending(128 + received[0], True)
    if early := why_early(last, done, settings):
        show(early)
    if last:
        return Ending(0, True, last.loss, outputs.latest_picture(0 if last.coarse else last.number))
    return Ending(0, True, float(full.losses[-1][0]) if full else None, outputs.latest_picture(done))


def why_nothing_to_do(state: State, settings: Settings) -> str:
    """Why a run that goes on from this state, of full size, has nothing left to do, in words; empty if it has."""
    if state.iteration >= settings.num_iter:
        return f"{state.iteration} iterations are done; a larger --num_iter goes on from there"
    ended = state.iteration and not state.partial
    if ended and is_enough(state.iteration, improvement_of(*state.losses[-2:, 0]), settings):
        least = f"the last iteration improved by less than {settings.min_improvement} %"
        return f"{least}; a smaller --min_improvement goes on from there"
    return ""


def why_early(last: Iteration | None, done: int, settings: Settings) -> str:
    """Why a run that nobody stopped has ended before its time, in words; empty if it has not.

    last: its last iteration, if it had any; done: iterations in full size before.
    """
    number = last.number if last and not last.coarse else done
    if last and not last.state.partial:
        if number >= settings.num_iter:
            return ""
        if is_enough(number, last.improvement, settings):
            return f"stopped: the last iteration improved by less than {settings.min_improvement} %"
    return "stopped: the optimiser finds no better picture than the last"


def run_folder(arguments: argparse.Namespace, settings: Settings) -> int:
    """A run of each photo of a folder, one after another. Returns the exit status.

    What is wrong with all of them is raised before anything is created; what is wrong with one is told, and at the end
    once more, and stops no other.
    """
    free = free_memory(settings.max_memory)
    batch, beside = check_folder(arguments, settings, free)
    for photo in batch.photos:
        with batch.failures(photo):
            photo.check()
            picture_sizes(shape_of(str(photo.path), arguments.allow_large), settings)
    if not batch.left():
        return batch.end()
    weights, source = load_weights(settings.weights, settings.seed, settings.model, arguments.quiet)
    batch.show(f"painting {counted(len(batch.left()), 'photo')} on {describe_device()}; {source}")
    with signals_as_wishes() as received, batch.owned(arguments.report) as note:
        if note and not arguments.quiet:
            tell(note)
        shared = Shared(beside, free, weights, Reuse(), received)
        for photo in batch.left():
            if not received:
                with batch.failures(photo), batch.line_for(photo) as name:
                    photo.ending = run(arguments_for(photo, arguments), settings, shared, name)
                if arguments.report:
                    batch.write_page(arguments.report, arguments.content, arguments.style)
        return batch.end(128 + received[0] if received else 0)


def check_folder(
    arguments: argparse.Namespace, settings: Settings, free: tuple[float, float]
) -> tuple[Batch, dict[str, Any]]:
    """The photos, and the pictures that all share. Raises UserError for what is wrong whatever the photo."""
    folder, results = Path(arguments.content), base_path(os.path.join(arguments.prefix, "")).parent
    batch = Batch(photos_in(folder, results), results, console_for(arguments.quiet).print, arguments.debug)
    common = arguments_for(Photo(folder, results), arguments)
    outputs_of(common).check(input_paths(common, settings), (SMALLEST, SMALLEST))
    if arguments.report:
        batch.check_page(arguments.report)
    beside = read_beside(arguments, settings)
    # What a square photo would be refused for is no photo's fault, but that it is too large.
    square = Pictures(np.zeros((SMALLEST, SMALLEST, 3), np.uint8), **beside)
    with contextlib.suppress(TooLarge):
        planned(square, settings, free=free)
        check_agreement(square, settings)
    if not arguments.quiet and (passed_over := folders_in(folder, results)):
        tell(f"folders in '{folder}' are not looked into: {words(passed_over)}")
    return batch, beside


MASKS = ("style_masks", "content_mask", "color_mask")


def how_it_is_made(
    arguments: argparse.Namespace,
    settings: Settings,
    plan: Plan,
    program: tuple[str, ...] = HERE.program,
    device: str = "CPU",
) -> dict[str, Any]:
    """All that a picture's text says of its command: with the plan as it was, however much memory there is later.

    It does not end early: a run that was gone on with may have made pictures that come after such an end.
    """
    planned = {"tile": str(plan.tile or "off"), "history": plan.history, "max_memory": 0.0, "min_improvement": 0.0}
    return {
        "version": __version__,
        "program": program,
        "settings": dataclasses.asdict(settings) | planned,
        "pictures": [arguments.content, *arguments.style],
        "prefix": arguments.prefix,
        "masks": {name: getattr(arguments, name) for name in MASKS if getattr(arguments, name)},
        "allow_large": arguments.allow_large,
        "backend": (backend := import_keras().backend.backend()),
        "device": device,
        "computed with": computed_with(backend, __version__),
    }


@without_warnings()
def main(
    argv: list[str] | None = None,
    parser: Parser | None = None,
    run_one: Callable[[argparse.Namespace, Settings], Ending] | None = None,
) -> int:
    """The command. Returns its exit status; see the README for what each means.

    Another program's parser may know more arguments than `command_line`, and its `run_one` what to do with them.
    """
    debug = "--debug" in (sys.argv[1:] if argv is None else argv)
    fill_closed_descriptors()
    try:
        arguments = (parser or command_line()).parse_args(argv)
        names = [field.name for field in dataclasses.fields(Settings)]
        settings = Settings(**{name: getattr(arguments, name) for name in names})
        if os.path.isdir(arguments.content) and not run_one:
            return run_folder(arguments, settings)
        return (run_one or run)(arguments, settings).status
    except SystemExit as ending:  # --help and --version
        return int(ending.code or 0)
    except KeyboardInterrupt:
        tell("interrupted; the same command with --resume goes on from what is saved")
        return 130
    except Exception as error:
        tell(f"error: {in_words(error, debug)}")
        return error.status if isinstance(error, UserError) else 1


if __name__ == "__main__":
    leave(main())
