"""That nobody else writes what a run writes: the folders that are made for it, and a lock for each of its files."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from filelock import FileLock, Timeout

from deepstyle_support.messages import UserError

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows, where every file system has locks
    fcntl = None


def lock_file(path: Path) -> Path:
    """The file that is there while a run writes at this path, and that a killed one leaves."""
    real = Path(os.path.realpath(path))
    return real.with_name(f".{real.name}.lock")


@contextlib.contextmanager
def folder_for(path: Path) -> Iterator[None]:
    """Make the folder that path is in; at the end, what was made for it and is empty goes again.

    Raises UserError if it cannot be made.
    """
    folder = Path(os.path.realpath(path)).parent
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        with in_folder(path.parent):
            folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for one in made:
            with contextlib.suppress(OSError):  # something was put into it
                one.rmdir()


@contextlib.contextmanager
def lock_of(path: Path) -> Iterator[str]:
    """Own what is written at this path, by whatever name another process has it. A killed one does not hold it.

    Yields a note for the person, if there is one: some file systems have no locks. Raises UserError if another
    process owns it.
    """
    file = lock_file(path)
    with in_folder(path.parent):
        can_lock = has_locks(file.parent)
    if not can_lock:
        yield f"the file system of '{path.parent}' has no locks: see that no other run writes there"
        return
    lock = FileLock(file)
    try:
        with in_folder(path.parent):
            lock.acquire(timeout=0.1)
    except Timeout as timeout:
        raise UserError(f"another run is writing '{path}'; wait for its end, or choose another name") from timeout
    try:
        yield ""
    finally:
        # While it is held: whoever waits for it finds a new file. Some systems cannot remove an open one.
        with contextlib.suppress(OSError):
            os.unlink(lock.lock_file)
        lock.release()


def has_locks(folder: Path) -> bool:
    """Whether files there can be locked: tried with one of our own, which nobody else can hold. Raises OSError.

    What FileLock does where they cannot depends on its version: it raises, waits in vain, or leaves a file that holds
    others up after a kill.
    """
    if fcntl is None:
        return True
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


@contextlib.contextmanager
def in_folder(folder: Path) -> Iterator[None]:
    """What cannot be done there is a UserError."""
    try:
        yield
    except Timeout:  # which is an OSError, too
        raise
    except OSError as error:
        raise UserError(f"cannot write in the folder '{folder}': {error.strerror or error}") from error
