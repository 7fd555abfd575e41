"""The settings that shape a run: of each its default, its bounds or choices, and what the command line says of it."""

import dataclasses
import functools
import math
import re
from collections.abc import Collection
from typing import Any

from PIL import ImageColor

from .images import RESAMPLING
from .messages import UserError, as_typed, require_choice
from .values import ON_OFF, like_default
from .vgg import CHANNELS, layer_name

STYLE_LAYERS = ("conv1_1", "conv2_1", "conv3_1", "conv4_1", "conv5_1")
EVALUATIONS_PER_ITERATION = 20
OPTIMIZERS = ("scipy", "device")
MAX_ROWS = 10**9  # more is a mistake in typing
MAX_HISTORY = 1000  # corrections of L-BFGS, of which some dozens are of use


def setting(
    default: Any, group: str, placeholder: str, help: str, *, choices: Collection[object] = (), **others: Any
) -> Any:
    """A field of Settings, with what the command line says of its flag. A tuple's flag takes several values.

    choices: its values, if there are few. others: a number is `at_least` (0) and `at_most`; `resumable` (False) says
    that a run is gone on with, whatever the value was before: it makes no other picture.
    """
    metadata = {"at_least": 0, "at_most": math.inf, "resumable": False} | others
    metadata |= {"group": group, "metavar": placeholder, "help": help, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that shapes a run but its pictures; each is a flag, and each default exists only here.

    For a tuple a single value will do, and NumPy's numbers are taken. A layer is kept by its name in the paper:
    `block4_conv2` becomes `conv4_2`. Raises UserError for a value that is out of range, or of another kind.
    """

    # What is resumable may be another when a run is gone on with: when to end, and how to compute. The weights, and
    # pictures on a background, are known by their digests.
    image_size: int = setting(400, "the picture", "ROWS", "rows of the generated picture", at_least=1, at_most=MAX_ROWS)
    maintain_aspect_ratio: bool = setting(True, "the picture", "BOOL", "columns as in the content; False: as rows")
    init_image: str = setting("content", "the picture", "START", "content, recolored, noise, gray, or a picture's path")
    preserve_color: bool | str = setting(
        False, "the picture", "HOW", "keep colours: luma (True) or match", choices=(False, "luma", "match")
    )
    background: str | None = setting(
        None, "the picture", "COLOUR", "lay what is transparent on it: red or #ff0000", resumable=True
    )
    rescale_image: bool = setting(False, "the picture", "BOOL", "save at the content picture's own size")
    rescale_method: str = setting(
        "bilinear", "the picture", "METHOD", "nearest, bilinear, bicubic or cubic", choices=RESAMPLING
    )
    content_weight: float = setting(0.025, "the content", "W", "how much the content counts")
    content_layer: tuple[str, ...] = setting(("conv5_2",), "the content", "LAYER", "conv1_1 to conv5_3, or several")
    content_loss_type: int = setting(
        0, "the content", "0|1|2", "factor: 1, 1/(2 sqrt(C H W)) or 1/(C H W)", choices=(0, 1, 2)
    )
    style_weight: tuple[float, ...] = setting((1.0,), "the style", "W", "how much it counts, or each of several")
    style_scale: float = setting(1.0, "the style", "FACTOR", "multiplies the weights of all styles")
    style_size: int = setting(0, "the style", "ROWS", "rows to show the style in; 0: as the content", at_most=MAX_ROWS)
    style_fit: str = setting(
        "stretch",
        "the style",
        "FIT",
        "stretch to the content's shape, or keep the style's",
        choices=("stretch", "keep"),
    )
    style_layers: tuple[str, ...] = setting(STYLE_LAYERS, "the style", "LAYER", "layers that hold it")
    style_layer_weights: tuple[float, ...] = setting((1.0,), "the style", "W", "their shares; one: all the same")
    total_variation_weight: float = setting(1e-5, "the style", "W", "how much smoothness counts")
    model: str = setting("vgg16", "the network", "MODEL", "vgg16 or vgg19", choices=CHANNELS)
    pool_type: str = setting("ave", "the network", "TYPE", "pooling: ave or max", choices=("ave", "max"))
    padding: str = setting(
        "zeros", "the network", "HOW", "beyond the border: zeros, or the edge's own values", choices=("zeros", "edge")
    )
    weights: str | None = setting(
        None, "the network", "FILE", "a file, or random; else found or fetched", resumable=True
    )
    num_iter: int = setting(
        10,
        "the optimisation",
        "N",
        f"iterations of {EVALUATIONS_PER_ITERATION} evaluations",
        at_least=1,
        resumable=True,
    )
    scales: int = setting(1, "the optimisation", "N", "paint in N sizes, each twice the one before", at_least=1)
    coarse_iter: tuple[int, ...] = setting(
        (5,), "the optimisation", "N", "iterations at each size but the last", at_least=1
    )
    min_improvement: float = setting(
        0.0, "the optimisation", "PERCENT", "stop when an iteration brings less", resumable=True
    )
    seed: int = setting(0, "the optimisation", "N", "for everything random")
    optimizer: str = setting(
        "scipy",
        "the optimisation",
        "WHOSE",
        "scipy's L-BFGS-B, or one on the device",
        choices=OPTIMIZERS,
        resumable=True,
    )
    history: int = setting(
        10, "the optimisation", "N", "corrections that L-BFGS keeps", at_least=1, at_most=MAX_HISTORY, resumable=True
    )
    precision: str = setting(
        "full",
        "the optimisation",
        "HOW",
        "full float32; mixed or auto: rounded where it is quicker",
        choices=("full", "mixed", "auto"),
        resumable=True,
    )
    tile: str = setting(
        "auto", "the optimisation", "auto|off|N", "compute in tiles of at most N x N pixels", resumable=True
    )
    max_memory: float = setting(
        0.0, "the optimisation", "GB", "use no more than this; 0: all that is free", resumable=True
    )

    def __post_init__(self) -> None:
        put = functools.partial(object.__setattr__, self)  # a frozen dataclass has no other way
        put("tile", str(self.tile))
        how = str(self.preserve_color)
        put("preserve_color", {word: on and "luma" for word, on in ON_OFF.items()}.get(how.lower(), how))
        fields = dataclasses.fields(self)
        for field in fields:
            if field.name != "preserve_color":
                put(field.name, like_default(f"--{field.name}", getattr(self, field.name), field.default))
        for field in fields:
            if field.metadata["metavar"] == "LAYER":
                put(field.name, layers_named(f"--{field.name}", getattr(self, field.name), self.model))
            require_in_range(field, getattr(self, field.name))
        for field in fields:
            if choices := field.metadata["choices"]:
                require_choice(f"--{field.name}", getattr(self, field.name), choices)
        if self.weights == "":
            raise UserError("--weights is ''; it must be a file, or random")
        require_colour(self.background)
        require_tile(self.tile)
        self._require_agreement()

    def _require_agreement(self) -> None:
        """Raise UserError if settings do not go together."""
        if len(self.style_layer_weights) not in (1, len(self.style_layers)) or not (
            0 < sum(self.style_layer_weights) < math.inf
        ):
            raise UserError(
                f"--style_layer_weights are {as_typed(self.style_layer_weights)}; there must be one, or one for each "
                f"of the {len(self.style_layers)} --style_layers, and not all 0"
            )
        if len(self.coarse_iter) not in (1, self.scales - 1):
            raise UserError(
                f"--coarse_iter has {len(self.coarse_iter)} numbers ({as_typed(self.coarse_iter)}); with --scales "
                f"{self.scales} there are {self.scales - 1} coarse sizes: give one number, or one for each"
            )

    @property
    def tile_pixels(self) -> int | None:
        """The number that --tile is; None for auto and off."""
        return int(self.tile) if self.tile.isdigit() else None

    def decisive(self) -> dict[str, str]:
        """The settings that shape the picture, by their flags, in words."""
        fields = (field for field in dataclasses.fields(self) if not field.metadata["resumable"])
        return {f"--{field.name}": as_typed(getattr(self, field.name)) for field in fields}


# Looks by name: what --preset stands for, by the names of settings. Flags that are given count more.
IN_ALL_PRESETS = {"init_image": "recolored", "padding": "edge", "optimizer": "device", "precision": "auto"}
OF_EACH_PRESET: dict[str, dict[str, Any]] = {
    "quick": {"image_size": 200, "scales": 2, "num_iter": 1},
    "good": {"scales": 2, "num_iter": 3},
    "print": {"image_size": 800, "scales": 3, "coarse_iter": (5, 3), "num_iter": 1},
}
PRESETS = {name: IN_ALL_PRESETS | own for name, own in OF_EACH_PRESET.items()}
# Of the time that the defaults take for the same pair, on a processor with AVX512-BF16.
TIMES_OF_PRESETS = {"quick": "an eighth", "good": "two fifths", "print": "two thirds"}


def flags_in_words(settings: dict[str, Any]) -> str:
    """The flags that stand for these settings."""
    return " ".join(f"--{flag} {as_typed(value)}" for flag, value in settings.items())


def layers_named(flag: str, names: tuple[str, ...], model: str) -> tuple[str, ...]:
    """The layers by their names in the paper. Raises UserError if one is no layer, or there twice, or there is none."""
    layers = tuple(layer_name(flag, name, model) for name in names)
    if not layers or len({*layers}) < len(layers):
        raise UserError(f"{flag} names {'a layer twice' if layers else 'no layer'}: {as_typed(layers)}")
    return layers


def require_in_range(field: dataclasses.Field, value: Any) -> None:
    """Raise UserError if a number of this field's is out of its bounds."""
    lowest, highest = field.metadata["at_least"], field.metadata["at_most"]
    for one in value if isinstance(value, tuple) else (value,):
        if isinstance(one, int | float) and not lowest <= one < math.inf:
            raise UserError(f"--{field.name} is {one}; it must be {lowest} or more, and finite")
        if type(one) is int and one > highest:
            raise UserError(f"--{field.name} is {one}; it must be {highest} or less")


def require_colour(background: str | None) -> None:
    """Raise UserError if --background is no colour's name."""
    try:
        if background is not None:
            ImageColor.getrgb(background)
    except (AttributeError, ValueError):
        known = "it must be a colour's name, like red, or #rrggbb"
        raise UserError(f"--background is '{background}'; {known}") from None


def require_tile(tile: str) -> None:
    """Raise UserError if --tile is none of what it may be."""
    if tile not in ("auto", "off") and not (re.fullmatch("[0-9]{1,9}", tile) and int(tile) >= 16):
        known = "it must be auto, off, or a number of pixels from 16 on, of up to 9 digits"
        raise UserError(f"--tile is '{tile}'; {known}")


def for_each(values: tuple, number: int) -> tuple:
    """So many values: those that there are, or the only one for each."""
    return values * (number // len(values))


def weights_of_styles(settings: Settings, styles: int) -> list[float]:
    """The weight of each style; a single weight is shared out evenly. Raises UserError if the numbers do not agree."""
    weights = settings.style_weight
    if len(weights) not in (1, styles):
        raise UserError(f"--style_weight has {len(weights)} weights for {styles} styles; give one, or one for each")
    return [settings.style_scale * weight * len(weights) / styles for weight in for_each(weights, styles)]
