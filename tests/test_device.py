"""What the backend computes on, and how: no GPU is needed, since stand-ins take the places of drivers and devices."""

import ctypes
import functools
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from deepstyle_support import backend, device, rounding, system
from deepstyle_support.backend import out_of_memory
from deepstyle_support.device import LIBRARIES, Memory, cuda_memory, describe_device, gpu_memory
from deepstyle_support.limits import usable_cores
from deepstyle_support.messages import UserError

pytestmark = pytest.mark.xdist_group("device")  # whose processes are started once
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
    """What is so in a process that has loaded Keras with the backend of this name."""
    return in_a_process(name, f"found = {{}}\n{LOOK[name]}\nprint(json.dumps(found))")


@pytest.mark.endurance  # processes that are started cold, for what a GPU alone would do
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


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param("tensorflow", "ResourceExhaustedError", marks=pytest.mark.endurance),  # it tries for ten seconds
        ("jax", "JaxRuntimeError"),
        ("torch", "RuntimeError"),
    ],
)
def test_a_backends_own_error_is_known_as_memory_that_ran_out(name, kind):
    run_out = """
try:
    import_keras().ops.zeros((2**50,))
except Exception as error:
    print(json.dumps([type(error).__name__, out_of_memory(error)]))
"""
    assert in_a_process(name, run_out) == [kind, True]


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


@pytest.mark.parametrize(
    ("error", "asked", "said", "status"),
    [
        (MemoryError(), None, "memory ran out while Keras was loaded with tensorflow: MemoryError", 1),
        (ImportError("libx.so: failed to map segment from shared object"), "jax", "memory ran out .* with jax", 1),
        (ImportError("libx.so: cannot allocate memory in static TLS block"), None, "memory ran out", 1),
        (ModuleNotFoundError(name="torch"), "torch", "KERAS_BACKEND=torch: Python has no package torch; KERAS_", 2),
        (ModuleNotFoundError(name="tensorflow"), None, "tensorflow, its backend: .* no package tensorflow; 'sh run", 2),
        (
            ModuleNotFoundError(name="keras"),
            "tensorflow",
            "^this Python has no package keras; 'sh run.sh --setup' makes one that has it",
            2,
        ),
        (
            ModuleNotFoundError(name="absl"),
            None,
            "^this Python has no package absl; 'sh run.sh --setup' makes one that has it",
            2,
        ),
        (ImportError("undefined symbol: x"), "jax", "KERAS_BACKEND=jax: it is installed, but broken: undefined", 2),
        (ValueError("Invalid `epsilon`"), None, r"its settings in '.*keras\.json': Invalid `epsilon`", 2),
        (AssertionError(), None, r"its settings in '.*keras\.json': AssertionError", 2),
    ],
    ids=repr,
)
def test_what_stops_a_backend_is_told_as_what_it_is(monkeypatch, tmp_path, error, asked, said, status):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    told = backend.why_not_loaded(error, asked)
    assert re.search(said, str(told))
    assert told.status == status


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ('{"backend": "jaxx"}', "is 'jaxx'; it must be one of tensorflow, jax, torch; did you mean jax"),
        ('{"backend": "jax"}', "Keras cannot use jax, its backend"),
        ("[]", "Keras cannot use tensorflow, its backend, or its settings in"),
        ("{", "Keras cannot use tensorflow, its backend, or its settings in"),
    ],
)
def test_the_backend_of_keras_json_is_named_when_it_does_not_serve(monkeypatch, tmp_path, settings, said):
    (tmp_path / "keras.json").write_text(settings)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    try:
        told = backend.why_not_loaded(ValueError("no such thing"), None)
    except UserError as error:
        told = error
    assert said in str(told)


def test_with_too_little_memory_under_a_ulimit_keras_is_not_even_begun(monkeypatch):
    monkeypatch.setattr(backend, "left_by_ulimits", lambda: {"ulimit -v": 2.9e8})
    with pytest.raises(UserError, match="'ulimit -v' leaves too little memory to load Keras with jax") as caught:
        backend.expect_room("jax")
    assert caught.value.status == 1
    monkeypatch.setattr(backend, "left_by_ulimits", lambda: {"ulimit -v": 4e8})
    backend.expect_room("jax")


# What pictures depend on to the bit


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="there is no such thing here")
def test_only_cores_that_the_process_may_use_count(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {5})
    assert usable_cores() == 1
    assert describe_device().startswith("1 CPU core with ")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 5})
    assert describe_device().startswith("3 CPU cores with ")
    assert rounding.computed_with("jax", "1")["CPU cores"] == "3"
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cores() == 64


def test_versions_of_all_that_computes_count(monkeypatch):
    versions = {name: f"{n}.0" for n, name in enumerate(("jax", "jaxlib", "keras", "numpy", "scipy", "pillow"))}
    monkeypatch.setattr(system.importlib.metadata, "version", versions.__getitem__)
    expected = ", ".join(f"{name} {number}" for name, number in ({"deepstyle": "9"} | versions).items())
    assert rounding.computed_with("jax", "9")["packages"] == expected


def test_tensorflow_has_a_version_by_whatever_name_it_is_installed(monkeypatch):
    def version(name):
        if name == "tensorflow":
            raise system.importlib.metadata.PackageNotFoundError
        return f"that of {name}"

    monkeypatch.setattr(system.importlib.metadata, "version", version)
    monkeypatch.setattr(system.importlib.metadata, "packages_distributions", lambda: {"tensorflow": ["tf_nightly"]})
    assert system.version_of("tensorflow") == "that of tf_nightly"
    monkeypatch.setattr(system.importlib.metadata, "packages_distributions", dict)
    assert system.version_of("tensorflow") == "is not installed"


def test_the_processors_instructions_count_and_not_its_speed(monkeypatch):
    cpu = "model name\t: X\ncpu family : 6\ncpu MHz : {}\nflags : fpu avx2 smep {} sse4_1\n\nmodel name : other"
    found = []
    for speed, more in ((1000, "fma"), (2000, "fma"), (1000, "fma avx512f")):
        said = cpu.format(speed, more)
        monkeypatch.setattr(system.Path, "read_text", lambda path, said=said: said)
        found.append(system.processor())
    assert found[0] == found[1] == f"X ({platform.machine()}, cpu family 6) avx2 fma sse4_1"
    assert found[2] == f"X ({platform.machine()}, cpu family 6) avx2 avx512f fma sse4_1"


def test_without_proc_the_processor_is_what_python_calls_it(monkeypatch):
    def missing(path):
        raise FileNotFoundError

    monkeypatch.setattr(system.Path, "read_text", missing)
    monkeypatch.setattr(system.platform, "processor", lambda: "arm")
    assert system.processor() == f"arm ({platform.machine()})"


@pytest.mark.parametrize(
    "name",
    ["TF_NUM_INTRAOP_THREADS", "OMP_NUM_THREADS", "NPROC", "XLA_FLAGS", "DNNL_MAX_CPU_ISA", "TF_ENABLE_ONEDNN_OPTS"],
)
def test_what_the_environment_says_of_threads_and_instructions_counts(monkeypatch, name):
    monkeypatch.delenv(name, raising=False)
    before = rounding.computed_with("tensorflow", "1")
    monkeypatch.setenv(name, "0")
    now = rounding.computed_with("tensorflow", "1")
    (differs,) = rounding.what_differs(before, now)
    assert differs.startswith("environment: ")
    assert f"{name}=0" in differs.split("; now ")[1]
    monkeypatch.setenv("HOME", "/elsewhere")
    assert rounding.what_differs(now, rounding.computed_with("tensorflow", "1")) == []


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
    cores = usable_cores()
    assert describe_device() == f"{cores} CPU core{'s' * (cores > 1)} with tensorflow"


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
