"""What decides how sums are rounded, and so whether the same command makes the same picture to the last bit."""

import os
import re

from .backend import ENVIRONMENT
from .limits import usable_cores
from .system import processor, version_of

PACKAGES = {"tensorflow": ("tensorflow",), "jax": ("jax", "jaxlib"), "torch": ("torch",)}  # of each backend
# What chooses other threads or instructions in the libraries that compute.
VARIABLE = re.compile("(TF_NUM_|TF_ENABLE_ONEDNN_|TF_XLA_|OMP_|MKL_|ONEDNN_|DNNL_|OPENBLAS_|NPY_).*|NPROC|XLA_FLAGS")


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


def what_differs(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """What was computed otherwise before than it would be now, in words."""
    return [f"{name}: {before.get(name, '')}; now {now[name]}" for name in now if before.get(name) != now[name]]
