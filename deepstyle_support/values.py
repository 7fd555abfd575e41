"""What a setting's value may be: text from the command line, or what Python's callers have at hand."""

import argparse
import math
import numbers
import os
import reprlib
from typing import Any

import numpy as np

from .messages import UserError

ON_OFF = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
KINDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}


def value_of(kind: type | dict, text: str) -> Any:
    """What a flag's text stands for: a number, or one of a dict's words. Raises ArgumentTypeError for argparse."""
    try:
        return kind[text.lower()] if isinstance(kind, dict) else kind(text)
    except (KeyError, ValueError):
        expected = " or ".join(kind) if isinstance(kind, dict) else KINDS[kind]
        raise argparse.ArgumentTypeError(f"expected {expected}, not '{text}'") from None


def name_of(text: str) -> str:
    """The name of a file that is to be written. Raises ArgumentTypeError if it is empty, as an unset variable's is."""
    if not text:
        raise argparse.ArgumentTypeError("expected a name, not ''")
    return text


def like_default(flag: str, value: Any, default: Any) -> Any:
    """The value in the kind of the flag's default, which is text or nothing if that is None. Raises UserError.

    Where the default is a tuple, it is one of such values: from a list or an array, or from a single value.
    """
    if default is None:
        return None if value is None else of_kind(flag, value, str)
    if not isinstance(default, tuple):
        return of_kind(flag, value, type(default))
    given = value.tolist() if isinstance(value, np.ndarray) else value
    several = given if isinstance(given, list | tuple) else (given,)
    return tuple(of_kind(flag, one, type(default[0])) for one in several)


def of_kind(flag: str, value: Any, kind: type) -> Any:
    """The value as an int, float, bool or str of Python's own: from NumPy's as well, and from a path.

    Raises UserError if it is of another kind: no number is taken from text, and no whole one from a fraction.
    """
    is_number = isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)
    if kind is bool and str(value).lower() in ON_OFF:
        return ON_OFF[str(value).lower()]
    if kind is str and isinstance(value, str | os.PathLike):
        return str(os.fsdecode(value))
    if kind in (int, float) and is_number:
        try:
            return kind(value)
        except OverflowError:  # a whole number beyond all floats
            return math.inf
    raise UserError(f"{flag} is {reprlib.repr(value)}; it must be {KINDS[kind]}")
