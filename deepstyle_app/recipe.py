"""How a picture was made: what its text says of that, and the command that makes it again."""

import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from deepstyle import __version__
from deepstyle_support.backend import import_keras
from deepstyle_support.convolution import FULL
from deepstyle_support.engine import Engine
from deepstyle_support.messages import UserError, as_typed, printable
from deepstyle_support.reading import harmless
from deepstyle_support.rounding import computed_with, what_differs

from . import FOLDER
from .job import Job


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How all pictures of a run are made; it stands in each picture's text, and in the report."""

    settings: dict[str, Any]
    pictures: list[str]  # the content and the styles, as they were typed
    prefix: str
    masks: dict[str, Any]  # by their flags
    allow_large: bool
    backend: str
    device: str = "CPU"  # or another's name, if sums there are rounded in another order from run to run
    computed_with: dict[str, str] = dataclasses.field(default_factory=dict)  # from rounding.computed_with
    workers: int = 1
    version: str = __version__

    @classmethod
    def of(cls, job: Job, engine: Engine, device: str = "CPU") -> "Recipe":
        """That of a job: with the plan as it was, however much memory there is later.

        It does not end early: a run that was gone on with may have made pictures that come after such an end.
        """
        backend = import_keras().backend.backend()
        precision = "full" if engine.factors(job.settings.precision) == FULL else "mixed"
        planned = {"tile": str(engine.plan.tile or "off"), "history": engine.plan.history, "precision": precision}
        return cls(
            settings=dataclasses.asdict(job.settings) | planned | {"max_memory": 0.0, "min_improvement": 0.0},
            pictures=[job.content, *job.style],
            prefix=job.prefix,
            masks=job.masks(),
            allow_large=job.allow_large,
            backend=backend,
            device=device,
            workers=job.workers,
            computed_with=computed_with(backend, __version__),
        )

    @classmethod
    def from_text(cls, text: dict[str, Any]) -> "Recipe":
        """That in a picture's text. Raises KeyError if it does not say all of it."""
        # 0.2.0 had a program of its own for workers, which its text names, with its flags.
        program = text.get("program", [])
        return cls(
            settings=text["settings"],
            pictures=text["pictures"],
            prefix=text["prefix"],
            masks=text["masks"],
            allow_large=text["allow_large"],
            backend=text["backend"],
            workers=text.get("workers", int(program[-1]) if len(program) > 1 else 1),
        )

    def as_text(self) -> dict[str, Any]:
        """What of it stands in a picture's text."""
        text = dataclasses.asdict(self)
        return {"version": text.pop("version"), "computed with": text.pop("computed_with"), **text}

    def command(self, defaults: dict[str, Any], encoding: str = "utf-8") -> str:
        """A command line that makes the same pictures, as a POSIX shell takes it.

        defaults: of the settings; encoding: that of what it is shown on.
        """
        command = [*program(), *map(as_argument, [*self.pictures, self.prefix])]
        for name, value in (self.settings | self.masks).items():
            default = defaults.get(name)
            if value is not None and (default is None or as_typed(value) != as_typed(default)):
                command += [f"--{name}", *map(as_argument, value if isinstance(value, list | tuple) else [value])]
        command += ["--workers", str(self.workers)] * (self.workers > 1)
        command += ["--allow_large"] * self.allow_large
        backend = [] if self.backend == "tensorflow" else ["env", f"KERAS_BACKEND={self.backend}"]
        return " ".join(in_shell(word, encoding) for word in backend + command)


def program() -> list[str]:
    """What a command line begins with, as it works in this folder: the installed command if that is what runs.

    Else it is the file of the program, with the Python of the environment that run.sh has made, if that is what runs:
    no other has the packages, as far as is known.
    """
    if os.path.basename(sys.argv[0]).removesuffix(".exe") == "deepstyle":
        return ["deepstyle"]
    from_here = Path() if Path.cwd() == FOLDER else FOLDER
    is_of_run_sh = Path(sys.prefix).resolve() == (FOLDER / ".venv").resolve()
    own = (from_here / ".venv").joinpath(*Path(sys.executable).parts[-2:])
    return [own.as_posix() if is_of_run_sh else "python", (from_here / "deepstyle.py").as_posix()]


def read_text(path: str) -> dict[str, Any]:
    """What a picture's text says of how it was made. Raises UserError if it says nothing."""
    try:
        with harmless(lifted=True), Image.open(path) as picture:  # only its text is read
            return {"made with": picture.info["Software"], **json.loads(picture.info["deepstyle"])}
    except OSError as error:
        raise UserError(f"cannot read the picture '{path}': {error.strerror or error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"'{path}' does not say how it was made; only deepstyle's own PNG files do") from error


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
    text = read_text(path)
    try:
        # 0.2.0 wrote the command itself, and nothing of what it was computed with.
        command = text.pop("command") if "command" in text else Recipe.from_text(text).command(defaults, encoding)
        at = f" at {text['at']}" if "at" in text else ""
        with_what = text.get("computed with")
        if with_what:
            otherwise = what_differs(with_what, computed_with(text["backend"], version))
            close = how_close(text["exact"], text["device"], otherwise)
        else:
            close = how_close(text["exact"]) + ", if all is computed as it was, which it does not say"
        explained = f"this {close}, as its iteration {text['iteration']}{at}:"
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"'{path}' does not say how it was made, or not all of it") from error
    said = text | (with_what or {})
    lines = [printable(f"{name}: {value}") for name, value in said.items() if isinstance(value, str | float | int)]
    return "\n".join([*lines, explained, command])
