"""How a picture says what made it, and the command that makes it again."""

import json
import shlex
from typing import Any

from PIL import Image

from .messages import UserError, words
from .reading import harmless


def read_made(path: str) -> dict[str, Any]:
    """What a picture's text says of how it was made. Raises UserError if it says nothing."""
    try:
        with harmless(lifted=True), Image.open(path) as picture:  # only its text is read
            return {"made with": picture.info["Software"], **json.loads(picture.info["deepstyle"])}
    except OSError as error:
        raise UserError(f"cannot read the picture '{path}': {error.strerror or error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"'{path}' does not say how it was made; only deepstyle's own PNG files do") from error


def command_again(made: dict[str, Any], defaults: dict[str, Any]) -> str:
    """A command line that makes the same pictures, from what a picture's text says."""
    program, *own_flags = made.get("program", ["deepstyle.py"])
    command = ["python", program, *made["pictures"], made["prefix"], *own_flags]
    for name, value in (made["settings"] | made["masks"]).items():
        if words(value) != words(defaults.get(name)):
            command += [f"--{name}", *map(str, value if isinstance(value, list | tuple) else [value])]
    command += ["--allow_large"] * made["allow_large"]
    backend = [] if made["backend"] == "tensorflow" else ["env", f"KERAS_BACKEND={made['backend']}"]
    return shlex.join(backend + command)


def how_close(exact: bool) -> str:
    """What the command does, in words; exact: whether it makes the same picture."""
    return (
        "makes it again"
        if exact
        else "comes close to it, not bit for bit, since the run was stopped, or short of memory, on the way"
    )


def description(path: str, defaults: dict[str, Any]) -> str:
    """How a picture was made, in lines, with a command that makes it again. Raises UserError if it does not say."""
    made = read_made(path)
    try:
        # 0.2.0 wrote the command itself.
        command = made.pop("command") if "command" in made else command_again(made, defaults)
        at = f" at {made['at']}" if "at" in made else ""
        explained = f"this {how_close(made['exact'])}, as its iteration {made['iteration']}{at}:"
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"'{path}' does not say how it was made, or not all of it") from error
    lines = [f"{name}: {value}" for name, value in made.items() if isinstance(value, str | float | int)]
    return "\n".join([*lines, explained, command])
