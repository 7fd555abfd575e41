"""What is said to the person at the shell, and in which words; no other output, and nothing is computed here."""

import difflib
import sys
from collections.abc import Collection


class UserError(Exception):
    """Something that is told to the person at the shell in one line, with the exit status."""

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status


def tell(message: str) -> None:
    """Say what is no result, on stderr."""
    print(f"deepstyle: {message}", file=sys.stderr)


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
