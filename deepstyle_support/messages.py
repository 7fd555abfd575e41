"""What is said to the person at the shell, and in which words; no other output, and nothing is computed here."""

import contextlib
import difflib
import os
import sys
import traceback
from collections.abc import Callable, Collection
from typing import Any, TextIO


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

    def write(self, text: str) -> int:
        if self.stream:
            encoding = getattr(self.stream, "encoding", None) or "utf-8"
            self._try(self.stream.write, text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        if self.stream:
            self._try(self.stream.flush)

    def _try(self, act: Callable, *given: str) -> None:
        try:
            act(*given)
        except (OSError, ValueError):  # a pipe without a reader, a terminal that is gone, a closed file
            with contextlib.suppress(OSError, ValueError, AttributeError):
                # Or else Python complains at its end that it cannot write what is left.
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())  # type: ignore[union-attr]
            self.stream = None

    def isatty(self) -> bool:
        return bool(self.stream) and self.stream.isatty()  # type: ignore[union-attr]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def in_words(error: Exception, debug: bool) -> str:
    """What went wrong, in one line; with `debug` its traceback is shown as well."""
    if debug:
        traceback.print_exception(error)
    if isinstance(error, MemoryError):
        return f"memory ran out{f': {error}' if str(error) else ''}; a lower --image_size or --max_memory needs less"
    message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}; --debug shows where"
    return " ".join(message.split())


def tell(message: str) -> None:
    """Say what is no result, on stderr."""
    say(f"deepstyle: {message}", "stderr")


def say(text: str, where: str = "stdout") -> None:
    """A line on stdout or stderr."""
    stream = Stream(where)
    stream.write(f"{text}\n")
    stream.flush()


def words(value: object) -> str:
    """A setting's value as it is written on the command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def require_choice(flag: str, value: object, choices: Collection[object]) -> None:
    """Raise UserError, naming the nearest valid value, unless `value` is one of `choices`."""
    names = [str(choice) for choice in choices]
    if value not in choices:
        nearest = difflib.get_close_matches(str(value), names, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise UserError(f"{flag} is '{value}'; it must be one of {', '.join(names)}{hint}")
