"""What the system lets this process have: cores of the processor, and memory. Nothing is loaded to find out."""

import contextlib
import os
import re
import sys
from pathlib import Path

import psutil

# Addresses that are reserved beyond the memory that is used, by the libraries, by each core's threads and for what they
# allocate: what VmPeak was above VmHWM, with TensorFlow 2.21 and JAX 0.9 at 32 to 1000 rows. It was 1.5 GB on one core,
# 1.7 on two, 2.3 with eight threads.
ADDRESSES, ADDRESSES_OF_A_CORE = 1.45e9, 0.12e9
# The same of VmData, which leaves out the libraries' code: 0.3 GB less than VmHWM at 32 rows on one core, 0.1 with
# eight threads, but in tiles hardly any less than what is planned.
DATA, DATA_OF_A_CORE = -0.1e9, 0.03e9
# What is freed is not given back in one piece: in small tiles more addresses are taken, the longer it computes. At 700
# rows a plan of 2.5 GB still fitted at the start of an iteration, and not at its end.
FRAGMENTED = 1.15


def usable_cores() -> int:
    """The processor's cores that this process may use: taskset or a container's cpuset may leave it some of them.

    A cgroup's quota of their time does not count: no backend has fewer threads for it.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def left_by_ulimits() -> dict[str, float]:
    """Bytes of memory that `ulimit -v` and `ulimit -d` leave this process, by these names, where they are set.

    They limit addresses and not memory, so what a backend only reserves is taken off, unless it is loaded and has it.
    Not known but on Linux.
    """
    left: dict[str, float] = {}
    process, cores, loaded = psutil.Process(), usable_cores(), "keras" in sys.modules
    with contextlib.suppress(AttributeError, OSError, psutil.Error):
        used = process.memory_info()
        for name, limit, taken, reserved in (
            ("ulimit -v", psutil.RLIMIT_AS, used.vms, ADDRESSES + ADDRESSES_OF_A_CORE * cores),
            ("ulimit -d", psutil.RLIMIT_DATA, used.data, DATA + DATA_OF_A_CORE * cores),
        ):
            most, _ = process.rlimit(limit)
            if most != psutil.RLIM_INFINITY:
                left[name] = max(0.0, most - taken - (0 if loaded else reserved)) / FRAGMENTED
    return left


def left_by_cgroups() -> list[float]:
    """What each cgroup that this process is in, or that holds one it is in, leaves of its limit; on Linux only."""
    root = Path("/sys/fs/cgroup")
    left: list[float] = []
    own: list[list[str]] = []
    with contextlib.suppress(OSError):
        own = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    for _, controllers, name in [*own, ["", "", "/"], ["", "memory", "/"]]:
        version_1 = "memory" in controllers
        limit, use = ("limit_in_bytes", "usage_in_bytes") if version_1 else ("max", "current")
        top = root / "memory" if version_1 else root
        for folder in (top / name.lstrip("/"), *(top / name.lstrip("/")).parents):
            with contextlib.suppress(OSError, ValueError):  # there is no such file, or it says "max"
                most, used = (int((folder / f"memory.{what}").read_text()) for what in (limit, use))
                # What files leave in memory is given up when it is needed.
                cached = re.search(r"^(?:total_)?inactive_file (\d+)", (folder / "memory.stat").read_text(), re.M)
                left.append(most - used + (int(cached[1]) if cached else 0))
    return left


def free_main_memory() -> float:
    """Bytes that this process can have: what the machine has free, or less if a cgroup or a ulimit leaves less."""
    return min([psutil.virtual_memory().available, *left_by_cgroups(), *left_by_ulimits().values()])
