"""How a file is fetched, from an address or from the package index, and what is seen of that."""

import contextlib
import http.client
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from .console import console_on, shows_bars
from .messages import UserError, notify

PATIENCE = 20  # seconds: a firewall that swallows packets would hold us for minutes
LINE_EVERY = 10  # seconds, where there is no bar

Progress = Callable[[int], None]  # told how many bytes there are


@contextlib.contextmanager
def shown_progress(size: int, quiet: bool) -> Iterator[Progress]:
    """What to tell how many of the `size` bytes there are: on a terminal it moves a bar, elsewhere it adds lines."""
    from rich import progress

    console = console_on("stderr", quiet)
    if not shows_bars(console):  # Rich 13 would end a bar that it does not show with an empty line
        yield told_in_lines(size, quiet)
        return
    columns = progress.BarColumn(), progress.DownloadColumn(), progress.TimeRemainingColumn(), "left"
    with progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=size)
        yield lambda count: bar.update(task, completed=count)


def told_in_lines(size: int, quiet: bool) -> Progress:
    """What to tell how many of the `size` bytes there are, and says so in a line now and then."""
    said = time.monotonic()

    def on_bytes(count: int) -> None:
        nonlocal said
        if not quiet and time.monotonic() > said + LINE_EVERY:
            said = time.monotonic()
            notify(f"{megabytes(count)} of {megabytes(size)}")

    return on_bytes


def megabytes(size: int) -> str:
    return f"{size / 10**6:.0f} MB"


def download(url: str, path: Path, progress: Progress) -> None:
    """Fetch what is at an address. Raises UserError."""
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE) as source, open(path, "wb") as file:
            size = int(source.headers.get("Content-Length") or 0)
            while block := source.read(2**16):
                file.write(block)
                progress(file.tell())
            if file.tell() < size:
                raise UserError(f"the connection ended after {megabytes(file.tell())} of {megabytes(size)}")
    except urllib.error.HTTPError as error:
        raise UserError(f"the server says {error.code}, {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        cause = getattr(error, "reason", error)  # of a URLError
        raise UserError(str(getattr(cause, "strerror", None) or cause or type(error).__name__)) from error


def download_package(package: str, folder: Path, progress: Progress) -> Path:
    """Fetch a package's wheel with pip, as pip is set up, without a word of pip's own. Raises UserError."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    # What pip has of the file lies in its temporary folder, which is ours: so its size is seen, and nothing is left.
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))
    command += ["--no-cache-dir", "--dest", str(folder), package]
    pip = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    said = None
    try:
        while said is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                said = pip.communicate(timeout=0.2)[1]
            progress(largest_wheel(folder))
    finally:
        pip.kill()
        pip.wait()
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or not wheels:
        raise UserError(why_pip_failed(said, pip.returncode, package))
    return wheels[0]


def largest_wheel(folder: Path) -> int:
    """The size of the largest wheel in a folder that pip is writing to."""
    with contextlib.suppress(OSError):  # pip has just moved it
        return max((path.stat().st_size for path in folder.rglob("*.whl")), default=0)
    return 0


def why_pip_failed(said: str, status: int, package: str) -> str:
    """What pip said on stderr of a package that nobody has asked for, in words for who wants the weights."""
    if "No module named pip" in said:
        return "this Python has no pip"
    if "No matching distribution" in said:
        return f"no index that pip can reach has {package}, which holds the same weights"
    return (said.strip().splitlines() or [f"pip ended with status {status}"])[-1]
