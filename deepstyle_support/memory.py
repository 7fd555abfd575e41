"""How much memory there is, how much a picture needs, and the plan that follows: whole or in tiles."""

import bisect
import itertools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .device import gpu_memory
from .limits import free_main_memory, left_by_ulimits
from .messages import UserError
from .settings import MAX_HISTORY, Settings
from .vgg import CHANNELS, halo, stride

MIN_SIDE = 32  # rows and columns of a picture that is computed: conv5 then has 2 x 2 positions
LARGE_TILE = 512  # pixels: at 1024 x 1024 tiles of this size take 2 times as long as the whole, tiles of 128 6 times
SMALL_TILE = 128
MIN_CORRECTIONS = 5  # fewer only if so few are asked for
# Beyond 2 m for m corrections, so that the plan is no less than the peaks measured: at 4096 x 4096 in tiles of 512 that
# would be 8, at 6048 x 8064 in tiles of 576 10.3.
DEVICE_VECTORS = 11
CUDA = 800e6  # bytes that its libraries take here beside the GPU's; measured with PyTorch on an H200: 700 to 800 MB
BARE, LOADED = 100e6, 1000e6  # of Python with NumPy and Pillow, and with Keras and TensorFlow, before they compute
# Bytes of a pixel, each measured at 24 megapixels or more. Of a picture that is saved; more for the content's colours,
# for a mask of those, for alpha. An animation keeps 3 or 4 channels for each frame, and when it is written takes up to
# 3 times as much more for each, and this at once:
SAVING, SAVING_COLOURED, SAVING_MASKED, SAVING_CLEAR, ANIMATING = 10, 11, 17, 5, 25
# For a moment, beside the array: of what is read, as floats and with alpha; of what is resized, and of what comes out.
READING, RESIZING, RESIZED, MASKING, MASK_RESIZED = 8, 2, 7, 5, 12
COLOURING = 4  # of what is given other colours, or says them
BAND = 80e6  # bytes of the rows that are at hand at a time where colours are computed
SHOWING = 12  # of a style that is shown to the network, as float32
PLACED_MASK = 5.4  # of the picture, for each mask at conv1_1, conv2_1 and so on
WORKER = 800e6  # bytes of a process that computes tiles for this one, before it computes
RAY = 400e6  # of Ray's own processes


Size = tuple[int, int]  # (rows, columns)


class Plan(NamedTuple):
    """How a picture is computed in the memory that there is."""

    tile: int | None  # pixels of a tile's side at most; None: the whole picture at once
    history: int  # corrections that L-BFGS keeps
    needed: float = 0  # bytes at the peak, estimated; without those on a GPU
    free: float = 0
    on_gpu: tuple[float, float] | None = None  # bytes needed and free there

    def describe(self, history: int) -> str:
        """How and in how much memory the picture is computed; history: the corrections that were asked for."""
        way = f"in tiles of at most {self.tile} pixels" if self.tile else "as a whole"
        said = f"{way}, with about {self.needed / 1e9:.1f} GB of memory of {self.free / 1e9:.1f} GB free"
        if self.on_gpu:
            needed, free = self.on_gpu
            said += f", and {needed / 1e9:.1f} GB on the GPU of {free / 1e9:.1f} GB free"
        if self.history < history:
            said += f"; for lack of it L-BFGS keeps {self.history} corrections instead of {history}"
        return said


class Overhead(NamedTuple):
    """Bytes of main memory that a run needs besides computing; from `overhead_of`."""

    kept: float = 0  # while it paints
    styles: float = 0  # more than that, while the styles are shown to the network; L-BFGS has no vectors yet
    before: float = 0  # in all, at most, before anything is shown to the network


NOTHING = Overhead()


class TooLarge(UserError):
    """A picture that does not fit."""

    def __init__(self, message: str, others: str = "", remedy: str = ""):
        super().__init__(message)
        self.others = others  # what of the memory is for other pictures, in words, if that is much
        self.remedy = remedy  # what else would help, in words, to be put behind


def plan_memory(
    size: Size,
    settings: Settings,
    overhead: Overhead = NOTHING,
    found: tuple[float, float] | None = None,
    workers: int = 0,
) -> Plan:
    """The quickest way to paint a picture of (rows, columns) in the memory that is free, with what is overhead beside.

    With `workers` so many processes on this machine compute tiles at the same time, each on a GPU of its own if there
    are any.

    The picture is computed as a whole if that fits, and else in the largest tiles that do. Before tiles get smaller
    than 512 pixels, L-BFGS keeps fewer corrections, down to 5. Raises TooLarge if nothing fits; `plan_or_advice` says
    what does. found: what `free_memory` said before this process took any.
    """
    found = found or free_memory(settings.max_memory)
    if plan := way_that_fits(size, settings, overhead, found, workers):
        return plan
    free, gpu_free = found
    tile = SMALL_TILE if settings.tile == "auto" else settings.tile_pixels
    min_history = min(settings.history, MIN_CORRECTIONS)
    with_fewest, without = (
        needed_by_all(workers, bool(gpu_free), size, tile, history, settings) for history in (min_history, 0)
    )
    needed, on_gpu = peaks(with_fewest, without, overhead, settings, found)
    if needed <= free and settings.optimizer == "scipy" and corrections_of_scipy(size) < min_history:
        raise TooLarge(
            f"{size[0]} x {size[1]} pixels are too many for SciPy's L-BFGS-B",
            remedy="; --optimizer device has no such limit",
        )
    others = max(overhead)
    raise TooLarge(
        f"{size[0]} x {size[1]} pixels need {needed / 1e9:.1f} GB of memory "
        f"{'or more' if settings.tile == 'auto' else '(--tile auto may need less)'}, {free / 1e9:.1f} GB are free"
        f"{under_a_ulimit(free)}"
        f"{f'; on the GPU {on_gpu / 1e9:.1f} GB, {gpu_free / 1e9:.1f} GB are free' if gpu_free else ''}",
        others=f"{others / 1e9:.1f} GB are for pictures as they are read, shown (--style_size) and saved"
        if others > needed / 2
        else "",
    )


def plan_or_advice(image_size: int, plan: Callable[[int], Plan]) -> Plan:
    """The plan for so many rows: plan(image_size). If it is too large, the error names the largest size that is not.

    That is tried in the very same way. plan: raises TooLarge for what does not fit, UserError for what is too small.
    """
    try:
        return plan(image_size)
    except TooLarge as error:

        def too_large(rows: int) -> bool:
            try:
                plan(rows)
            except TooLarge:
                return True
            except UserError:
                return False
            return False

        largest = bisect.bisect(range(1, image_size), False, key=too_large)
        try:
            plan(largest)
            advice = f"enough for --image_size {largest}"
        except UserError:
            advice = f"too little for any{f', since {error.others}' if error.others else ''}"
        raise TooLarge(f"{error}, {advice}{error.remedy}") from error


def way_that_fits(
    size: Size, settings: Settings, overhead: Overhead, found: tuple[float, float], workers: int
) -> Plan | None:
    """The plan for a picture of (rows, columns) in the bytes that were `found`, here and on a GPU; None without one."""
    side, min_history = max(size), min(settings.history, MIN_CORRECTIONS)
    free, gpu_free = found

    def needed_with(tile: int | None, history: int) -> Needed:
        return needed_by_all(workers, bool(gpu_free), size, tile, history, settings)

    def corrections(tile: int | None) -> float:
        """How many L-BFGS can keep beside tiles of this size, at most as many as are wished for; or less than 0."""
        needed = needed_with(tile, 0)
        here, on_gpu = needed.shared(bool(gpu_free), settings.optimizer)
        room = free - overhead.kept - here
        if settings.optimizer == "scipy":
            room = min(room, corrections_of_scipy(size) * bytes_per_correction(size, "scipy"))
        if at_first(needed, overhead, bool(gpu_free), settings.optimizer) > free:
            return -1
        if gpu_free and (room < 0 or on_gpu > gpu_free):
            return -1
        if gpu_free and settings.optimizer == "device" and not workers:
            room = gpu_free - on_gpu
        return min(settings.history, room // bytes_per_correction(size, settings.optimizer))

    tile = settings.tile_pixels if settings.tile != "auto" else quickest_tile(side, min_history, corrections)
    history = corrections(tile)
    if history < min_history:
        return None
    needed, on_gpu = peaks(needed_with(tile, int(history)), needed_with(tile, 0), overhead, settings, found)
    whole_or_tile = tile if tile and tile < side else None
    return Plan(whole_or_tile, int(history), needed, free, (on_gpu, gpu_free) if gpu_free else None)


def quickest_tile(side: int, min_history: int, corrections: Callable[[int | None], float]) -> int | None:
    """The largest tile of a picture with this longer side that fits, None for the whole; one of 128 if none does.

    corrections: how many L-BFGS can keep beside a tile. Tiles under 512 pixels only if else it cannot keep the fewest.
    """

    def tile_of(parts: int) -> int | None:
        """The longer side in so many parts, in whole strides of the deepest layer."""
        return None if parts == 1 else math.ceil(side / parts / 16) * 16

    # The last number of parts of which each, rounded up to 16, still has 512 pixels.
    most = max(1, math.ceil(side / (LARGE_TILE - 16)) - 1)
    kept = max(corrections(None), corrections(tile_of(most)))
    if kept < min_history:
        most, kept = math.ceil(side / SMALL_TILE), min_history

    def fits(parts: int) -> bool:
        return corrections(tile_of(parts)) >= kept

    return tile_of(1 if fits(1) else 2 + bisect.bisect_left(range(2, most), True, key=fits))


def smaller_tile(size: Size, tile: int | None) -> int | None:
    """Pixels of tiles half as large as those, or as the whole picture, but no less than 128; None if they are not more.

    For a picture of (rows, columns) that did not fit after all.
    """
    side = min(max(size), tile or max(size))
    return max(SMALL_TILE, side // 2 // 16 * 16) if side > SMALL_TILE else None


def bytes_per_vector(size: Size, optimizer: str) -> int:
    """A vector of L-BFGS: 3 channels in SciPy's float64, or in float32 on the device."""
    return 3 * (8 if optimizer == "scipy" else 4) * math.prod(size)


def bytes_per_correction(size: Size, optimizer: str) -> int:
    """What L-BFGS keeps of each: a step and a change of the gradient."""
    return 2 * bytes_per_vector(size, optimizer)


def corrections_of_scipy(size: Size) -> int:
    """The most that SciPy's L-BFGS-B can keep: it counts its 2 m n + 5 n + 11 m^2 + 8 m numbers in 32 bits.

    n: the numbers of the picture, m: the corrections. With more of them it ends the process.
    """
    n, m = 3 * math.prod(size), MAX_HISTORY
    return (2**31 - 1 - 5 * n - 11 * m**2 - 8 * m) // (2 * n)


class Needed(NamedTuple):
    """Bytes that painting takes at its peak."""

    computing: float  # an evaluation, on the GPU if there is one
    vectors: float  # the optimiser's
    rest: float

    def shared(self, gpu: bool, optimizer: str) -> tuple[float, float]:
        """What of it is in main memory, and what on the GPU if there is one."""
        if not gpu:
            return sum(self), 0.0
        on_gpu = self.computing + (self.vectors if optimizer == "device" else 0)
        return sum(self) - on_gpu + CUDA, on_gpu


def at_first(needed: Needed, overhead: Overhead, gpu: bool, optimizer: str) -> float:
    """Bytes of main memory at most before L-BFGS has its vectors: pictures are read, made ready, and shown."""
    here, _ = needed._replace(vectors=0).shared(gpu, optimizer)
    return max(here + overhead.kept + overhead.styles, LOADED + overhead.before)


def peaks(
    needed: Needed, without: Needed, overhead: Overhead, settings: Settings, found: tuple[float, float]
) -> tuple[float, float]:
    """Bytes of main memory and of a GPU, if one was found, that a whole run takes at most.

    without: what is needed without any corrections.
    """
    gpu = bool(found[1])
    here, on_gpu = needed.shared(gpu, settings.optimizer)
    return max(here + overhead.kept, at_first(without, overhead, gpu, settings.optimizer)), on_gpu


def needed_memory(size: Size, tile: int | None, history: int, settings: Settings) -> Needed:
    """What a picture of (rows, columns) needs in tiles of this size, or as a whole, with so many corrections.

    The numbers are fitted to measured peaks on a CPU (TensorFlow 2.21); benchmarks/speed.py shows both.
    """
    pixels = math.prod(size)
    layers = CHANNELS[settings.model]
    tile = tile if tile and tile < max(size) else None
    computed = largest_window(size, tile, settings.model) if tile else pixels
    # Of VGG16's features, 270 numbers a pixel, 7.6 bytes a number are there at once; of tiles more, since their shapes
    # differ, and what one leaves does not fit the next.
    numbers = computed * sum(channels / stride(name) ** 2 for name, channels in layers.items())
    computing = 150e6 + (12 if tile else 7.6) * numbers
    # The content's features at early layers are large; they are kept whole, and given to the backend where it computes.
    targets = 4 * sum(layers[name] / stride(name) ** 2 for name in settings.content_layer)
    computing += computed * targets
    if settings.padding == "edge":
        # Each kernel's outer lines and corners once more, 16 of in x out, and those for the gradient.
        computing += 4 * 2 * 16 * sum(inputs * outputs for inputs, outputs in itertools.pairwise((3, *layers.values())))
    # SciPy's L-BFGS-B works in 2 m + 5 vectors for m corrections; x, its gradient and copies come on top: 12 on one
    # machine, 14 on another, and one to be sure. The device's has 2 m, and as many more as were measured.
    vectors = 5 + 15 if settings.optimizer == "scipy" else DEVICE_VECTORS
    needed = (2 * history + vectors) * bytes_per_vector(size, settings.optimizer)
    kept = targets if settings.precision == "full" else 2 * targets  # those of the rounded network as well
    return Needed(computing, needed, LOADED + pixels * kept)


def needed_by_all(
    workers: int, on_gpus: bool, size: Size, tile: int | None, history: int, settings: Settings
) -> Needed:
    """`needed_memory` of one process, or of this one and `workers` that compute for it; on GPUs, of each GPU.

    Beside them Ray's store holds x, once more than this process, the content's features, and of each worker two
    gradients: the one that it has computed, and the one that waits until those before it are added.
    """
    needed = needed_memory(size, tile, history, settings)
    if not workers:
        return needed
    layers = CHANNELS[settings.model]
    targets = 4 * sum(layers[name] / stride(name) ** 2 for name in settings.content_layer)
    window = largest_window(size, tile or max(size), settings.model)
    ray = RAY + workers * (WORKER + 2 * 3 * 4 * window) + math.prod(size) * (2 * 3 * 4 + targets)
    # The GPUs are the workers': this process has the optimiser's vectors in main memory.
    return Needed(needed.computing * (1 if on_gpus else workers), 0, needed.vectors + needed.rest + ray)


def largest_window(size: Size, tile: int, model: str) -> int:
    """Pixels that are computed at a time, at most: a tile, and all around it that its features can see."""
    return math.prod(min(side, tile + 2 * halo(CHANNELS[model], model)) for side in size)


def shared_tile(size: Size, at_most: int | None, workers: int, model: str, kept: bool) -> int:
    """The tile, of at most so many pixels a side, with which so many workers compute (rows, columns) soonest.

    There are at least as many tiles as workers, if the picture has so many blocks of 16 x 16. What takes the time is
    the number of tiles that one worker computes in turn, times the largest window. If it is to be `kept`, `at_most`
    itself is the tile where it leaves no worker without one.
    """

    def tiles(tile: int) -> int:
        return math.prod(math.ceil(side / tile) for side in size)

    def seconds(tile: int) -> int:
        return math.ceil(tiles(tile) / workers) * largest_window(size, tile, model)

    if kept and at_most and tiles(at_most) >= workers:
        return at_most
    sides = {math.ceil(max(size) / parts / 16) * 16 for parts in range(1, max(size) // 16 + 2)}
    enough = [tile for tile in sides if tile <= (at_most or tile) and tiles(tile) >= workers]
    return min(enough, key=lambda tile: (seconds(tile), -tile), default=16)


def overhead_of(
    inputs: Mapping[str, np.ndarray], size: Size, saved: Size, styles: Sequence[Size], settings: Settings
) -> Overhead:
    """What a run needs besides computing: for its inputs, and what is made of them.

    inputs: (H, W, 3 or 4) or (H, W) uint8, by the names that Pictures gives them; (rows, columns) of the picture that
    is painted, of those that are saved, and of the styles as they are shown to the network.
    """
    pixels, content = math.prod(size), inputs["content"]
    shown = [math.prod(style) for style in styles]
    masks = [math.prod(one.shape[:2]) for name, one in inputs.items() if "mask" in name]
    clear = content.shape[2] == 4
    coloured, masked = settings.preserve_color == "luma", "color mask" in inputs
    a_pixel = SAVING + SAVING_COLOURED * coloured + SAVING_MASKED * masked + SAVING_CLEAR * clear
    read = sum(picture.nbytes for picture in inputs.values())
    kept = read + math.prod(saved) * a_pixel + pixels * PLACED_MASK * (len(masks) - masked + clear)
    kept += coloured * RESIZING * math.prod(content.shape[:2])
    kept += MASKING * math.prod(inputs["color mask"].shape[:2]) if masked else 0
    largest = max(math.prod(picture.shape[:2]) for picture in inputs.values())
    resized = 3 * (pixels + sum(shown))
    not_yet = 0 if "keras" in sys.modules else LOADED - BARE  # it is loaded when a single photo has been read
    before = [READING * largest - not_yet, RESIZING * largest + resized + RESIZED * max(pixels, *shown)]
    before += [MASKING * max(masks) + MASK_RESIZED * pixels] if masks else []
    if settings.preserve_color == "match" or settings.init_image == "recolored":
        before.append(resized + COLOURING * max(pixels, *shown) + BAND)
    return Overhead(kept, resized + SHOWING * max(shown), read + max(before))


def animation_bytes(saved: Size, channels: int, frames: int) -> int:
    """Bytes of an animation of so many frames of (rows, columns): they are kept, and copied when it is written."""
    return math.prod(saved) * (4 * channels * frames + ANIMATING)


def free_memory(cap: float) -> tuple[float, float]:
    """Bytes that this process can have, and of a GPU, 0 if none are known; each at most `cap` GB unless that is 0."""
    gpu = gpu_memory().free  # first, since it may load the backend, which takes memory here
    main = free_main_memory()
    return (min(main, cap * 1e9), min(gpu, cap * 1e9)) if cap else (main, gpu)


def under_a_ulimit(free: float) -> str:
    """Which ulimit leaves no more bytes than are `free`, in words; empty if none does."""
    ulimits = left_by_ulimits()
    return next((f" under '{name}'" for name, left in ulimits.items() if left <= 1.01 * free), "")
