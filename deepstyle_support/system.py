"""The processor and the packages that there are; no package is loaded to find out."""

import contextlib
import importlib.metadata
import platform
import re
from pathlib import Path

PARTS = ("cpu family", "model", "CPU implementer", "CPU part")  # of what /proc/cpuinfo says, on Intel's, AMD's and ARM
INSTRUCTIONS = re.compile("(sse4|avx|fma|f16c|amx|asimd|sve|sme[0-9]*$|bf16|i8mm)")
# What makes arithmetic fast, in wide vectors or with short numbers, by Linux's names: on x86, and the last on ARM.
UNITS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16")


def cpuinfo() -> dict[str, str]:
    """What Linux says of the first processor; nothing on another system."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return {}


def processor_name(known: dict[str, str]) -> str:
    """What the processor is called; known: from `cpuinfo`."""
    return known.get("model name") or platform.processor() or platform.machine()


def instructions(known: dict[str, str]) -> list[str]:
    """Linux's names for what the processor can do; known: from `cpuinfo`."""
    return (known.get("flags") or known.get("Features") or "").split()  # the second on ARM


def processor() -> str:
    """The processor's name, and its instructions by which libraries choose how they compute, as far as known."""
    known = cpuinfo()
    parts = [f"{part} {known[part]}" for part in PARTS if part in known]
    chosen_by = sorted(filter(INSTRUCTIONS.match, instructions(known)))
    return f"{processor_name(known)} ({', '.join([platform.machine(), *parts])}) {' '.join(chosen_by)}".strip()


def arithmetic_units() -> tuple[str, ...] | None:
    """Those of UNITS that the processor has; None if the system does not say."""
    found = instructions(cpuinfo())
    return tuple(unit for unit in UNITS if unit in found) if found else None


def version_of(module: str) -> str:
    """The version of the package that brings a module: TensorFlow's comes under several names."""
    try:
        return importlib.metadata.version(module)
    except importlib.metadata.PackageNotFoundError:
        names = importlib.metadata.packages_distributions().get(module, [])
        return importlib.metadata.version(names[0]) if names else "is not installed"
