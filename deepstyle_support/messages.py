"""What is said to the person at the shell, and in which words; no other output, and nothing is computed here."""

import contextlib
import difflib
import errno
import os
import sys
import traceback
from collections.abc import Callable, Collection, Iterator
from typing import Any, TextIO, cast


class UserError(Exception):
    """Something that is told to the person at the shell in one line, with the exit status."""

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status


class Stream:
    """stdout or stderr, to write to whatever happens to it: it may be closed, or unable to show a letter.

    Who has stopped listening silences the program and nothing else.
    """

    def __init__(self, name: str):
        self.stream: TextIO | None = getattr(sys, name)
        self.full: OSError | None = None  # why not all was written, if there was no room for it

    @property
    def encoding(self) -> str:
        return getattr(self.stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        if self.stream:
            shown = text.encode(self.encoding, "backslashreplace").decode(self.encoding)
            self._try(self.stream.write, shown)
        return len(text)

    def flush(self) -> None:
        if self.stream:
            self._try(self.stream.flush)

    def _try(self, act: Callable, *given: str) -> None:
        try:
            act(*given)
        except (OSError, ValueError) as error:  # a pipe without a reader, a terminal that is gone, a closed file
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                self.full = cast(OSError, error)
            with contextlib.suppress(OSError, ValueError, AttributeError), open(os.devnull, "wb") as nowhere:
                # Or else Python complains at its end that it cannot write what is left.
                os.dup2(nowhere.fileno(), self.stream.fileno())  # type: ignore[union-attr]
            self.stream = None

    def isatty(self) -> bool:
        try:
            return bool(self.stream and self.stream.isatty())
        except ValueError:  # it is closed
            return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def describe_error(error: Exception, debug: bool) -> str:
    """What went wrong, in one line; with `debug` its traceback is shown as well."""
    if debug:
        traceback.print_exception(error, file=cast(TextIO, Stream("stderr")))
    known = isinstance(error, UserError | MemoryError | ModuleNotFoundError)
    return reason(error) + ("" if known else "; --debug shows where")


def reason(error: BaseException) -> str:
    """What went wrong, in one line."""
    said = " ".join(str(error).split())
    if isinstance(error, UserError):
        return said
    if isinstance(error, ModuleNotFoundError) and error.name:
        return lacks_package(error.name)
    if isinstance(error, MemoryError):
        return f"memory ran out{f': {said}' if said else ''}; a lower --image_size or --max_memory needs less"
    return ": ".join(part for part in (type(error).__name__, said) if part)


def lacks_package(name: str | None) -> str:
    """What is said of a package that the program needs and Python has not."""
    return f"this Python has no package {name}; 'sh run.sh --setup' makes one that has it, 'pip install .' installs it"


def notify(message: str) -> None:
    """Say what is no result, on stderr."""
    print_line(f"deepstyle: {message}", "stderr")


def print_line(text: str, where: str = "stdout") -> OSError | None:
    """A line on stdout or stderr. Returns what is wrong if that is a file, and there is no room for it."""
    stream = Stream(where)
    stream.write(f"{text}\n")
    stream.flush()
    return stream.full


def answer(text: str) -> None:
    """What was asked for, on stdout. Raises UserError, status 1, if it goes to a disk that has no room for it."""
    if full := print_line(text):
        raise UserError(f"cannot write to stdout: {full.strerror}", status=1)


def printable(text: str) -> str:
    """Without what would end the line or move the terminal's cursor: a file can have any name."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def as_typed(value: object) -> str:
    """A setting's value as it is written on the command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


@contextlib.contextmanager
def silenced_stderr() -> Iterator[None]:
    """Nothing written to file descriptor 2 within is shown, by C++ code either."""
    Stream("stderr").flush()
    try:
        shown = os.dup(2)
    except OSError:  # there is none
        yield
        return
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(shown, 2)
        os.close(shown)


def counted(number: int, thing: str) -> str:
    """So many of a thing, in words: 1 file, 2 files."""
    return f"{number} {thing}{'s' * (number != 1)}"


def require_choice(flag: str, value: object, choices: Collection[object]) -> None:
    """Raise UserError, naming the nearest valid value, unless `value` is one of `choices`."""
    names = [str(choice) for choice in choices]
    if value not in choices:
        nearest = difflib.get_close_matches(str(value), names, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise UserError(f"{flag} is '{value}'; it must be one of {', '.join(names)}{hint}")
