"""What a person has asked for: the command as it was typed."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from deepstyle_support.messages import UserError
from deepstyle_support.settings import Settings

MASKS = ("style_masks", "content_mask", "color_mask")
EXTRAS = ("animation", "log", "tensorboard", "report")  # what is written besides pictures and state, if it is asked for


@dataclasses.dataclass(frozen=True)
class Job:
    """The command's arguments, each by the name of its flag; of `settings` each is a flag."""

    content: str  # a photo, or a folder of them
    style: tuple[str, ...]
    prefix: str
    settings: Settings
    style_masks: tuple[str, ...] = ()
    content_mask: str | None = None
    color_mask: str | None = None
    every: int = 1  # only each Nth picture is saved, and the last
    animation: str | None = None
    log: str | None = None
    tensorboard: str | None = None
    report: str | None = None
    workers: int = 1  # processes that share the tiles; 1: this one alone
    resume: bool = False
    overwrite: bool = False
    allow_large: bool = False
    quiet: bool = False
    debug: bool = False

    def masks(self) -> dict[str, Any]:
        """The masks that there are, by their flags: a path, or several."""
        return {name: mask for name in MASKS if (mask := getattr(self, name))}

    def extras(self) -> dict[str, Path]:
        """What else is to be written, by its flag."""
        return {name: Path(path) for name in EXTRAS if (path := getattr(self, name))}

    def inputs(self) -> list[str]:
        """All files that are read, as they were typed."""
        masks = [*self.style_masks, self.content_mask, self.color_mask]
        paths = [self.content, *self.style, *masks, self.settings.weights, self.settings.init_image]
        return [path for path in paths if path]

    def of_photo(self, photo: Path, results: Path) -> "Job":
        """The job of one photo of the folder; what else is written of it (a log, a report) goes to its own results.

        Raises UserError if one of these has a folder in its name.
        """
        files: dict[str, Any] = {}
        for flag, path in self.extras().items():
            if path.name != getattr(self, flag) or path.name == "..":
                raise UserError(
                    f"--{flag} is '{getattr(self, flag)}'; with a folder of photos each gets its own beside its "
                    "pictures, so give a name without a folder"
                )
            files[flag] = str(results / path)
        return dataclasses.replace(self, content=str(photo), prefix=os.path.join(results, ""), **files)
