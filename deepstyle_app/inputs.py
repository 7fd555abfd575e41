"""The pictures that a command names, read as they come, with what is to be said of them."""

import functools
import os
from argparse import Namespace
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from deepstyle_support.messages import require_choice, tell, words
from deepstyle_support.pictures import Pictures
from deepstyle_support.reading import read_picture
from deepstyle_support.transparency import laid_on


class Named(Protocol):
    """What of a run's settings names a file, or concerns what is read; the fields of Settings with these names."""

    @property
    def init_image(self) -> str: ...
    @property
    def background(self) -> str | None: ...
    @property
    def weights(self) -> str | None: ...
    @property
    def style_weight(self) -> tuple[float, ...]: ...


def read_start(
    settings: Named, read: Callable[[str], np.ndarray] = lambda path: read_picture(path)[0]
) -> np.ndarray | None:
    """The picture that --init_image names. Raises UserError if it is none, nor one of the words that it takes."""
    known = ("content", "recolored", "noise", "gray")
    if settings.init_image in known:
        return None
    if not os.path.exists(settings.init_image):
        require_choice("--init_image", settings.init_image, (*known, "a picture's path"))
    return laid_on(read(settings.init_image), settings.background)


def input_paths(arguments: Namespace, settings: Named) -> list[str]:
    """All files that are read, as they were given."""
    masks = [*arguments.style_masks, arguments.content_mask, arguments.color_mask]
    paths = [arguments.content, *arguments.style, *masks, settings.weights, settings.init_image]
    return [path for path in paths if path]


def read_inputs(arguments: Namespace, settings: Named, beside: dict[str, Any] | None = None) -> Pictures:
    """All pictures that are named. Raises UserError if one cannot be read.

    beside: what `read_beside` returned, if all but the content have been read.
    """
    content = laid_on(read_named(arguments.content, arguments), settings.background)
    return Pictures(content, **(read_beside(arguments, settings) if beside is None else beside))


def read_beside(arguments: Namespace, settings: Named) -> dict[str, Any]:
    """All pictures but the content, by their names in Pictures. Raises UserError if one cannot be read."""
    read = functools.partial(read_named, arguments=arguments)
    read_mask = functools.partial(read, as_mask=True)
    beside: dict[str, Any] = {
        "styles": tuple(laid_on(read(path), settings.background) for path in arguments.style),
        "style_masks": tuple(map(read_mask, arguments.style_masks)),
        "content_mask": None if arguments.content_mask is None else read_mask(arguments.content_mask),
        "color_mask": None if arguments.color_mask is None else read_mask(arguments.color_mask),
        "start": read_start(settings, read),
    }
    if len(arguments.style) > len(settings.style_weight) and not arguments.quiet:
        tell(f"the --style_weight {words(settings.style_weight)} is shared out among {len(arguments.style)} styles")
    return beside


def read_named(path: str, arguments: Namespace, as_mask: bool = False) -> np.ndarray:
    """The picture; what is to be told of it is told."""
    picture, notes = read_picture(path, arguments.allow_large, as_mask)
    for note in notes if not arguments.quiet else []:
        tell(f"'{path}' {note}")
    return picture
