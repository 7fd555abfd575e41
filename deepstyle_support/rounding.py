"""What decides how sums are rounded, and so whether the same command makes the same picture to the last bit."""

import contextlib
import importlib.metadata
import os
import platform
import re
from pathlib import Path

from .backend import ENVIRONMENT
from .limits import usable_cores

PACKAGES = {"tensorflow": ("tensorflow",), "jax": ("jax", "jaxlib"), "torch": ("torch",)}  # of each backend
# What chooses other threads or instructions in the libraries that compute.
VARIABLE = re.compile("(TF_NUM_|TF_ENABLE_ONEDNN_|TF_XLA_|OMP_|MKL_|ONEDNN_|DNNL_|OPENBLAS_|NPY_).*|NPROC|XLA_FLAGS")
PARTS = ("cpu family", "model", "CPU implementer", "CPU part")  # of what /proc/cpuinfo says, on Intel's, AMD's and ARM
INSTRUCTIONS = re.compile("(sse4|avx|fma|f16c|amx|asimd|sve|sme[0-9]*$|bf16|i8mm)")


def computed_with(backend: str, version: str) -> dict[str, str]:
    """By names in words: the cores, the processor, the versions and the environment that a picture is computed with.

    backend: its name; nothing of it is loaded. version: deepstyle's.
    """
    packages = {name: version_of(name) for name in (*PACKAGES[backend], "keras", "numpy", "scipy", "pillow")}
    return {
        "CPU cores": str(usable_cores()),
        "processor": processor(),
        "packages": ", ".join(f"{name} {number}" for name, number in ({"deepstyle": version} | packages).items()),
        "environment": " ".join(f"{name}={value}" for name, value in sorted(variables().items())),
    }


def variables() -> dict[str, str]:
    """What the environment says of threads and instructions, with what is so if it says nothing."""
    return {name: value for name, value in (ENVIRONMENT | os.environ).items() if VARIABLE.fullmatch(name)}


def processor() -> str:
    """The processor's name, and its instructions by which libraries choose how they compute, as far as known."""
    known: dict[str, str] = {}
    with contextlib.suppress(OSError):  # there is no such file but on Linux
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        known = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    name = known.get("model name") or platform.processor() or platform.machine()
    parts = [f"{part} {known[part]}" for part in PARTS if part in known]
    flags = (known.get("flags") or known.get("Features") or "").split()
    instructions = sorted(filter(INSTRUCTIONS.match, flags))
    return f"{name} ({', '.join([platform.machine(), *parts])}) {' '.join(instructions)}".strip()


def version_of(module: str) -> str:
    """The version of the package that brings a module: TensorFlow's comes under several names."""
    try:
        return importlib.metadata.version(module)
    except importlib.metadata.PackageNotFoundError:
        names = importlib.metadata.packages_distributions().get(module, [])
        return importlib.metadata.version(names[0]) if names else "is not installed"


def what_differs(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """What was computed otherwise before than it would be now, in words."""
    return [f"{name}: {before.get(name, '')}; now {now[name]}" for name in now if before.get(name) != now[name]]
