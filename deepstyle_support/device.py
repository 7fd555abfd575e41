"""The device that Keras's backend computes on: its name, and the memory that it has beside the machine's own."""

import contextlib
import ctypes
import functools
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from .backend import import_keras, on_cpu
from .limits import usable_cores
from .system import arithmetic_units


class Memory(NamedTuple):
    """Bytes of a GPU; both 0 if there is none, or if it shares the machine's memory, or does not say."""

    free: float = 0
    total: float = 0


# What a device of these names is beside the processor: NVIDIA's, on a Jetson and in Windows' Linux too, and AMD's.
FILES_OF_GPUS = ("nvidia*", "nvhost*", "dxg", "kfd")

# TensorFlow leaves 1.5 GiB to CUDA's libraries (MinSystemMemory in its gpu_device.cc, for GPUs since Ampere); they need
# as much under JAX and PyTorch.
LIBRARIES = 1536 * 2**20


def gpu_memory() -> Memory:
    """The memory of the GPU that the backend computes on, less what CUDA's libraries will take.

    The backend is asked, since only it knows whether it computes there: a build for CPUs does not, nor any with an
    empty CUDA_VISIBLE_DEVICES. It takes seconds to load, so it is asked only on a machine that may have a GPU.
    """
    if not may_have_a_gpu() or on_cpu():
        return Memory()
    memory = {"tensorflow": tensorflow_memory, "jax": jax_memory, "torch": torch_memory}[
        import_keras().backend.backend()
    ]()
    return memory._replace(free=max(memory.free - LIBRARIES, 1.0)) if memory.total else memory


def may_have_a_gpu() -> bool:
    """Whether anything points to a GPU with memory of its own; nothing is loaded or started. Apple's have none."""
    found = any(True for names in FILES_OF_GPUS for _ in Path("/dev").glob(names))
    return found or shutil.which("nvidia-smi") is not None


def describe_device() -> str:
    """What the backend computes on, in words: "2 CPU cores with jax", "NVIDIA L4 (23.7 GB) with tensorflow"."""
    backend = import_keras().backend.backend()
    if on_cpu():
        cores = usable_cores()
        return f"{cores} CPU core{'s' * (cores > 1)} with {backend}"
    total = gpu_memory().total
    return f"{gpu_name()}{f' ({total / 1e9:.1f} GB)' if total else ''} with {backend}"


def gpu_name() -> str:
    """What the backend calls the GPU that it computes on."""
    backend, name = import_keras().backend.backend(), ""
    if backend == "tensorflow":
        import tensorflow as tf

        gpus = tf.config.get_visible_devices("GPU")
        name = tf.config.experimental.get_device_details(gpus[0]).get("device_name", "") if gpus else ""
    elif backend == "jax":
        import jax

        name = jax.devices()[0].device_kind
    else:
        import torch

        name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
    return name or "the GPU"


def tensorflow_memory() -> Memory:
    """What CUDA says, and what TensorFlow holds and does not use: it gives nothing back until it ends."""
    import tensorflow as tf

    with contextlib.suppress(OSError, ValueError, RuntimeError):
        memory = cuda_memory()
        used = tf.config.experimental.get_memory_info("GPU:0")
        return memory._replace(free=memory.free + used["peak"] - used["current"])
    return Memory()


def jax_memory() -> Memory:
    """What JAX may still take, of which CUDA may have less; without CUDA (AMD's GPUs, TPUs), what JAX may take."""
    import jax

    said = jax.devices()[0].memory_stats() or {}
    limit, used = said.get("bytes_limit", 0), said.get("bytes_in_use", 0)
    with contextlib.suppress(OSError):
        memory = cuda_memory()
        free = memory.free + said.get("peak_bytes_in_use", used) - used
        return memory._replace(free=min(free, limit - used) if limit else free)
    return Memory(limit - used, limit)


def torch_memory() -> Memory:
    """What CUDA, or AMD's HIP, says, and what PyTorch holds and does not use. Apple's GPUs share the machine's."""
    import torch

    if not torch.cuda.is_available():
        return Memory()
    free, total = torch.cuda.mem_get_info(0)
    return Memory(free + torch.cuda.memory_reserved(0) - torch.cuda.memory_allocated(0), total)


def cuda_memory() -> Memory:
    """The memory of the first GPU that CUDA shows this process; it heeds CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER.

    TensorFlow does not say what is free, nor JAX. CUDA's driver does, which both have loaded: nvidia-smi would tell of
    all GPUs, in an order of its own. Raises OSError if there is no driver, or it fails (CUDA Driver API, cuMemGetInfo).
    """
    cuda = ctypes.CDLL("libcuda.so.1")
    device, context, free, total = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()

    def call(name: str, *given: object) -> None:
        if error := getattr(cuda, name)(*given):
            raise OSError(f"{name} of CUDA's driver failed with error {error}")

    call("cuInit", 0)
    call("cuDeviceGet", ctypes.byref(device), 0)
    # The context that the backends use as well, so that no other is made.
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    try:
        call("cuCtxPushCurrent_v2", context)
        try:
            call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        finally:
            call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
    finally:
        call("cuDevicePrimaryCtxRelease_v2", device)
    return Memory(free.value, total.value)


@functools.cache
def fastest_factors() -> str:
    """The type of numbers that the device multiplies fastest where it adds the products up in float32.

    That is bfloat16 where there is a unit for it, else float32.
    """
    return "bfloat16" if (cpu_multiplies_bfloat16() if on_cpu() else gpu_multiplies_bfloat16()) else "float32"


def cpu_multiplies_bfloat16() -> bool:
    """Whether the processor has AVX512-BF16, AMX or ARM's BF16, and the backend uses it.

    False where the system does not say. With JAX an evaluation takes 0.99 of the time, so it is no use there.
    """
    if import_keras().backend.backend() == "jax":
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(arithmetic_units() or ())


def gpu_multiplies_bfloat16() -> bool:
    """Whether the GPU has matrix units for bfloat16: NVIDIA's do since Ampere, of compute capability 8."""
    backend = import_keras().backend.backend()
    if backend == "torch":
        import torch

        # AMD's that PyTorch supports have them.
        return torch.cuda.is_available() and (bool(torch.version.hip) or torch.cuda.get_device_capability() >= (8, 0))
    if backend == "tensorflow":
        import tensorflow as tf

        gpus = tf.config.get_visible_devices("GPU")
        details = tf.config.experimental.get_device_details(gpus[0]) if gpus else {}
        return details.get("compute_capability", (0, 0)) >= (8, 0)
    import jax

    device = jax.devices()[0]
    capability = re.match(r"\d+", str(getattr(device, "compute_capability", "")))  # of AMD's it is a name
    return device.platform == "tpu" or (capability is not None and int(capability[0]) >= 8)
