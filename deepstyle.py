#!/usr/bin/env python3
"""deepstyle paints one photo in the style of another: this file is the method, and reads like the paper.

Gatys, Ecker & Bethge, "A Neural Algorithm of Artistic Style" (2015, arXiv 1508.06576): find the picture whose VGG16
features resemble the content picture's, whose Gram matrices of features resemble the style picture's, and which is
smooth. From top to bottom: network, losses, objective, optimiser, stages (coarse to fine), painting. The command that
uses it is in deepstyle_app/, what it stands on in deepstyle_support/.

"Input space" below is what VGG16 was trained on: BGR channels in 0..255 minus their ImageNet means.
"""

if __name__ == "__main__":  # the command, which imports this file: here, before anything is loaded twice or is missing
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P and -I look for modules in no script's folder
    from deepstyle_app.start import start

    start()

import contextlib
import dataclasses
import functools
import hashlib
import math
import sys
import time
import traceback
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from deepstyle_support.backend import all_finite, as_array, differentiable, import_keras, out_of_memory
from deepstyle_support.colours import match_colours, recolour
from deepstyle_support.convolution import FULL, convolve, pool
from deepstyle_support.engine import Engine, Networks
from deepstyle_support.images import MEAN_BGR, enlarge, resize, to_input_space
from deepstyle_support.lbfgs import Curvature, device_lbfgs, scipy_lbfgs
from deepstyle_support.masks import Place, mask_on_grid, masks_at_places, opaque_at_places
from deepstyle_support.memory import MIN_SIDE, Plan, overhead_of, plan_memory, plan_or_advice, smaller_tile
from deepstyle_support.messages import UserError
from deepstyle_support.pictures import Pictures, finish, numbered, on_background, picture_sizes, read_start, several
from deepstyle_support.reading import read_picture as read_picture
from deepstyle_support.settings import EVALUATIONS_PER_ITERATION, Settings, for_each, weights_of_styles
from deepstyle_support.tiles import Tile, tiles_of
from deepstyle_support.transparency import filled
from deepstyle_support.vgg import CHANNELS, PICTURE, deepest, halo, stride
from deepstyle_support.weights import Weights, load_weights

__version__ = "0.3.0"

CONTENT, STYLE, VARIATION = "content", "style", "total variation"  # the kinds of losses
Tensor = Any  # one of the backend's, or an array where it takes one
Size = tuple[int, int]  # (rows, columns)


# ----------------------------------------------------------------------------------- network


def features(
    x: Tensor, network: dict[str, tuple], layers: Collection[str], pool_type: str
) -> Iterator[tuple[str, Tensor]]:
    """The network's features of x at `layers`, one layer after another and no deeper than the deepest of them.

    x: (H, W, 3) tensor in input space, network: of `Networks` -> (layer, (h, w, C)), after the ReLU. Each pooling
    halves the rows and columns, rounding down. "ave" is the paper's choice, "max" the network's own.
    """
    ops = import_keras().ops
    x, wanted = x[None], set(layers)
    for name, (kernel, bias) in network.items():
        if not wanted:
            break
        if name.endswith("_1") and name != "conv1_1":
            x = pool(x, pool_type)
        x = ops.relu(convolve(x, kernel) + bias)
        if name in wanted:
            wanted.remove(name)
            yield name, x[0]


# ------------------------------------------------------------------------------------ losses


def gram_matrix(f: Tensor, mask: Tensor = None) -> Tensor:
    """G = F^T F over the positions (eq. 3 of the paper), each times the mask's value there if there is one.

    f: (h, w, C), mask: (h, w, 1) -> (C, C).
    """
    ops = import_keras().ops
    flat = ops.reshape(f, (-1, f.shape[-1]))
    own = flat if mask is None else flat * ops.reshape(mask, (-1, 1))
    # What is asked of G is symmetric, so both factors get the same gradient: one of them, twice, is enough.
    product = ops.einsum("pc,pd->cd", own, ops.stop_gradient(flat))
    return 2 * product - ops.stop_gradient(product)


def content_loss(f: Tensor, target: Tensor, mask: Tensor = None) -> Tensor:
    """Sum of squared differences (eq. 1 without its 1/2), times the mask. f, target: (h, w, C) -> scalar."""
    ops = import_keras().ops
    return ops.sum(ops.square(f - target) * (1.0 if mask is None else mask))


def style_loss(gram: Tensor, target: Tensor, pixels: int) -> Tensor:
    """sum (G_style - G)^2 / (4 * 3^2 * pixels^2) of one layer (eq. 4); gram, target: (C, C).

    A departure from the paper, kept because people's weights are tuned to it: 3 and `pixels`
    are the picture's channels and H*W at every layer, where the paper has the layer's own.
    """
    ops = import_keras().ops
    # Divided before squaring: the squares alone would near the end of float32's range.
    return ops.sum(ops.square((target - gram) / (2 * 3 * pixels)))


def total_variation(x: Tensor, mask: Tensor = None) -> Tensor:
    """sum ((x[i,j] - x[i+1,j])^2 + (x[i,j] - x[i,j+1])^2)^1.25 over the (H-1) x (W-1) corner.

    x: (H, W, 3), mask: (H, W, 1) -> scalar. The smoothness prior of Mahendran & Vedaldi 2014, arXiv 1412.0035.
    """
    ops = import_keras().ops
    corner = x[:-1, :-1]
    square = ops.square(corner - x[1:, :-1]) + ops.square(corner - x[:-1, 1:])
    return ops.sum(ops.power(square, 1.25) * (1.0 if mask is None else mask[:-1, :-1]))


# ------------------------------------------------------------------------ the terms of the loss


class Term(NamedTuple):
    """One weighted term of the loss: the content's or a style's at one layer, or the total variation."""

    kind: str  # CONTENT, STYLE or VARIATION
    weight: float  # with all its factors
    place: Place
    style: int = 0  # the number of the style, from 1 on, of several

    @property
    def name(self) -> str:
        """content conv5_2, style conv1_1 (or style 2 conv1_1, of several styles), or total variation"""
        return self.kind if self.kind == VARIATION else f"{self.what} {self.place.layer}"

    @property
    def what(self) -> str:
        """content, style, or style 2 of several"""
        return f"{self.kind} {self.style}" if self.style else self.kind


class Losses(NamedTuple):
    """A picture's loss, and what of it the terms of each kind add up to."""

    total: float
    content: float
    style: float
    variation: float


def terms_of(pictures: Pictures, settings: Settings, size: Size, content_weight: float) -> list[Term]:
    """The terms of the loss of a picture of (rows, columns). One of weight 0 is left out.

    Raises UserError as `weights_of_styles` does.
    """
    masks, channels = pictures.masks(size), CHANNELS[settings.model]
    terms = []
    for layer in settings.content_layer:
        scale = math.sqrt(channels[layer] * math.prod(size))
        factor = (1, 1 / (2 * scale), 1 / scale**2)[settings.content_loss_type] / len(settings.content_layer)
        mask = CONTENT if CONTENT in masks else ""
        terms.append(Term(CONTENT, content_weight * factor, Place(layer, mask)))
    shares = for_each(settings.style_layer_weights, len(settings.style_layers))
    styles = len(pictures.styles)
    for number, weight in enumerate(weights_of_styles(settings, styles), 1):
        number = number if styles > 1 else 0
        mask = next((name for name in (f"{STYLE} {number}", STYLE) if name in masks), "")
        for layer, share in zip(settings.style_layers, shares, strict=True):
            terms.append(Term(STYLE, weight * share / sum(shares), Place(layer, mask), number))
    terms.append(Term(VARIATION, settings.total_variation_weight, Place(PICTURE)))
    return [term for term in terms if term.weight]


def layers_of(terms: Iterable[Term], kind: str = "") -> set[str]:
    """The layers at which terms look, or those of one kind."""
    return {term.place.layer for term in terms if kind in ("", term.kind)} - {PICTURE}


def losses_of(terms: Iterable[Term], parts: dict[str, float]) -> Losses:
    """The sums of the terms' values, {name: weighted loss}."""
    kinds = {term.name: term.kind for term in terms}
    sums = (sum(value for name, value in parts.items() if kinds[name] == kind) for kind in (CONTENT, STYLE, VARIATION))
    return Losses(sum(parts.values()), *sums)


class Targets(NamedTuple):
    """What a picture, or a tile of it, is compared with, and where: arrays, or tensors of the backend."""

    content: dict[str, Any]  # {layer: (h, w, C)}: the content's features
    style: dict[str, Any]  # {term's name: (C, C)}: the styles' Gram matrices
    masks: dict[Place, Any]  # {place: (h, w, 1)}; where there is none, all positions count
    whole_grams: dict[Place, Any]  # {place: (C, C)}: those of the whole picture, of which this is a tile


@functools.lru_cache(maxsize=8)
def compiled(terms: tuple[Term, ...], pixels: int, pool_type: str) -> Callable:
    """`weighted_parts` with its gradient, compiled once for all objectives with such terms.

    A backend keeps what it has compiled: without this each picture that a process paints would leave 12 to 25 MB.
    """
    return differentiable(functools.partial(weighted_parts, terms, pixels, pool_type))


def weighted_parts(
    terms: tuple[Term, ...], pixels: int, pool_type: str, x: Any, network: dict[str, tuple], targets: Targets
) -> dict[str, Any]:
    """Each term, weighted, and what the positions of a tile add to it: {name: loss}.

    x: (h, w, 3) float32 tensor; pixels: of the whole picture. A style's loss is no sum over positions: with
    `whole_grams` its value is that of the whole picture, and its gradient what the tile adds.
    """
    found = dict(features(x, network, layers_of(terms), pool_type))
    grams = {}
    for place in dict.fromkeys(term.place for term in terms if term.kind == STYLE):
        grams[place] = gram_matrix(found[place.layer], targets.masks.get(place))
        if place in targets.whole_grams:
            grams[place] = with_value(targets.whole_grams[place], grams[place])
    parts = {}
    for term in terms:
        layer, mask = term.place.layer, targets.masks.get(term.place)
        if term.kind == STYLE:
            loss = style_loss(grams[term.place], targets.style[term.name], pixels)
        elif term.kind == CONTENT:
            loss = content_loss(found[layer], targets.content[layer], mask)
        else:
            loss = total_variation(x, mask)
        parts[term.name] = term.weight * loss
    return parts


def with_value(value: Tensor, tensor: Tensor) -> Tensor:
    """The value, with the gradient of the tensor."""
    return value + tensor - import_keras().ops.stop_gradient(tensor)


# ------------------------------------------------------------------------------------- tiles


@dataclasses.dataclass(frozen=True)
class TiledLoss:
    """The loss of a picture as one of its tiles sees it: what is computed there, given the network.

    It knows the targets and the masks of the whole picture, but not which tiles there are, nor where they are computed:
    it takes tiles and pictures (arrays, or tensors where they are), and gives arrays, but a gradient as a tensor. It
    can be sent to another process. Without its targets only features and Gram matrices can be asked for.
    """

    terms: tuple[Term, ...]
    masks: dict[Place, np.ndarray]
    size: Size  # of the whole picture
    pool_type: str
    factors: str = FULL  # the type that those of the convolutions are rounded to
    content: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # as in Targets; in NumPy: not on a GPU
    style: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def places(self, kind: str = "") -> list[Place]:
        """Where the terms look, or those of one kind."""
        return list(dict.fromkeys(term.place for term in self.terms if kind in ("", term.kind)))

    def only(self, name: str) -> "TiledLoss":
        """The term of this name alone."""
        return dataclasses.replace(self, terms=tuple(term for term in self.terms if term.name == name))

    def interior_features(
        self, networks: Networks, tile: Tile, x: Tensor, layers: Collection[str]
    ) -> dict[str, np.ndarray]:
        """{layer: (h, w, C)} at the tile's own positions. x: (H, W, 3) in input space, the whole picture."""
        found = features(tile.of(x), networks[self.factors], layers, self.pool_type)
        return {layer: as_array(f[tile.at(stride(layer)).within]) for layer, f in found}

    def grams(
        self,
        networks: Networks,
        tile: Tile,
        x: Tensor,
        places: list[Place],
        masks: dict[Place, np.ndarray] | None = None,
    ) -> dict[Place, np.ndarray]:
        """The first pass: what the tile's own positions add to the picture's Gram matrices, {place: (C, C)}.

        masks: those of another picture than the generated one, (h, w, 1) for each place that has one.
        """
        ops, found = import_keras().ops, {}
        layers = {place.layer for place in places}
        for layer, f in features(tile.of(x), networks[self.factors], layers, self.pool_type):
            for place in (place for place in places if place.layer == layer):
                mask = self._mask(tile, place, self.masks if masks is None else masks)
                found[place] = as_array(gram_matrix(f, None if mask is None else ops.convert_to_tensor(mask)))
        return found

    def parts_and_gradient(
        self, networks: Networks, tile: Tile, x: Tensor, whole_grams: dict[Place, np.ndarray]
    ) -> tuple[dict[str, float], Tensor]:
        """The second pass: what the tile's own positions add to each term, and the gradient of that in its window.

        whole_grams: the picture's Gram matrices, of which the style losses are; empty if the tile is the whole picture.
        """
        differentiated = compiled(self.terms, math.prod(self.size), self.pool_type)
        targets = networks.targets_of(self, tile, lambda: self._targets(tile))._replace(whole_grams=whole_grams)
        return differentiated(tile.of(x), networks[self.factors], targets)

    def _targets(self, tile: Tile) -> Targets:
        content = {layer: f[tile.at(stride(layer)).window] for layer, f in self.content.items()}
        masks = {place: mask for place in self.places() if (mask := self._mask(tile, place, self.masks)) is not None}
        return Targets(content, self.style, masks, {})

    def _mask(self, tile: Tile, place: Place, masks: dict[Place, np.ndarray]) -> np.ndarray | None:
        """(h, w, 1): how much each position of the tile's window counts; None where all count the same."""
        step = stride(place.layer)
        mask = masks[place][tile.at(step).window] if place in masks else None
        if tile.interior == tile.window:
            return mask
        return tile.mask(step) if mask is None else mask * tile.mask(step)


class Watch:
    """Whoever looks on while a picture is painted, and may end it. This one does nothing."""

    def evaluated(self, size: Size, count: int, evaluation: "Evaluation") -> None:
        """An evaluation was made: the `count`th at (rows, columns)."""

    def should_stop(self) -> bool:
        """Whether no more evaluations are to be made; asked before each."""
        return False

    def smaller_tiles(self, tile: int) -> None:
        """Memory ran out, and it goes on in tiles of at most so many pixels."""

    def goes_on_in_full(self, size: Size) -> None:
        """At (rows, columns) the convolutions' factors are rounded no more, as they were until now."""


# --------------------------------------------------------------------------------- objective


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The loss at some x, what each term adds to it, weighted, and its gradient."""

    losses: Losses
    parts: dict[str, float]  # by the terms' names
    gradient: Any  # (H, W, 3): float64 where x is an array, a float32 tensor where x is one; or None
    in_full: bool = True  # whether the factors of the convolutions were not rounded

    @property
    def loss(self) -> float:
        return self.losses.total


class Objective:
    """The loss of a picture, and its gradient: the sum of weighted terms (eq. 7, with the total variation).

    content: (H, W, 3) uint8 RGB, the generated picture's size. style: such an array of any size, or a list of them;
    style_masks, one for each, and content_mask: (H, W) or (H, W, 3) uint8, white where it holds. Where the content is
    transparent, (H, W, 4) RGBA, neither content nor style counts, and of a transparent style only its opaque part.
    weights: None for the trained network, "random", a file, or what load_weights returned. The options are the
    command's flags, that is the fields of Settings. With tile=N all is computed tile by tile in bounded memory, and
    comes out the same: Gram matrices are sums over positions, so the tiles' add up to the picture's, from which the
    style losses follow, and each tile's gradient adds to the picture's where its window is.

    Calling it with x, (H, W, 3) float in input space, returns (loss: float, gradient: (H, W, 3) float64). Where memory
    runs out it goes on in smaller tiles. Raises UserError for a bad option.
    """

    rounds, in_full = False, True  # whether factors of convolutions are rounded at first, and whether not at present
    full_from = math.inf  # the evaluations after which they are not any more

    def __init__(
        self,
        content: np.ndarray,
        style: np.ndarray | list[np.ndarray],
        *,
        style_masks: Iterable[np.ndarray] = (),
        content_mask: np.ndarray | None = None,
        weights: Weights | str | None = None,
        **options: Any,
    ):
        settings = Settings(**options, weights=None if isinstance(weights, dict) else weights)
        pictures = Pictures(*on_background(content, style, settings.background), several(style_masks), content_mask)
        if not isinstance(weights, dict):
            weights, _ = load_weights(settings.weights, settings.seed, settings.model)
        engine = Engine(Plan(settings.tile_pixels, settings.history), weights, settings.padding)
        self._prepare(pictures, settings, engine, settings.content_weight, Watch())

    @classmethod
    def at(cls, stage: "Stage", engine: Engine, watch: Watch) -> "Objective":
        """The objective of a stage's picture, computed by this engine."""
        objective = cls.__new__(cls)
        objective.full_from = stage.full_from
        objective._prepare(stage.shown(), stage.settings, engine, stage.content_weight, watch)
        return objective

    def _prepare(
        self, pictures: Pictures, settings: Settings, engine: Engine, content_weight: float, watch: Watch
    ) -> None:
        """pictures: as they are shown to the network; the content has the generated picture's size."""
        self.size = pictures.content.shape[0], pictures.content.shape[1]
        self.model, self.engine, self.watch = settings.model, engine, watch
        self.tile = engine.tile_at(self.size)
        terms = terms_of(pictures, settings, self.size, content_weight)
        check_sides({CONTENT: pictures.content}, layers_of(terms), self.model)
        check_sides(numbered(STYLE, pictures.styles), layers_of(terms, STYLE), self.model)
        masks = masks_at_places((term.place for term in terms), pictures.masks(self.size), self.size)
        without_targets = TiledLoss(tuple(terms), masks, self.size, settings.pool_type)
        self.tiled = self.tiled_rounded = self._with_targets(without_targets, pictures)
        factors = engine.factors(settings.precision)
        self.rounds = factors != FULL
        if self.rounds:
            self.tiled_rounded = self._with_targets(dataclasses.replace(without_targets, factors=factors), pictures)
        self.in_full = not self.rounds

    def _with_targets(self, tiled: TiledLoss, pictures: Pictures) -> TiledLoss:
        """`tiled` with its targets, which its own network finds: what rounding does to both sides cancels out."""
        content = self._in_memory(self._content_targets, tiled, to_input_space(filled(pictures.content)))
        style = self._in_memory(self._style_targets, tiled, pictures.styles)
        return dataclasses.replace(tiled, content=content, style=style)

    def __call__(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        evaluation = self.evaluate(x)
        return evaluation.loss, evaluation.gradient

    def evaluate(self, x: Tensor) -> Evaluation:
        """What calling does, with the loss's parts; where x is a tensor of the backend, so is the gradient, float32.

        Raises UserError if x has another shape, and with status 1 if they are not finite.
        """
        if tuple(getattr(x, "shape", ())) != (*self.size, 3):
            raise UserError(f"x is no array of the content's shape, {(*self.size, 3)}")
        tiled = self.tiled if self.in_full else self.tiled_rounded
        parts, gradient = self._in_memory(self._two_passes, tiled, x)
        evaluation = Evaluation(losses_of(self.tiled.terms, parts), parts, gradient, self.in_full)
        if not (math.isfinite(evaluation.loss) and all_finite(gradient)):
            raise UserError(
                f"the {self._part_gone_wrong(tiled, x)} loss is no longer finite; lower its weight", status=1
            )
        return evaluation

    def go_on_in_full(self) -> None:
        """Round the convolutions' factors no more."""
        self.in_full = True
        self.watch.goes_on_in_full(self.size)

    def _in_memory(self, compute: Callable, *given: Any) -> Any:
        """compute(*given), again in smaller tiles each time that memory runs out: only the rounding differs.

        Raises UserError, status 1, if it runs out in the smallest tiles too.
        """
        while True:
            try:
                return compute(*given)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                tile = smaller_tile(self.size, self.tile)
                if not tile:
                    raise UserError("out of memory even in the smallest tiles; lower --image_size", status=1) from error
            # Only here: as long as the error is handled, it holds on to what was computed until then.
            self.tile = tile
            self.watch.smaller_tiles(tile)

    def _two_passes(self, tiled: TiledLoss, x: Tensor) -> tuple[dict[str, float], Tensor]:
        """Each part and the gradient of all of x, of x's own kind: two maps over the tiles, with a sum between them."""
        tiles = self._tiles(self.size, layers_of(tiled.terms))
        if len(tiles) == 1:
            ((parts, gradient),) = self.engine.map(tiles, tiled.parts_and_gradient, x, {})
            if isinstance(x, np.ndarray):
                return parts, as_array(gradient).astype(np.float64)
            return parts, import_keras().ops.convert_to_tensor(gradient)
        grams = self._grams(tiled, x, tiled.places(STYLE))
        kinds = {term.name: term.kind for term in tiled.terms}
        parts = {}
        total = np.zeros(x.shape, np.float64 if isinstance(x, np.ndarray) else np.float32)
        mapped = self.engine.map(tiles, tiled.parts_and_gradient, x, grams)
        for tile, (added, gradient) in zip(tiles, mapped, strict=True):
            total[tile.window] += as_array(gradient)
            for name, value in added.items():
                parts[name] = value if kinds[name] == STYLE else parts.get(name, 0.0) + value
        return parts, total if isinstance(x, np.ndarray) else import_keras().ops.convert_to_tensor(total)

    def _tiles(self, size: Size, layers: Collection[str]) -> list[Tile]:
        """The tiles of a picture for what needs `layers`; as a whole, it is one tile."""
        # Without layers there is only the total variation, which looks one pixel further.
        return tiles_of(size, self._largest_tile(), halo(layers, self.model) if layers else 1)

    def _largest_tile(self) -> int:
        """Pixels of a tile's side at most, for a style picture too, which may be larger than the generated one."""
        return self.tile or max(self.size) + 15  # it is rounded down to whole strides of 16

    def _grams(
        self, tiled: TiledLoss, x: Tensor, places: list[Place], masks: dict[Place, np.ndarray] | None = None
    ) -> dict[Place, np.ndarray]:
        """{place: (C, C)} of all of x: the sum of the tiles'. masks: as TiledLoss.grams takes them."""
        # Style layers are seldom the deepest, so these tiles need less around them than those of the second pass.
        tiles = self._tiles(x.shape[:2], {place.layer for place in places})
        totals: dict[Place, np.ndarray] = {}
        for grams in self.engine.map(tiles, tiled.grams, x, places, masks):
            for place, gram in grams.items():
                totals[place] = totals.get(place, 0) + gram.astype(np.float64)
        return {place: total.astype(np.float32) for place, total in totals.items()}

    def _content_targets(self, tiled: TiledLoss, x: np.ndarray) -> dict[str, np.ndarray]:
        """{layer: (h, w, C)} of the content picture."""
        layers = [place.layer for place in tiled.places(CONTENT)]
        found = {
            layer: np.empty([n // stride(layer) for n in self.size] + [CHANNELS[self.model][layer]], np.float32)
            for layer in layers
        }
        tiles = self._tiles(self.size, layers)
        for tile, interior in zip(tiles, self.engine.map(tiles, tiled.interior_features, x, layers), strict=True):
            for layer, f in interior.items():
                found[layer][tile.at(stride(layer)).interior] = f
        return found

    def _style_targets(self, tiled: TiledLoss, styles: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
        """For each style term: its style's Gram matrix, as if the style were as large as the picture."""
        targets = {}
        for number, style in enumerate(styles, 1):
            terms = [term for term in tiled.terms if term.kind == STYLE and term.style in (0, number)]
            grams = self._grams_of_style(tiled, style, [Place(term.place.layer, STYLE) for term in terms])
            for term in terms:
                own, other = (
                    math.prod(length // stride(term.place.layer) for length in size[:2])
                    for size in (self.size, style.shape)
                )
                targets[term.name] = grams[Place(term.place.layer, STYLE)] * np.float32(own / other)
        return targets

    def _grams_of_style(self, tiled: TiledLoss, style: np.ndarray, places: list[Place]) -> dict[Place, np.ndarray]:
        """{place: (C, C)} of a style, (H, W, 3 or 4) uint8: at hand if it was shown so before."""
        # To the bit it also depends on the tiles, of which a small style is one.
        tile = min(self._largest_tile(), max(style.shape) + 15)
        key = hashlib.sha256(style.tobytes()).digest(), style.shape, tuple(places), tile, tiled.factors

        def compute() -> dict[Place, np.ndarray]:
            opaque = opaque_at_places(style, style.shape[:2], places)
            return self._grams(tiled, to_input_space(filled(style)), places, opaque)

        return self.engine.cache.get(key, compute)

    def _part_gone_wrong(self, tiled: TiledLoss, x: Tensor) -> str:
        """The name of the part whose value or gradient is not finite, each computed alone."""
        for term in tiled.terms:
            parts, gradient = self._two_passes(tiled.only(term.name), x)
            if not (math.isfinite(parts[term.name]) and all_finite(gradient)):
                return term.name
        return "summed"


def check_sides(pictures: dict[str, np.ndarray], layers: Collection[str], model: str) -> None:
    """Raise UserError if the deepest of the layers has no position of a picture, (H, W, C), each by its name."""
    for name, picture in pictures.items() if layers else ():
        last = deepest(layers, model)
        if min(picture.shape[:2]) < stride(last):
            raise UserError(f"the {name} picture's shape is {picture.shape}; {last} needs {stride(last)} pixels a side")


# --------------------------------------------------------------------------------- optimiser


@dataclasses.dataclass(frozen=True)
class State:
    """What a run needs to go on: where it is, and what it has behind it at this size."""

    x: np.ndarray  # (H, W, 3) float in input space, of the size that is painted: a coarse one, or the picture's
    losses: tuple[Losses, ...] = ()  # at the start and after each iteration; none before the first evaluation
    evaluations: int = 0
    partial: bool = False  # whether it is within an iteration, not at the end of one
    curvature: Callable[[], Curvature | None] = lambda: None  # what the optimiser knows here, as long as it is here
    in_full: bool = False  # whether it goes on in full, where factors of convolutions were rounded before
    rounded: int = 0  # how many of the losses were computed with rounded factors

    @property
    def iteration(self) -> int:
        """The iterations that are finished at this size."""
        return max(0, len(self.losses) - 1)

    @property
    def size(self) -> Size:
        return self.x.shape[0], self.x.shape[1]


@dataclasses.dataclass(frozen=True)
class Accepted:
    """A point that the optimiser accepted, with its evaluation less the gradient, and their number so far."""

    x: Tensor  # (H, W, 3) in input space, float64, or a float32 tensor on the device
    evaluation: Evaluation
    count: int
    curvature: Callable[[], Curvature | None]  # as in State


# What an optimiser is given, and what it gives: x is (H, W, 3) float in input space.
Evaluate = Callable[[Tensor], Evaluation]
Points = Generator[tuple[Tensor, Evaluation, Curvature | None], None, None]


class Stopped(Exception):
    """Raised by `minimise` at an evaluation when it is not to go on."""


def minimise(
    objective: Objective, state: State, optimizer: str = "scipy", history: int = 10, watch: Watch | None = None
) -> Generator[Accepted, None, None]:
    """The state's x, then the accepted point after every 20 evaluations, until the caller has had enough.

    A run that goes on counts on from the evaluations and iterations of its state, and the device's optimiser from the
    curvature there. When the watch says stop, or an evaluation fails, what has been accepted since the last point is
    handed over as a last one. Then what failed is raised, also to a caller who has had enough, or who could not save
    that point. The optimiser ends by itself only when it finds nothing better.
    """
    watch = watch or Watch()
    count = max(0, state.evaluations - 1)  # x, where an earlier run ended, is evaluated once more
    objective.in_full = state.in_full or not objective.rounds
    iterations, handed_over = state.iteration, 0  # evaluations up to the last point that was
    accepted: Accepted | None = None
    failure: BaseException | None = None
    curvature: Curvature | None = None

    def known_at(point: int) -> Curvature | None:
        return curvature if accepted and accepted.count == point else None

    def evaluate(x: np.ndarray) -> Evaluation:
        nonlocal count
        if accepted and watch.should_stop():
            raise Stopped
        evaluation = objective.evaluate(x)
        count += 1
        watch.evaluated(objective.size, count, evaluation)
        return evaluation

    optimise = functools.partial(ALGORITHMS[optimizer], evaluate, history=history)
    try:
        with contextlib.closing(rounded_then_full(optimise, objective, state, lambda: count)) as points:
            for x, evaluation, known in points:
                is_first = accepted is None
                curvature = known
                accepted = Accepted(x, evaluation, count, functools.partial(known_at, count))
                if is_first:
                    yield accepted
                elif count >= (iterations + 1) * EVALUATIONS_PER_ITERATION and not is_to_switch(objective, count):
                    iterations, handed_over = iterations + 1, count
                    yield accepted
    except Stopped:
        pass
    except (Exception, KeyboardInterrupt) as error:
        traceback.clear_frames(error.__traceback__)  # they hold what was computed, and memory may have run out
        failure = error
    try:
        if accepted and accepted.count != handed_over:
            yield accepted
    finally:
        if failure:
            raise failure


def rounded_then_full(
    optimise: Callable[..., Points], objective: Objective, state: State, count: Callable[[], int]
) -> Points:
    """The points of an optimiser: with rounded factors as long as that serves, then in full.

    After `full_from` evaluations, or where a line search finds nothing better, since rounding may stand in its way, it
    begins again from where it is with what it has learnt. Only SciPy's, which could not, goes on as it is.
    """
    x, learnt = state.x, state.curvature
    if not objective.in_full:
        with contextlib.closing(optimise(start=x, learnt=learnt, restarts=lambda: objective.in_full)) as points:
            for x, evaluation, known in points:
                learnt = [known].pop  # which keeps it only until it is asked
                yield x, evaluation, known
                if is_to_switch(objective, count()):
                    objective.go_on_in_full()
                    if known:
                        break
            else:
                if objective.in_full:
                    return
                objective.go_on_in_full()
        del evaluation, known
    given = [x]
    del x  # as large as the picture
    yield from optimise(start=given.pop(), learnt=learnt)


def is_to_switch(objective: Objective, count: int) -> bool:
    """Whether after so many evaluations factors are still rounded, and are not to be any more."""
    return count >= objective.full_from and not objective.in_full


ALGORITHMS: dict[str, Callable[..., Points]] = {"scipy": scipy_lbfgs, "device": device_lbfgs}


# ------------------------------------------------------------------- stages, coarse to fine


@dataclasses.dataclass(frozen=True)
class Stage:
    """One size of the painting, of which the last is full size: what is shown to the network there, and for how long.

    What is as large as the pictures is made when it is asked for.
    """

    pictures: Pictures  # as they are, of any sizes
    settings: Settings
    size: Size
    full_size: Size
    iterations: int

    @property
    def is_full(self) -> bool:
        return self.size == self.full_size

    @property
    def full_from(self) -> float:
        """The evaluations after which --precision mixed rounds no more: the last fifth is in full.

        A coarse picture is only a start.
        """
        evaluations = self.iterations * EVALUATIONS_PER_ITERATION
        return evaluations - evaluations / 5 if self.is_full else math.inf

    @property
    def content_weight(self) -> float:
        """What the content weighs here. With half the rows the mean over positions counts 4 times as much.

        Style losses fall less far there, so with its full weight hardly anything of the photo was left.
        """
        times = math.prod(self.full_size) / math.prod(self.size)
        exponent = 2 - self.settings.content_loss_type / 2  # the types have the positions in them
        weight = self.settings.content_weight * times**exponent
        return min(weight, sys.float_info.max)  # of an absurd weight the loss is said to be no longer finite

    @property
    def style_sizes(self) -> list[Size]:
        """(rows, columns) in which each style is shown to the network. Raises UserError if any side is under 32."""
        sizes = []
        for style in self.pictures.styles:
            rows = self.settings.style_size * self.size[0] // self.settings.image_size or self.size[0]
            like = style.shape if self.settings.style_fit == "keep" else self.size
            sizes.append((rows, rows * like[1] // like[0]))
            if min(sizes[-1]) < MIN_SIDE:
                raise UserError(
                    f"a style picture would have {rows} x {sizes[-1][1]} pixels beside {self.size[0]} x "
                    f"{self.size[1]}, but needs at least {MIN_SIDE} on each side; raise --style_size, or set "
                    "--style_fit stretch"
                )
        return sizes

    def shown(self) -> Pictures:
        """The content and the styles in the sizes, and colours, in which the network is shown them here."""
        content = resize(self.pictures.content, self.size)
        sizes = zip(self.pictures.styles, self.style_sizes, strict=True)
        styles = [resize(style, size) for style, size in sizes]
        if self.settings.preserve_color == "match":
            styles = [match_colours(style, content) for style in styles]
        return dataclasses.replace(self.pictures, content=content, styles=tuple(styles))

    def start(self) -> np.ndarray:
        """(rows, columns, 3) float in input space: what --init_image says."""
        settings, pictures = self.settings, self.pictures
        if settings.init_image == "noise":
            return np.random.default_rng(settings.seed).uniform(0, 255, (*self.size, 3)) - MEAN_BGR
        if settings.init_image == "recolored":
            shown = self.shown()
            masks = [mask_on_grid(mask, self.size) for mask in pictures.style_masks]
            weights = weights_of_styles(settings, len(pictures.styles))
            return to_input_space(filled(recolour(shown.content, list(shown.styles), weights, masks)))
        start = pictures.content if pictures.start is None else pictures.start
        if settings.init_image == "gray":
            start = np.asarray(Image.fromarray(filled(start)).convert("L").convert("RGB"))
        return to_input_space(filled(resize(start, self.size)))

    def carried_over(self, x: np.ndarray, coarser: "Stage") -> np.ndarray:
        """x of a coarser stage as the start of this one: enlarged, with the detail that this one's own start has.

        Where the network finds the photo's edges it keeps them: measured, less of the photo is lost so, and the loss is
        lower.
        """
        enlarged = enlarge(x.astype(np.float32), self.size)
        if self.settings.init_image == "noise":
            return enlarged
        return enlarged + self.start() - enlarge(coarser.start().astype(np.float32), self.size)

    def finished(self, x: np.ndarray) -> np.ndarray:
        """The picture that is shown for x of this stage: a coarse one is enlarged to full size."""
        x = x if self.is_full else enlarge(x.astype(np.float32), self.full_size)
        return finish(x, self.pictures.content, self.settings, self.pictures.color_mask)

    def own_size(self, x: np.ndarray) -> np.ndarray:
        """The same in this stage's own size."""
        as_it_is = dataclasses.replace(self.settings, rescale_image=False)
        return finish(x, self.pictures.content, as_it_is, self.pictures.color_mask)


def stages_of(pictures: Pictures, settings: Settings) -> list[Stage]:
    """The stages of a painting, the coarsest first. Raises UserError if one would be under 32 pixels."""
    sizes = picture_sizes(pictures.content.shape, settings)
    coarse = for_each(settings.coarse_iter, len(sizes) - 1)
    counts = zip(sizes, (*coarse, settings.num_iter), strict=True)
    return [Stage(pictures, settings, size, sizes[-1], iterations) for size, iterations in counts]


def check_agreement(pictures: Pictures, settings: Settings) -> None:
    """Raise UserError if the pictures and the settings do not go together."""
    weights_of_styles(settings, len(pictures.styles))
    for stage in stages_of(pictures, settings):
        terms = terms_of(pictures, settings, stage.size, stage.content_weight)
        masks_at_places((term.place for term in terms), pictures.masks(stage.size), stage.size)
        for style, size in zip(pictures.styles, stage.style_sizes, strict=True):
            opaque_at_places(style, size, [Place(layer, STYLE) for layer in settings.style_layers])
    if pictures.color_mask is not None and settings.preserve_color != "luma":
        raise UserError("--color_mask says where --preserve_color luma applies; give that flag as well")


def saved_size(pictures: Pictures, settings: Settings) -> Size:
    """(rows, columns) of the pictures that are shown and saved."""
    rows, columns = pictures.content.shape[:2]
    return (rows, columns) if settings.rescale_image else picture_sizes((rows, columns), settings)[-1]


def planned(
    pictures: Pictures,
    settings: Settings,
    plan: Callable[..., Plan] = plan_memory,
    bytes_kept: Callable[[list[Stage]], int] = lambda stages: 0,
) -> Plan:
    """The plan for painting them. Raises UserError if they do not fit, with the size that does.

    plan: as plan_memory, given a size, settings and the overhead; bytes_kept: what whoever saves the pictures keeps.
    """

    def plan_at(image_size: int) -> Plan:
        stages = stages_of(pictures, dataclasses.replace(settings, image_size=image_size))
        full = stages[-1]
        saved = saved_size(pictures, full.settings)
        overhead = overhead_of(pictures.named(), full.size, saved, full.style_sizes, full.settings)
        return plan(full.size, full.settings, overhead._replace(kept=overhead.kept + bytes_kept(stages)))

    return plan_or_advice(settings.image_size, plan_at)


# ---------------------------------------------------------------------------------- painting


@dataclasses.dataclass(frozen=True)
class Iteration:
    """What one iteration, or a part of it, brought."""

    number: int
    picture: np.ndarray  # (H, W, 3) uint8 RGB, of full size; RGBA if the content has alpha
    own_size: np.ndarray  # the same, but of a coarse stage in that stage's size
    losses: Losses
    parts: dict[str, float]  # the weighted loss of each term, by name; they add up to losses.total
    improvement: float  # percent of the loss before; for the first, of the start picture's
    seconds: float
    is_coarse: bool  # whether it is of a stage before full size; the picture is enlarged
    state: State  # to go on from

    @property
    def loss(self) -> float:
        return self.losses.total


def stylize(
    content: np.ndarray,
    style: np.ndarray | list[np.ndarray],
    *,
    style_masks: tuple[np.ndarray, ...] = (),
    content_mask: np.ndarray | None = None,
    color_mask: np.ndarray | None = None,
    **options: Any,
) -> Iterator[Iteration]:
    """Paint `content` in the style of `style`, or of several: one Iteration after another.

    content, style: (H, W, 3) uint8 RGB, or (H, W, 4) RGBA, of any sizes; masks: (H, W, 3) or (H, W), white where
    something holds. A transparent content makes the iterations' pictures RGBA, with its alpha. The options
    are the command's flags, that is the fields of Settings, with the same defaults; all pictures are resized as the
    command does it. Raises UserError for what the caller can mend.
    """
    settings = Settings(**options)
    contents, styles = on_background(content, style, settings.background)
    pictures = Pictures(contents, styles, several(style_masks), content_mask, color_mask, read_start(settings))
    plan = planned(pictures, settings)
    check_agreement(pictures, settings)  # after the plan: masks of a size that is too large would fill the memory
    weights, _ = load_weights(settings.weights, settings.seed, settings.model)
    iterations = paint(pictures, settings, Engine(plan, weights, settings.padding))
    return (iteration for iteration in iterations if not iteration.is_coarse)


def paint(
    pictures: Pictures, settings: Settings, engine: Engine, state: State | None = None, watch: Watch | None = None
) -> Generator[Iteration, None, None]:
    """`stylize` with an engine that is at hand, of coarse stages too; it goes on from `state` if there is one.

    Raises UserError if the state is of no stage's size.
    """
    watch = watch or Watch()
    stages = stages_of(pictures, settings)
    sizes = [stage.size for stage in stages]
    if state and state.size not in sizes:
        raise UserError(f"the state is of {state.size[0]} x {state.size[1]} pixels, and no stage of this painting is")
    x = state.x if state else stages[0].start()
    coarser = stages[0]
    for stage in stages[sizes.index(state.size) if state else 0 :]:
        if x.shape[:2] != stage.size:
            x = stage.carried_over(x, coarser)
        here, state, coarser = state or State(x), None, stage
        if here.iteration >= stage.iterations:
            continue
        objective = Objective.at(stage, engine, watch)
        with contextlib.closing(iterations_at(stage, objective, here, engine.plan.history, watch)) as iterations:
            for iteration in iterations:
                x = iteration.state.x
                yield iteration
        if watch.should_stop():
            return


def iterations_at(
    stage: Stage, objective: Objective, state: State, history: int, watch: Watch
) -> Generator[Iteration, None, None]:
    """The iterations of one stage, from `state` on."""
    losses, rounded, clock = list(state.losses), state.rounded, time.perf_counter()
    if stage.is_full and has_enough(state, stage.settings):
        objective.full_from = 0  # the run ends in full
    points = minimise(objective, state, stage.settings.optimizer, history, watch)
    with contextlib.closing(points):  # which raises what failed, once its last point has been saved
        for accepted in points:
            found, in_full = accepted.evaluation.losses, accepted.evaluation.in_full
            if not losses:
                losses, rounded = [found], int(not in_full)
                continue
            if accepted.count == state.evaluations:
                continue  # it is what was saved already
            seconds = time.perf_counter() - clock
            number, before = len(losses), losses[-1].total
            partial = accepted.count < number * EVALUATIONS_PER_ITERATION
            losses += [] if partial else [found]
            rounded = rounded if in_full or partial else len(losses)
            x, curvature = as_array(accepted.x), accepted.curvature
            here = State(x, tuple(losses), accepted.count, partial, curvature, in_full and objective.rounds, rounded)
            picture = stage.finished(x)
            yield Iteration(
                number=number,
                picture=picture,
                own_size=picture if stage.is_full else stage.own_size(x),
                losses=found,
                parts=accepted.evaluation.parts,
                improvement=improvement_of(before, found.total),
                seconds=seconds,
                is_coarse=not stage.is_full,
                state=here,
            )
            enough = stage.is_full and has_enough(here, stage.settings)
            if number >= stage.iterations or (enough and objective.in_full):
                return
            objective.full_from = 0 if enough else objective.full_from
            del accepted, curvature, here, x, picture  # as large as the picture
            clock = time.perf_counter()


def improvement_of(before: float, loss: float) -> float:
    """What an iteration brought, in percent of the loss before."""
    return 100 * (before - loss) / before if before else 0.0


def has_enough(state: State, settings: Settings) -> bool:
    """Whether the state is at the end of an iteration that brought less than the user's minimum, if there is one.

    The first always brings enough, and so does one that begins with rounded factors and ends in full: its two losses
    are not to be compared.
    """
    number = state.iteration
    if number < 2 or state.partial or not settings.min_improvement or state.rounded == number:
        return False
    before, latest = state.losses[-2:]
    return improvement_of(before.total, latest.total) < settings.min_improvement
