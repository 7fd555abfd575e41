"""Files that are whole or absent."""

import contextlib
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from .messages import UserError

try:
    import fcntl
except ImportError:  # Windows, which removes no file that is open
    fcntl = None  # type: ignore[assignment]


def write_whole(path: Path, write: Callable) -> None:
    """Call write(file) for a file that appears at `path` whole or not at all, even if we are killed.

    Raises UserError, status 1, if the disk does not take it.
    """
    try:
        with unfinished(path) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            if not fcntl:
                file.close()  # Windows renames no file that is open; elsewhere it is locked until it has its name
            rename(file.name, path)
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror or error}", status=1) from error


def rename(name: str, path: Path) -> None:
    """Give a file its name. On Windows a browser that just loads the page which it replaces is in the way."""
    for seconds in () if fcntl else (0.05, 0.2, 1.0):
        with contextlib.suppress(PermissionError):
            os.replace(name, path)
            return
        time.sleep(seconds)
    os.replace(name, path)


@contextlib.contextmanager
def unfinished(path: Path) -> Iterator[BinaryIO]:
    """A new file beside `path`, locked while it is open, and removed at the end unless it was renamed."""
    file = begun(path)
    while not claimed(file):
        file.close()
        file = begun(path)
    try:
        with file:
            yield file
    finally:
        with contextlib.suppress(OSError):
            os.unlink(file.name)


def begun(path: Path) -> BinaryIO:
    # A name of its own: another process may be writing the same file, such as the weights in a shared cache.
    return open(path.with_name(f".{path.name}.{secrets.token_hex(4)}.part"), "xb")


def claimed(file: BinaryIO) -> bool:
    """Lock a file that was just begun; False if `remove_unfinished` took it for a killed process's before that."""
    try:
        lock(file)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks, where `remove_unfinished` removes nothing
    return os.path.exists(file.name)


def remove_unfinished(path: Path) -> None:
    """Remove what killed processes have left of writing `path`; what a living one is writing stays."""
    pattern = re.compile(re.escape(f".{path.name}") + r"(\.[0-9a-f]{8})?\.part")
    for part in path.parent.glob(".*.part"):
        if pattern.fullmatch(part.name):
            with contextlib.suppress(OSError):  # it is being written, or gone, or not ours to remove
                if not fcntl:
                    part.unlink()
                    continue
                with open(part, "r+b") as file:
                    lock(file)
                    part.unlink()


def lock(file: BinaryIO) -> None:
    """Lock an open file until it is closed. Raises OSError if it is locked, or the disk has no locks."""
    if fcntl:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
