"""--info: a page for the report of a bug. It has to be there where nothing else works.

So what may be missing or broken is imported only where it is asked, and what may end the process in one of its own.
"""

import contextlib
import getpass
import os
import platform
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from deepstyle_support.messages import UserError, printable, reason
from deepstyle_support.system import UNITS, arithmetic_units, cpuinfo, processor_name, version_of

from . import FOLDER

COLUMNS, INDENT = 80, 19
LONGEST = 400  # letters of what is said of one thing: some errors are pages
PATIENCE = 120  # seconds for a package to load, or the device to start
# Each package with the module that shows whether it works; of Keras it is the device's line that shows it.
NEEDED = {
    "tensorflow": "tensorflow",
    "keras": "",
    "numpy": "numpy",
    "scipy": "scipy.optimize",
    "pillow": "PIL.Image",
    "imageio": "imageio.v3",
    "psutil": "psutil",
    "filelock": "filelock",
    "rich": "rich.progress",
    "h5py": "h5py",
    "jinja2": "jinja2",
}
OPTIONAL = {
    "ray": "ray",
    "pillow-heif": "pillow_heif",
    "imageio-ffmpeg": "imageio_ffmpeg",
    "tensorboard": "tensorboard",
    "jax": "jax",
    "torch": "torch",
}
# With the modules of this program, and none of the folder in which it was started.
ON_ITS_OWN = """
import sys
sys.path[:] = [sys.argv[1], *filter(None, sys.path)]
from deepstyle_support.messages import reason
try:
    {}
except Exception as error:
    sys.exit(reason(error))
"""
DEVICE = "from deepstyle_app.info import device; print(device())"


def page() -> str:
    """All of it, in plain lines of 80 columns."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # what takes seconds
        on_device = pool.submit(safely, answer_of, DEVICE)
        packages = dict(zip(NEEDED | OPTIONAL, pool.map(package, NEEDED | OPTIONAL), strict=True))
    sections = {
        f"deepstyle {safely(version)}": machine() | {"device": on_device.result()},
        "packages": {name: packages[name] for name in NEEDED},
        "optional packages": {name: packages[name] for name in OPTIONAL},
        "weights": {model: safely(weights, model) for model in ("vgg16", "vgg19")},
        "environment": environment(),
    }
    return "\n\n".join("\n".join([title, *lines_of(said)]) for title, said in sections.items())


def lines_of(said: dict[str, str]) -> list[str]:
    """What is said of each name, beside it; without the person's name, and the home folder as ~."""
    wrapped = textwrap.TextWrapper(COLUMNS, subsequent_indent=" " * INDENT)
    wrapped.break_long_words = wrapped.break_on_hyphens = False  # so that a path, or a command, can be copied
    lines = []
    for name, text in said.items():
        wrapped.initial_indent = f"  {name} ".ljust(INDENT)
        lines += wrapped.wrap(textwrap.shorten(printable(impersonal(text)), LONGEST, placeholder=" ...") or "''")
    return lines


def impersonal(text: str) -> str:
    """The text with ~ for the home folder, and USER for a folder of the person's name elsewhere."""
    within = r"(?=$|[^\w.-])"
    homes = {os.path.expanduser("~"), os.path.realpath(os.path.expanduser("~"))}
    for home in homes - {os.sep, "~"}:
        text = re.sub(rf"(?<![\w.~-]){re.escape(home)}{within}", "~", text)
    with contextlib.suppress(Exception):  # an account without a name has none to hide; Python raises various errors
        text = re.sub(rf"(?<=[/\\]){re.escape(getpass.getuser())}{within}", "USER", text)
    return text


def safely(tell: Callable[..., str], *given: str) -> str:
    """What it tells, or why it cannot."""
    try:
        return tell(*given)
    except Exception as error:
        return f"unknown: {reason(error)}"


def version() -> str:
    """The program's own, which is read: to import it takes packages."""
    found = re.search(r'^__version__ = "(.*)"', (FOLDER / "deepstyle.py").read_text("utf-8"), re.MULTILINE)
    return found[1] if found else "of an unknown version"


def machine() -> dict[str, str]:
    """What the program runs on, by names in words."""
    return {
        "Python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": safely(system),
        "processor": processor_name(cpuinfo()),
        "its units": safely(units),
        "cores": safely(cores),
        "memory": safely(memory),
        "backend": safely(backend),
    }


def system() -> str:
    """The operating system and its version, as far as it says it."""
    name = ""
    with contextlib.suppress(OSError):  # it is no Linux, or one without such a file
        name = platform.freedesktop_os_release()["PRETTY_NAME"] + ", "
    return name + platform.platform()


def units() -> str:
    found = arithmetic_units()
    if found is None:
        return "unknown: the system does not say which it has"
    return ", ".join(found) or f"none of {', '.join(UNITS)}"


def cores() -> str:
    from deepstyle_support.limits import usable_cores

    return f"{usable_cores()} of {os.cpu_count()} for this process"


def memory() -> str:
    import psutil

    from deepstyle_support.limits import free_main_memory

    return f"{free_main_memory() / 1e9:.1f} GB free of {psutil.virtual_memory().total / 1e9:.1f} GB"


def backend() -> str:
    from deepstyle_support.backend import backend_name

    return backend_name()


def device() -> str:
    """What the backend computes on, its own memory, if it has some, and its --precision; it loads the backend."""
    from deepstyle_support.device import describe_device, fastest_factors, gpu_memory

    free = gpu_memory().free
    memory = f", {free / 1e9:.1f} GB of it free" if free else ""
    return f"{describe_device()}{memory}; with --precision mixed convolutions in {fastest_factors()}"


def package(name: str) -> str:
    """The version of a package, and whether it is of use; how to get it if it is not there."""
    module = (NEEDED | OPTIONAL)[name]
    found = safely(version_of, name)
    if found == "is not installed":
        brings = f"{sys.executable} -m pip install {name}" if name in OPTIONAL else "sh run.sh"
        return f"absent; '{brings}' brings it"
    if not module:
        return found
    try:
        answer_of(f"import {module}")
    except UserError as error:
        return f"{found}, does not load: {error}"
    return found


def answer_of(code: str) -> str:
    """The last line that code of Python prints in a process of its own. Raises UserError if it fails there."""
    command = [sys.executable, "-c", ON_ITS_OWN.format(code), str(FOLDER)]
    try:
        ended = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=PATIENCE
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"nothing came of it in {PATIENCE} seconds") from error
    except OSError as error:
        raise UserError(f"no process can be started: {reason(error)}") from error
    if ended.returncode < 0:
        names = {one.value: one.name for one in signal.Signals}  # not of all that there are
        raise UserError(f"it ends Python by {names.get(-ended.returncode, f'signal {-ended.returncode}')}")
    said = (ended.stderr if ended.returncode else ended.stdout).strip().splitlines()
    if ended.returncode:
        raise UserError(said[-1] if said else f"it ends Python with status {ended.returncode}")
    return said[-1] if said else ""


def weights(model: str) -> str:
    """Where Keras's cache has a network's weights, and whether they are the genuine ones. Nothing is fetched."""
    from deepstyle_support.weights import cache_folder, cached_files

    found = [path for path in cached_files(model) if path.exists()]
    if not found:
        return f"none in {cache_folder()}; the first run that needs them gets them"
    return "; ".join(verdict(path, model) for path in found)


def verdict(path: Path, model: str) -> str:
    """Whether a file of weights is genuine, by the digest that is known of them."""
    from deepstyle_support.weights import read_weights

    try:
        read_weights(path, model)
    except Exception as error:
        return f"{path} is of no use: {reason(error)}"
    return f"{path}, genuine by its {'SHA-256' if model == 'vgg16' else 'MD5'}"


def environment() -> dict[str, str]:
    """The variables that are the program's own; of Ray's address only that there is one."""
    own = {name: value for name, value in sorted(os.environ.items()) if re.match("KERAS_BACKEND$|DEEPSTYLE_", name)}
    if "RAY_ADDRESS" in os.environ:
        own["RAY_ADDRESS"] = "set"
    return own or {"": "KERAS_BACKEND, DEEPSTYLE_... and RAY_ADDRESS are not set"}
