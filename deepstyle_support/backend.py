"""Keras and what differs from one of its backends to the next: loading it, how exactly it computes, how it
differentiates, how it says that memory has run out."""

import contextlib
import functools
import importlib
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from .limits import left_by_ulimits
from .messages import UserError, lacks_package, require_choice, silenced_stderr

BACKENDS = ("tensorflow", "jax", "torch")
# What is set in the environment before Keras is loaded, unless the person has set it.
ENVIRONMENT = {
    "TF_CPP_MIN_LOG_LEVEL": "3",
    # TensorFlow uses oneDNN by itself only on CPUs with AVX-512 VNNI; measured on one with AVX2, an evaluation takes
    # 0.75 of the time with it, and 0.8 of the memory.
    "TF_ENABLE_ONEDNN_OPTS": "1",
    # SciPy's own threads would wait busily on the cores that TensorFlow computes on; measured with two cores, an
    # evaluation takes 0.63 of the time without them at 32 rows and 0.97 at 200.
    "OPENBLAS_NUM_THREADS": "1",
    # On a GPU take what is needed: TensorFlow would take all the memory at once, and JAX three quarters of it.
    "TF_FORCE_GPU_ALLOW_GROWTH": "true",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}
MIN_TO_LOAD = 0.3e9  # bytes beside what is reserved: with TensorFlow less than 0.2 is too little, and 0.4 enough


def import_keras() -> ModuleType:
    """Keras on its backend, loaded only when there is something to compute: it takes seconds."""
    if "keras" not in sys.modules:
        asked = os.environ.get("KERAS_BACKEND")
        if asked:  # else Keras's own settings say it, and if they do not, it is TensorFlow
            require_choice("KERAS_BACKEND", asked, BACKENDS)
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        expect_room(asked or "its backend")
        try:
            with silenced_stderr():  # what TensorFlow says before it has read its log level
                importlib.import_module("keras")
        except Exception as error:  # a backend that is unknown, not installed, or broken
            raise why_not_loaded(error, asked) from error
        if not asked:
            require_choice("the backend of Keras's keras.json", sys.modules["keras"].backend.backend(), BACKENDS)
        use_one_gpu(sys.modules["keras"].backend.backend())
    compute_in_full(sys.modules["keras"].backend.backend())
    return sys.modules["keras"]


def expect_room(backend: str) -> None:
    """Raise UserError, status 1, if a ulimit leaves too little to load Keras: TensorFlow would end the process."""
    for name, left in left_by_ulimits().items():
        if left < MIN_TO_LOAD:
            raise UserError(f"'{name}' leaves too little memory to load Keras with {backend}; raise it", status=1)


def why_not_loaded(error: Exception, asked: str | None) -> UserError:
    """What kept Keras from loading with the backend that KERAS_BACKEND asked for, or with its own, told as what it is.

    Raises UserError if Keras's settings name a backend that does not serve.
    """
    path, settings = keras_settings()
    backend = asked or settings.get("backend", BACKENDS[0])
    if not asked:
        require_choice(f"the backend in '{path}'", backend, BACKENDS)
    said = str(error) or type(error).__name__
    if isinstance(error, MemoryError) or any(phrase in said for phrase in ("failed to map segment", "llocate memory")):
        limits = " or ".join(left_by_ulimits()) or "what else runs here"
        return UserError(f"memory ran out while Keras was loaded with {backend}: {said}; see to {limits}", status=1)
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing and missing not in BACKENDS:
        return UserError(lacks_package(missing))
    named = f"KERAS_BACKEND={backend}" if asked else f"{backend}, its backend"
    other = "KERAS_BACKEND=tensorflow is what run.sh installs" if backend != BACKENDS[0] else "'sh run.sh' installs it"
    if missing:
        return UserError(f"Keras cannot use {named}: Python has no package {missing}; {other}")
    if isinstance(error, ImportError):
        return UserError(f"Keras cannot use {named}: it is installed, but broken: {said}; {other}")
    return UserError(f"Keras cannot use {named}, or its settings in '{path}': {said}; {other}")


def keras_settings() -> tuple[Path, dict[str, Any]]:
    """Keras's keras.json, as Keras itself looks for it, and what is in it; nothing if it cannot be read."""
    home = os.path.expanduser("~")
    folder = Path(home if os.access(home, os.W_OK) else tempfile.gettempdir(), ".keras")
    path = Path(os.environ.get("KERAS_HOME") or folder, "keras.json")
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError):
        settings = {}
    return path, settings if isinstance(settings, dict) else {}


def backend_name() -> str:
    """The backend that Keras computes with, or would, if it were loaded."""
    if "keras" in sys.modules:
        return sys.modules["keras"].backend.backend()
    return os.environ.get("KERAS_BACKEND") or keras_settings()[1].get("backend", BACKENDS[0])


def use_one_gpu(backend: str) -> None:
    """Let the backend see the GPU that it computes on, the first: it would take some memory on each of the others.

    PyTorch does not. Nothing is changed if the backend has its devices already.
    """
    if backend == "tensorflow":
        import tensorflow as tf

        with contextlib.suppress(RuntimeError):
            tf.config.set_visible_devices(tf.config.list_physical_devices("GPU")[:1], "GPU")
    elif backend == "jax":
        import jax

        with contextlib.suppress(RuntimeError, AttributeError):
            jax.config.update("jax_cuda_visible_devices", "0")  # of those in CUDA_VISIBLE_DEVICES


@functools.cache
def compute_in_full(backend: str) -> None:
    """Let convolutions and matrix products use all 24 bits of a float32's mantissa, for this process.

    TensorFlow, JAX and cuDNN, and so PyTorch, otherwise round their factors to TF32's 11 bits on NVIDIA GPUs since
    Ampere. Emulated on a CPU, the gradient was then off by 0.9 %, and 600 evaluations ended at twice the loss.
    """
    if backend == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.enable_tensor_float_32_execution(False)
    elif backend == "jax":
        import jax

        jax.config.update("jax_default_matmul_precision", "highest")  # which is for convolutions as well
    else:
        compute_in_full_with_torch()


def compute_in_full_with_torch() -> None:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns of these two since 2.9, and yet checks them against the others
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    if hasattr(torch.backends, "fp32_precision"):
        # Each by its name: what is set above them does not reach cudnn.conv.
        backends: Any = torch.backends  # whose types do not tell of cudnn.conv
        backends.cuda.matmul.fp32_precision = "ieee"
        backends.cudnn.conv.fp32_precision = "ieee"


def out_of_memory(error: BaseException) -> bool:
    """Whether it says that the memory asked for was not to be had, on the backend's device or here.

    TensorFlow raises ResourceExhaustedError, JAX JaxRuntimeError, PyTorch OutOfMemoryError or, on a CPU, RuntimeError;
    CUDA's libraries run out with messages of their own.
    """
    kind = type(error)
    if isinstance(error, MemoryError) or kind.__name__ in ("ResourceExhaustedError", "OutOfMemoryError"):
        return True
    from_a_backend = isinstance(error, RuntimeError) or kind.__module__.startswith("tensorflow.")
    said = ("RESOURCE_EXHAUSTED", "out of memory", "OUT_OF_MEMORY", "STATUS_ALLOC_FAILED", "can't allocate memory")
    return from_a_backend and any(phrase in str(error) for phrase in said)


def differentiable(parts: Callable) -> Callable:
    """Compile parts(x, ...) -> {name: scalar} into (x, ...) -> ({name: float}, gradient of their sum by x, a tensor).

    x and what comes behind it are arrays, or dicts of arrays. The only code that knows how a backend differentiates.
    """
    keras = import_keras()

    def summed(x: Any, *given: Any) -> tuple[Any, dict[str, Any]]:
        values = parts(x, *given)
        return sum(values.values(), keras.ops.zeros((), "float32")), values

    compiled = {"tensorflow": with_tensorflow, "jax": with_jax, "torch": with_torch}[keras.backend.backend()](summed)

    def evaluate(*given: Any) -> tuple[dict[str, float], Any]:
        values, gradient = compiled(*to_tensors(given))
        together = as_array(keras.ops.stack([*values.values()])) if values else ()  # a GPU is waited for once
        return dict(zip(values, map(float, together), strict=True)), gradient

    return evaluate


def as_array(x: Any) -> np.ndarray:
    """An array as it is, a tensor of the backend copied into one."""
    return x if isinstance(x, np.ndarray) else import_keras().ops.convert_to_numpy(x)


def to_tensors(structure: Any) -> Any:
    """A structure (a tuple, a dict, ...) with its arrays as tensors of the backend."""
    keras = import_keras()
    return keras.tree.map_structure(keras.ops.convert_to_tensor, structure)


def to_arrays(structure: Any) -> Any:
    """A structure (a tuple, a dict, ...) with its tensors as arrays; all else as it is."""
    keras = import_keras()
    return keras.tree.map_structure(lambda one: as_array(one) if keras.ops.is_tensor(one) else one, structure)


def all_finite(x: Any) -> bool:
    """Whether an array or a tensor, where it is, holds numbers only."""
    if isinstance(x, np.ndarray):
        return bool(np.isfinite(x).all())
    ops = import_keras().ops
    return bool(ops.all(ops.isfinite(x)))


def on_cpu() -> bool:
    """Whether the backend computes on the processor."""
    keras, outside = import_keras(), contextlib.nullcontext()
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        outside = tf.init_scope()  # while a function is traced its tensors have no device
    with outside:
        return "cpu" in str(keras.ops.zeros(()).device).lower()


@functools.cache
def compile_once(function: Callable) -> Callable:
    """A function of tensors, compiled by TensorFlow or JAX for the whole process; PyTorch does not compile."""
    if import_keras().backend.backend() == "tensorflow":
        import tensorflow as tf

        # A sum of 21 vectors takes 0.4 to 0.65 of the time by XLA on a CPU, since none of the products is stored. On a
        # GPU XLA needs more of CUDA than TensorFlow itself.
        return tf.function(function, autograph=False, jit_compile=on_cpu())
    import jax

    return jax.jit(function)


def done_before(tensor: Any) -> contextlib.AbstractContextManager:
    """What is computed within is computed when the tensor is there; only TensorFlow would not wait by itself."""
    if import_keras().backend.backend() != "tensorflow":
        return contextlib.nullcontext()
    import tensorflow as tf

    return tf.control_dependencies([tensor])


def add_to_rows(x: Any, rows: np.ndarray, values: Any) -> Any:
    """x with values added at the rows, of which none comes twice. x: (n, C), an intermediate result, may be lost."""
    backend = import_keras().backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.raw_ops.InplaceAdd(x=x, i=rows, v=values)  # its scatter functions copy x
    if backend == "jax":
        return x.at[rows].add(values)
    import torch

    return x.index_add(0, torch.as_tensor(rows, device=x.device), values)


def with_tensorflow(summed: Callable) -> Callable:
    import tensorflow as tf

    if not tf.config.list_physical_devices("GPU"):
        # TensorFlow's graph optimiser makes some sums of gradients add in the order of arrival, so that pictures
        # would differ from run to run. It brings no speed here: measured, 1.0 of the time without it.
        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    tf.get_logger().setLevel("ERROR")  # it warns of several shapes, one for each kind of tile

    @tf.function(autograph=False)
    def traced(x: Any, *given: Any) -> tuple[dict[str, Any], Any]:
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss, values = summed(x, *given)
        return values, tape.gradient(loss, x, unconnected_gradients="zero")

    # TensorFlow enters each custom gradient that it traces in a registry, and with it keeps the whole graph for good,
    # though nobody asks for it again: measured, 12 MB more for each small picture of another size, 4 MB without them.
    registry = tensorflow_gradients()

    def compiled(*given: Any) -> tuple[dict[str, Any], Any]:
        known = set(registry)
        try:
            return traced(*given)
        finally:
            for name in set(registry) - known:
                del registry[name]

    return compiled


def tensorflow_gradients() -> dict[str, Any]:
    """TensorFlow's own table of gradients, by name; an empty one in a version that has it elsewhere."""
    try:
        from tensorflow.python.framework import ops

        return ops.gradient_registry._registry
    except (ImportError, AttributeError):
        return {}


def with_jax(summed: Callable) -> Callable:
    import jax

    differentiated = jax.jit(jax.value_and_grad(summed, has_aux=True))

    def compiled(*given: Any) -> tuple[dict[str, Any], Any]:
        (_, values), gradient = differentiated(*given)
        return values, gradient

    return compiled


def with_torch(summed: Callable) -> Callable:
    import torch

    def compiled(x: Any, *given: Any) -> tuple[dict[str, Any], Any]:
        x = x.detach().requires_grad_()
        loss, values = summed(x, *given)
        # Where every weight is 0 there is nothing to differentiate.
        gradient = torch.autograd.grad(loss, x)[0] if loss.requires_grad else torch.zeros_like(x)
        return {name: value.detach() for name, value in values.items()}, gradient

    return compiled
