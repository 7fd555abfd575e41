"""Files that are whole or absent."""

import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from .messages import UserError


def write_whole(path: Path, write: Callable) -> None:
    """Call write(file) for a file that appears at `path` whole or not at all, even if we are killed.

    Raises UserError, status 1, if the disk does not take it.
    """
    # A name of its own: another process may be writing the same file, such as the weights in a shared cache.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot write '{path}': {error.strerror or error}", status=1) from error
