"""How a picture says what made it, and the command that makes it again."""

import json
import os
import shlex
from collections.abc import Sequence
from typing import Any

from PIL import Image

from deepstyle_support.messages import UserError, printable, words
from deepstyle_support.reading import harmless
from deepstyle_support.rounding import computed_with, what_differs


def read_made(path: str) -> dict[str, Any]:
    """What a picture's text says of how it was made. Raises UserError if it says nothing."""
    try:
        with harmless(lifted=True), Image.open(path) as picture:  # only its text is read
            return {"made with": picture.info["Software"], **json.loads(picture.info["deepstyle"])}
    except OSError as error:
        raise UserError(f"cannot read the picture '{path}': {error.strerror or error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"'{path}' does not say how it was made; only deepstyle's own PNG files do") from error


def command_again(made: dict[str, Any], defaults: dict[str, Any], encoding: str = "utf-8") -> str:
    """A command line that makes the same pictures, from what a picture's text says, as a POSIX shell takes it.

    encoding: that of what it is shown on.
    """
    program, *own_flags = made.get("program", ["deepstyle.py"])
    command = ["python", program, *map(as_argument, [*made["pictures"], made["prefix"]]), *own_flags]
    for name, value in (made["settings"] | made["masks"]).items():
        default = defaults.get(name)
        if value is not None and (default is None or words(value) != words(default)):
            command += [f"--{name}", *map(as_argument, value if isinstance(value, list | tuple) else [value])]
    command += ["--allow_large"] * made["allow_large"]
    backend = [] if made["backend"] == "tensorflow" else ["env", f"KERAS_BACKEND={made['backend']}"]
    return " ".join(in_shell(word, encoding) for word in backend + command)


def as_argument(value: object) -> str:
    """A value on the command line, where a name that begins with a dash would be taken for a flag."""
    is_like_flag = isinstance(value, str) and value.startswith("-")
    return os.path.join(os.curdir, str(value)) if is_like_flag else str(value)


def in_shell(word: str, encoding: str) -> str:
    """One word of a POSIX shell's command, in letters that can be read, copied and shown in this encoding.

    Where it has others, printf makes them, byte by byte: a file's name may be no text at all.
    """
    if shown(word, encoding):
        return shlex.quote(word)
    letters = word.rstrip("\n")
    ends = word[len(letters) :]  # at its end the shell leaves out what printf makes
    parts = [f'"$(printf {shlex.quote("".join(for_printf(letter, encoding) for letter in letters))})"'] * bool(letters)
    return "".join(parts + [shlex.quote(ends)] * bool(ends))


def for_printf(letter: str, encoding: str) -> str:
    """A letter in printf's format: itself, or its bytes in octal. An interactive shell expands ! in double quotes."""
    if shown(letter, encoding) and letter not in "%\\!":
        return letter
    return "".join(f"\\{byte:03o}" for byte in os.fsencode(letter))


def shown(text: str, encoding: str) -> bool:
    """Whether it consists of letters that can be shown in the encoding."""
    return text.isprintable() and text == text.encode(encoding, "ignore").decode(encoding)


def how_close(exact: bool, device: str = "CPU", otherwise: Sequence[str] = ()) -> str:
    """What the command does, in words.

    exact: whether it makes the same picture where all is computed as it was. device: what the picture was computed on,
    "CPU" or another's name; otherwise: what was done otherwise than it would be done now.
    """
    if not exact:
        why = "the run was stopped, or short of memory, on the way"
    elif device != "CPU":
        why = f"it was computed on {device}, where sums are rounded in another order from run to run"
    elif otherwise:
        why = f"it was computed otherwise ({'; '.join(otherwise)})"
    else:
        return "makes it again"
    return f"comes close to it, not bit for bit, since {why}"


def description(path: str, defaults: dict[str, Any], version: str, encoding: str) -> str:
    """How a picture was made, in lines, with a command that makes it again, or comes close to it where it is run now.

    defaults: of the settings; version: deepstyle's; encoding: that of what it is shown on. Raises UserError if the
    picture does not say how it was made.
    """
    made = read_made(path)
    try:
        # 0.2.0 wrote the command itself, and nothing of what it was computed with.
        command = made.pop("command") if "command" in made else command_again(made, defaults, encoding)
        at = f" at {made['at']}" if "at" in made else ""
        with_what = made.get("computed with")
        if with_what:
            otherwise = what_differs(with_what, computed_with(made["backend"], version))
            close = how_close(made["exact"], made["device"], otherwise)
        else:
            close = how_close(made["exact"]) + ", if all is computed as it was, which it does not say"
        explained = f"this {close}, as its iteration {made['iteration']}{at}:"
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"'{path}' does not say how it was made, or not all of it") from error
    said = made | (with_what or {})
    lines = [printable(f"{name}: {value}") for name, value in said.items() if isinstance(value, str | float | int)]
    return "\n".join([*lines, explained, command])
