"""What the backend computes on, and how: no GPU is needed, since stand-ins take the places of drivers and devices."""

import ctypes
import functools
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from deepstyle_support import backend, device
from deepstyle_support.backend import out_of_memory
from deepstyle_support.device import LIBRARIES, Memory, cuda_memory, describe_device, gpu_memory

ROOT = Path(__file__).parent.parent
BACKENDS = ["tensorflow", "jax", "torch"]
GB = 10**9


def in_a_process(name, script, **environment):
    """What the script prints, as JSON, with Keras on the backend of this name; skipped if it is not installed."""
    if not importlib.util.find_spec(name):
        pytest.skip(f"{name} is not installed")
    given = {name: value for name, value in os.environ.items() if not name.startswith(("TF_FORCE", "XLA_PYTHON"))}
    given |= {"KERAS_BACKEND": name, "PYTHONPATH": str(ROOT)} | environment
    script = "import json, os, sys\nfrom deepstyle_support.backend import *\nimport_keras()\n" + script
    ended = subprocess.run([sys.executable, "-c", script], env=given, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


LOOK = {
    "tensorflow": """
import tensorflow as tf
from tensorflow.python.eager import context
found["rounded"] = tf.config.experimental.tensor_float_32_execution_enabled()
found["started"] = context.context()._initialized
found["one GPU"] = len(tf.config.get_visible_devices("GPU")) <= 1
found["all at once"] = os.environ["TF_FORCE_GPU_ALLOW_GROWTH"]
""",
    "jax": """
import jax
from jax._src import xla_bridge
found["rounded"] = jax.config.jax_default_matmul_precision != "highest"
found["started"] = bool(xla_bridge._backends)
found["one GPU"] = jax.config._read("jax_cuda_visible_devices") == "0"
found["all at once"] = os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"]
""",
    "torch": """
import torch
found["rounded"] = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
""",
}


@functools.cache
def after_loading(name):
    """What is so in a process that has loaded Keras with the backend of this name, and how it runs out of memory."""
    run_out = """
try:
    import_keras().ops.zeros((2**50,))
except Exception as error:
    found["error"] = [type(error).__name__, out_of_memory(error)]
print(json.dumps(found))
"""
    return in_a_process(name, "found = {}\n" + LOOK[name] + run_out)


@pytest.mark.parametrize("name", BACKENDS)
def test_products_and_convolutions_are_not_rounded_to_tf32(name):
    assert after_loading(name)["rounded"] is False


@pytest.mark.parametrize("name", ["tensorflow", "jax"])
def test_one_gpu_is_seen_and_not_started_before_it_is_needed(name):
    found = after_loading(name)
    assert (found["one GPU"], found["started"]) == (True, False)


@pytest.mark.parametrize(
    ("name", "variable", "wanted", "other"),
    [
        ("tensorflow", "TF_FORCE_GPU_ALLOW_GROWTH", "true", "false"),
        ("jax", "XLA_PYTHON_CLIENT_PREALLOCATE", "false", "true"),
    ],
)
def test_a_gpus_memory_is_not_taken_all_at_once_unless_the_user_wants_it(name, variable, wanted, other):
    assert after_loading(name)["all at once"] == wanted
    assert in_a_process(name, f"print(json.dumps(os.environ['{variable}']))", **{variable: other}) == other


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backends_own_error_is_known_as_memory_that_ran_out(name):
    kind = {"tensorflow": "ResourceExhaustedError", "jax": "JaxRuntimeError", "torch": "RuntimeError"}[name]
    assert after_loading(name)["error"] == [kind, True]


def test_jax_convolves_in_full_as_well():
    script = """
import jax, deepstyle
from deepstyle_support.convolution import convolve, kernel_on_device
import numpy as np
kernel = kernel_on_device(np.ones((3, 3, 4, 5), np.float32), "zeros")
traced = str(jax.make_jaxpr(lambda x: deepstyle.gram_matrix(convolve(x, kernel)[0]))(np.ones((1, 8, 8, 4), np.float32)))
kinds = [kind for kind in ("conv_general_dilated[", "dot_general[") if kind in traced]
print(json.dumps([kinds, traced.count("Precision.HIGHEST"), traced.count("precision=None")]))
"""
    kinds, highest, default = in_a_process("jax", script)
    assert len(kinds) == 2
    assert highest >= 2
    assert default == 0


@pytest.mark.parametrize(
    ("error", "known"),
    [
        (MemoryError(), True),
        (type("OutOfMemoryError", (RuntimeError,), {"__module__": "torch"})("CUDA out of memory. Tried ..."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (type("InternalError", (Exception,), {"__module__": "tensorflow.python"})("CUBLAS_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("shapes do not agree"), False),
        (ValueError("out of memory"), False),
    ],
    ids=repr,
)
def test_errors_that_mean_that_memory_ran_out(error, known):
    assert out_of_memory(error) is known


# The driver's library, as cuda_memory calls it


class Driver:
    """A stand-in for libcuda.so.1, which fails at the function of this name."""

    def __init__(self, fails=""):
        self.fails, self.called = fails, []

    def __getattr__(self, name):
        def function(*given):
            self.called.append(name)
            if name == "cuMemGetInfo_v2":
                given[0]._obj.value, given[1]._obj.value = 60 * GB, 85 * GB
            return 999 * (name == self.fails)

        return function


def with_driver(monkeypatch, driver):
    def load(name):
        if driver is None:
            raise OSError(f"{name}: cannot open shared object file")
        return driver

    monkeypatch.setattr(ctypes, "CDLL", load)


def test_cudas_driver_says_what_is_free_on_the_first_visible_gpu(monkeypatch):
    driver = Driver()
    with_driver(monkeypatch, driver)
    assert cuda_memory() == Memory(60 * GB, 85 * GB)
    assert driver.called[-2:] == ["cuCtxPopCurrent_v2", "cuDevicePrimaryCtxRelease_v2"]


@pytest.mark.parametrize("fails", ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuMemGetInfo_v2"])
def test_a_driver_that_fails_is_an_oserror_and_nothing_is_held(monkeypatch, fails):
    driver = Driver(fails)
    with_driver(monkeypatch, driver)
    with pytest.raises(OSError, match=f"{fails} of CUDA's driver failed with error 999"):
        cuda_memory()
    assert ("cuDevicePrimaryCtxRelease_v2" in driver.called) == (fails == "cuMemGetInfo_v2")


# What is asked of whom


def test_without_a_sign_of_a_gpu_the_backend_is_not_loaded_to_ask_it(monkeypatch):
    monkeypatch.setattr(device, "may_have_a_gpu", lambda: False)
    monkeypatch.setattr(device, "import_keras", lambda: pytest.fail("it takes seconds"))
    assert gpu_memory() == Memory(0, 0)


def test_a_gpu_that_the_backend_does_not_use_does_not_count(monkeypatch):
    monkeypatch.setattr(device, "may_have_a_gpu", lambda: True)  # and nvidia-smi would tell of it
    monkeypatch.setattr(device, "tensorflow_memory", lambda: pytest.fail("it is not TensorFlow's"))
    assert "cpu" in str(backend.import_keras().ops.zeros(()).device).lower()
    assert gpu_memory() == Memory(0, 0)
    assert describe_device() == f"{os.cpu_count()} CPU cores with tensorflow"


@pytest.mark.parametrize("names", [["nvidia0"], ["dxg"], ["kfd"], []])
def test_a_gpus_file_is_a_sign_of_it(tmp_path, monkeypatch, names):
    for name in [*names, "nvme0", "null"]:
        (tmp_path / name).touch()
    monkeypatch.setattr(device, "Path", lambda path: tmp_path)
    monkeypatch.setenv("PATH", "")
    assert device.may_have_a_gpu() is bool(names)


def on_a_gpu(monkeypatch, name, driver=None, **modules):
    """Let the backend of this name compute on a GPU; stand-ins for modules take their places."""
    keras = types.SimpleNamespace(backend=types.SimpleNamespace(backend=lambda: name))
    monkeypatch.setattr(device, "import_keras", lambda: keras)
    monkeypatch.setattr(device, "may_have_a_gpu", lambda: True)
    monkeypatch.setattr(device, "on_cpu", lambda: False)
    with_driver(monkeypatch, driver)
    for module, stand_in in modules.items():
        monkeypatch.setitem(sys.modules, module, stand_in)


def tensorflow_with(info, name="NVIDIA L4"):
    def get_memory_info(device):
        if isinstance(info, Exception):
            raise info
        return info

    experimental = types.SimpleNamespace(
        get_memory_info=get_memory_info, get_device_details=lambda gpu: {"device_name": name} if name else {}
    )
    config = types.SimpleNamespace(experimental=experimental, get_visible_devices=lambda kind: ["GPU:0"])
    return types.SimpleNamespace(config=config)


def test_tensorflow_may_use_what_is_free_and_what_it_holds_in_vain(monkeypatch):
    tensorflow = tensorflow_with({"current": 1 * GB, "peak": 5 * GB})
    on_a_gpu(monkeypatch, "tensorflow", Driver(), tensorflow=tensorflow)
    assert gpu_memory() == Memory((60 + 4) * GB - LIBRARIES, 85 * GB)
    assert describe_device() == "NVIDIA L4 (85.0 GB) with tensorflow"


@pytest.mark.parametrize(
    ("driver", "info"),
    [(None, {"current": 0, "peak": 0}), (Driver("cuInit"), {"current": 0, "peak": 0}), (Driver(), ValueError())],
    ids=["no driver: AMD's or Apple's", "a broken driver", "a device of a plugin"],
)
def test_a_gpu_that_does_not_say_its_memory_counts_as_if_it_had_none(monkeypatch, driver, info):
    on_a_gpu(monkeypatch, "tensorflow", driver, tensorflow=tensorflow_with(info, name=""))
    assert gpu_memory() == Memory(0, 0)
    assert describe_device() == "the GPU with tensorflow"


@pytest.mark.parametrize(
    ("driver", "stats", "memory"),
    [
        (Driver(), {"bytes_limit": 64 * GB, "bytes_in_use": 1 * GB}, Memory(60 * GB - LIBRARIES, 85 * GB)),
        (Driver(), {"bytes_limit": 40 * GB, "bytes_in_use": 1 * GB}, Memory(39 * GB - LIBRARIES, 85 * GB)),
        (Driver(), None, Memory(60 * GB - LIBRARIES, 85 * GB)),
        (None, {"bytes_limit": 16 * GB, "bytes_in_use": 1 * GB}, Memory(15 * GB - LIBRARIES, 16 * GB)),
        (None, None, Memory(0, 0)),
    ],
    ids=["CUDA has less", "JAX may take less", "JAX says nothing", "no CUDA", "nobody says"],
)
def test_jax_may_use_no_more_than_its_limit_and_what_is_free(monkeypatch, driver, stats, memory):
    gpu = types.SimpleNamespace(memory_stats=lambda: stats, device_kind="NVIDIA L4")
    on_a_gpu(monkeypatch, "jax", driver, jax=types.SimpleNamespace(devices=lambda: [gpu]))
    assert gpu_memory() == memory
    assert describe_device().startswith("NVIDIA L4")


def test_pytorch_says_itself_what_is_free(monkeypatch):
    cuda = types.SimpleNamespace(
        is_available=lambda: True,
        mem_get_info=lambda number: (10 * GB, 24 * GB),
        memory_reserved=lambda number: 8 * GB,
        memory_allocated=lambda number: 3 * GB,
        get_device_name=lambda number: "AMD Radeon",
    )
    on_a_gpu(monkeypatch, "torch", torch=types.SimpleNamespace(cuda=cuda))
    assert gpu_memory() == Memory(15 * GB - LIBRARIES, 24 * GB)
    assert describe_device() == "AMD Radeon (24.0 GB) with torch"
    cuda.is_available = lambda: False  # on Apple's
    assert gpu_memory() == Memory(0, 0)
    assert describe_device() == "the GPU with torch"


def test_a_gpu_that_is_full_has_no_room_but_is_still_one(monkeypatch):
    monkeypatch.setattr(device, "tensorflow_memory", lambda: Memory(1 * GB, 24 * GB))
    on_a_gpu(monkeypatch, "tensorflow")
    assert 0 < gpu_memory().free < 2
