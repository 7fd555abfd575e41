"""The pictures that a job names, read as they come, with what there is to say of them."""

import functools
from typing import Any

import numpy as np

from deepstyle_support.messages import as_typed, notify
from deepstyle_support.pictures import Pictures, read_start
from deepstyle_support.reading import read_picture
from deepstyle_support.settings import Settings
from deepstyle_support.transparency import on_colour

from .job import Job


def read_inputs(job: Job, others: dict[str, Any] | None = None) -> Pictures:
    """All pictures that are named. Raises UserError if one cannot be read.

    others: what `read_others` returned, if all but the content have been read.
    """
    content = on_colour(read_named(job.content, job), job.settings.background)
    return Pictures(content, **(read_others(job) if others is None else others))


def read_others(job: Job, common: dict[str, Any] | None = None) -> dict[str, Any]:
    """All pictures but the content, by their names in Pictures. Raises UserError if one cannot be read.

    common: what `read_common` returned, if all but the styles have been read.
    """
    styles = tuple(on_colour(read_named(path, job), job.settings.background) for path in job.style)
    others = {"styles": styles, **(read_common(job) if common is None else common)}
    weights = job.settings.style_weight
    if len(job.style) > len(weights) and weights != Settings().style_weight and not job.quiet:
        weight = as_typed(weights)
        notify(f"the --style_weight {weight} is shared out among {len(job.style)} styles")
    return others


def read_common(job: Job) -> dict[str, Any]:
    """All pictures but the content and the styles, by their names in Pictures. Raises UserError as `read_others`."""
    read = functools.partial(read_named, job=job)
    read_mask = functools.partial(read, as_mask=True)
    return {
        "style_masks": tuple(map(read_mask, job.style_masks)),
        "content_mask": None if job.content_mask is None else read_mask(job.content_mask),
        "color_mask": None if job.color_mask is None else read_mask(job.color_mask),
        "start": read_start(job.settings, read),
    }


def read_named(path: str, job: Job, as_mask: bool = False) -> np.ndarray:
    """The picture; the notes that there are of it are shown."""
    picture, notes = read_picture(path, job.allow_large, as_mask)
    for note in notes if not job.quiet else []:
        notify(f"'{path}' {note}")
    return picture
