"""Where lines and bars are shown: Rich's console on stdout or stderr."""

import os
import shutil
from typing import TYPE_CHECKING, Any, TextIO, cast

from .messages import Stream

if TYPE_CHECKING:
    from rich.console import Console


def console_on(name: str, quiet: bool) -> "Console":
    """Rich's console on stdout or stderr, which shows text as it is: a PREFIX may look like Rich's names of pictures.

    What the stream is, it is itself asked: by FORCE_COLOR and others like it Rich takes a file or a pipe for a
    terminal, and in 0 columns, as COLUMNS may say, it shows nothing.
    """
    from rich.console import Console

    stream = Stream(name)
    looks: dict[str, Any] = {"soft_wrap": True, "markup": False, "highlight": False, "emoji": False}
    is_terminal = stream.isatty() and os.environ.get("TTY_COMPATIBLE") != "0"
    if "COLUMNS" in os.environ or "LINES" in os.environ:  # or else it follows the terminal's size
        looks["width"], looks["height"] = shutil.get_terminal_size()
    return Console(file=cast(TextIO, stream), quiet=quiet, force_terminal=is_terminal, force_jupyter=False, **looks)


def shows_bars(console: "Console") -> bool:
    """Whether it is a terminal that can move its cursor, and is to show something."""
    return console.is_terminal and console.is_interactive and not (console.is_dumb_terminal or console.quiet)
