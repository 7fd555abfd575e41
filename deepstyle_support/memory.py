"""How much memory there is, how much a picture needs, and the plan that follows: whole or in tiles."""

import bisect
import contextlib
import itertools
import math
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import psutil

from .device import gpu_memory
from .messages import UserError
from .vgg import CHANNELS, halo, stride

SMALLEST = 32  # rows and columns of a picture that is computed: conv5 then has 2 x 2 positions
LARGE_TILE = 512  # pixels: at 1024 x 1024 tiles of this size take 2 times as long as the whole, tiles of 128 6 times
SMALL_TILE = 128
FEW_CORRECTIONS, MOST_CORRECTIONS = 5, 1000  # of which some dozens are of use
# Beyond 2 m for m corrections, so that the plan is no less than the peaks measured: at 4096 x 4096 in tiles of 512 that
# would be 8, at 6048 x 8064 in tiles of 576 10.3.
DEVICE_VECTORS = 11
CUDA = 800e6  # bytes that its libraries take here beside the GPU's; measured with PyTorch on an H200: 700 to 800 MB
WORKER = 800e6  # bytes of a process that computes tiles for this one, before it computes
RAY = 400e6  # of Ray's own processes


class Wishes(Protocol):
    """What of a run's settings the plan depends on; the fields of Settings with these names."""

    @property
    def tile(self) -> str: ...
    @property
    def history(self) -> int: ...
    @property
    def max_memory(self) -> float: ...
    @property
    def model(self) -> str: ...
    @property
    def content_layer(self) -> tuple[str, ...]: ...
    @property
    def padding(self) -> str: ...
    @property
    def optimizer(self) -> str: ...


class Plan(NamedTuple):
    """How a picture is computed in the memory that there is."""

    tile: int | None  # pixels of a tile's side at most; None: the whole picture at once
    history: int  # corrections that L-BFGS keeps
    needed: float  # bytes at the peak, estimated; without those on a GPU
    free: float
    on_gpu: tuple[float, float] | None = None  # bytes needed and free there

    def in_words(self, wished_history: int) -> str:
        """How and in how much memory the picture is computed."""
        way = f"in tiles of at most {self.tile} pixels" if self.tile else "as a whole"
        said = f"{way}, with about {self.needed / 1e9:.1f} GB of memory of {self.free / 1e9:.1f} GB free"
        if self.on_gpu:
            needed, free = self.on_gpu
            said += f", and {needed / 1e9:.1f} GB on the GPU of {free / 1e9:.1f} GB free"
        if self.history < wished_history:
            said += f"; for lack of it L-BFGS keeps {self.history} corrections instead of {wished_history}"
        return said


def plan_memory(
    size: tuple[int, int], settings: Wishes, held: float = 0, found: tuple[float, float] | None = None, workers: int = 0
) -> Plan:
    """The quickest way to paint a picture of (rows, columns) in the memory that is free, less the bytes `held` beside.

    With `workers` so many processes on this machine compute tiles at the same time, each on a GPU of its own if there
    are any.

    The picture is computed as a whole if that fits, and else in the largest tiles that do. Before tiles get smaller
    than 512 pixels, L-BFGS keeps fewer corrections, down to 5. Raises UserError if nothing fits, with the largest size
    that would. found: what `free_memory` said before this process took any.
    """
    free, gpu_free = found or free_memory(settings.max_memory)
    if plan := way_that_fits(size, settings, free - held, gpu_free, workers):
        return plan._replace(needed=plan.needed + held, free=free)

    def too_large(rows: int) -> bool:
        smaller = rows, max(1, rows * size[1] // size[0])
        # What is held beside grows with the picture, less those that are read.
        held_then = held * math.prod(smaller) / math.prod(size)
        return not way_that_fits(smaller, settings, free - held_then, gpu_free, workers)

    largest = bisect.bisect(range(1, size[0]), False, key=too_large)
    tile = SMALL_TILE if settings.tile == "auto" else given_tile(settings)
    fewest = min(settings.history, FEW_CORRECTIONS)
    all_needed = needed_by_all(workers, bool(gpu_free), size, tile, fewest, settings)
    here, on_gpu = all_needed.shared(bool(gpu_free), settings.optimizer)
    needed = held + here
    if needed <= free and settings.optimizer == "scipy" and corrections_of_scipy(size) < fewest:
        raise UserError(
            f"{size[0]} x {size[1]} pixels are too many for SciPy's L-BFGS-B, enough for --image_size {largest}; "
            "--optimizer device has no such limit"
        )
    raise UserError(
        f"{size[0]} x {size[1]} pixels need {needed / 1e9:.1f} GB of memory "
        f"{'or more' if settings.tile == 'auto' else '(--tile auto may need less)'}, {free / 1e9:.1f} GB are free"
        f"{f'; on the GPU {on_gpu / 1e9:.1f} GB, {gpu_free / 1e9:.1f} GB are free' if gpu_free else ''}, "
        f"{f'enough for --image_size {largest}' if largest >= SMALLEST else 'too little for any'}"
    )


def way_that_fits(
    size: tuple[int, int], settings: Wishes, free: float, gpu_free: float, workers: int = 0
) -> Plan | None:
    """The plan for a picture of (rows, columns) in so many bytes; None if there is none."""
    side, fewest = max(size), min(settings.history, FEW_CORRECTIONS)

    def corrections(tile: int | None) -> float:
        """How many L-BFGS can keep beside tiles of this size, at most as many as are wished for; or less than 0."""
        needed = needed_by_all(workers, bool(gpu_free), size, tile, 0, settings)
        here, on_gpu = needed.shared(bool(gpu_free), settings.optimizer)
        room = free - here
        if settings.optimizer == "scipy":
            room = min(room, corrections_of_scipy(size) * bytes_per_correction(size, "scipy"))
        if gpu_free and (room < 0 or on_gpu > gpu_free):
            return -1
        if gpu_free and settings.optimizer == "device" and not workers:
            room = gpu_free - on_gpu
        return min(settings.history, room // bytes_per_correction(size, settings.optimizer))

    def tile_of(parts: int) -> int | None:
        """The longer side in so many parts, in whole strides of the deepest layer."""
        return None if parts == 1 else math.ceil(side / parts / 16) * 16

    if settings.tile != "auto":
        tile = given_tile(settings)
    else:
        # The last number of parts of which each, rounded up to 16, still has 512 pixels.
        most = max(1, math.ceil(side / (LARGE_TILE - 16)) - 1)
        kept = max(corrections(None), corrections(tile_of(most)))
        if kept < fewest:
            most, kept = math.ceil(side / SMALL_TILE), fewest

        def fits(parts: int) -> bool:
            return corrections(tile_of(parts)) >= kept

        tile = tile_of(1 if fits(1) else 2 + bisect.bisect_left(range(2, most), True, key=fits))
    history = corrections(tile)
    if history < fewest:
        return None
    needed = needed_by_all(workers, bool(gpu_free), size, tile, int(history), settings)
    here, on_gpu = needed.shared(bool(gpu_free), settings.optimizer)
    whole_or_tile = tile if tile and tile < side else None
    return Plan(whole_or_tile, int(history), here, free, (on_gpu, gpu_free) if gpu_free else None)


def smaller_tile(size: tuple[int, int], tile: int | None) -> int | None:
    """Pixels of tiles half as large as those, or as the whole picture, but no less than 128; None if they are not more.

    For a picture of (rows, columns) that did not fit after all.
    """
    side = min(max(size), tile or max(size))
    return max(SMALL_TILE, side // 2 // 16 * 16) if side > SMALL_TILE else None


def given_tile(settings: Wishes) -> int | None:
    """The number that --tile is; None for off."""
    return None if settings.tile == "off" else int(settings.tile)


def bytes_per_vector(size: tuple[int, int], optimizer: str) -> int:
    """A vector of L-BFGS: 3 channels in SciPy's float64, or in float32 on the device."""
    return 3 * (8 if optimizer == "scipy" else 4) * math.prod(size)


def bytes_per_correction(size: tuple[int, int], optimizer: str) -> int:
    """What L-BFGS keeps of each: a step and a change of the gradient."""
    return 2 * bytes_per_vector(size, optimizer)


def corrections_of_scipy(size: tuple[int, int]) -> int:
    """The most that SciPy's L-BFGS-B can keep: it counts its 2 m n + 5 n + 11 m^2 + 8 m numbers in 32 bits.

    n: the numbers of the picture, m: the corrections. With more of them it ends the process.
    """
    n, m = 3 * math.prod(size), MOST_CORRECTIONS
    return (2**31 - 1 - 5 * n - 11 * m**2 - 8 * m) // (2 * n)


def network_of(settings: Wishes) -> tuple[str, tuple[str, ...], str, str]:
    """What beside the picture and its tiles decides how much memory is needed."""
    return settings.model, settings.content_layer, settings.padding, settings.optimizer


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


def needed_memory(
    size: tuple[int, int],
    tile: int | None,
    history: int,
    model: str = "vgg16",
    content_layers: Collection[str] = ("conv5_2",),
    padding: str = "zeros",
    optimizer: str = "scipy",
) -> Needed:
    """What a picture of (rows, columns) needs in tiles of this size, or as a whole.

    The numbers are fitted to measured peaks on a CPU (TensorFlow 2.21); benchmarks/speed.py shows both.
    """
    pixels = math.prod(size)
    layers = CHANNELS[model]
    computed = largest_window(size, tile, model) if tile else pixels
    # Of VGG16's features, 270 numbers a pixel, 7.6 bytes a number are there at once; of tiles more, since their shapes
    # differ, and what one leaves does not fit the next.
    numbers = computed * sum(channels / stride(name) ** 2 for name, channels in layers.items())
    computing = 150e6 + (12 if tile else 7.6) * numbers
    # The content's features at early layers are large; they are kept whole, and given to the backend where it computes.
    targets = 4 * sum(layers[name] / stride(name) ** 2 for name in content_layers)
    computing += computed * targets
    if padding == "edge":
        # Each kernel's outer lines and corners once more, 16 of in x out, and those for the gradient.
        computing += 4 * 2 * 16 * sum(inputs * outputs for inputs, outputs in itertools.pairwise((3, *layers.values())))
    # SciPy's L-BFGS-B works in 2 m + 5 vectors for m corrections; x, its gradient and copies come on top: 10 on one
    # machine, 12 on another, and one to be sure. The device's has 2 m, and as many more as were measured.
    vectors = 5 + 13 if optimizer == "scipy" else DEVICE_VECTORS
    needed = (2 * history + vectors) * bytes_per_vector(size, optimizer)
    return Needed(computing, needed, 900e6 + pixels * targets)


def needed_by_all(
    workers: int, on_gpus: bool, size: tuple[int, int], tile: int | None, history: int, settings: Wishes
) -> Needed:
    """`needed_memory` of one process, or of this one and `workers` that compute for it; on GPUs, of each GPU.

    Beside them Ray's store holds x, once more than this process, the content's features, and of each worker two
    gradients: the one that it has computed, and the one that waits until those before it are added.
    """
    needed = needed_memory(size, tile, history, *network_of(settings))
    if not workers:
        return needed
    layers = CHANNELS[settings.model]
    targets = 4 * sum(layers[name] / stride(name) ** 2 for name in settings.content_layer)
    window = largest_window(size, tile or max(size), settings.model)
    ray = RAY + workers * (WORKER + 2 * 3 * 4 * window) + math.prod(size) * (2 * 3 * 4 + targets)
    # The GPUs are the workers': this process has the optimiser's vectors in main memory.
    return Needed(needed.computing * (1 if on_gpus else workers), 0, needed.vectors + needed.rest + ray)


def largest_window(size: tuple[int, int], tile: int, model: str) -> int:
    """Pixels that are computed at a time, at most: a tile, and all around it that its features can see."""
    return math.prod(min(side, tile + 2 * halo(CHANNELS[model], model)) for side in size)


def shared_tile(size: tuple[int, int], at_most: int | None, workers: int, model: str, kept: bool) -> int:
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


def held_beside(
    inputs: Iterable[np.ndarray], saved: tuple[int, int], coloured: bool, masked: bool, clear: bool, frames: int
) -> int:
    """Bytes that a run holds beside what is computed: its inputs, the picture that is saved, an animation's frames.

    saved: (rows, columns) of the pictures that are saved; coloured, masked: whether they get the content's colours,
    everywhere or by a mask; clear: whether they get its alpha.
    """
    # By a pixel, as measured at 24 megapixels: 10, 21 and 38 bytes; at 6 alpha takes 5 more. An animation keeps 3 or 4
    # channels for each frame, and when it is written takes up to 3 times as much more for each, and about 25 at once.
    channels = 4 if clear else 3
    a_pixel = 10 + 11 * coloured + 17 * masked + 5 * clear + (4 * channels * frames + 25 if frames else 0)
    return sum(picture.nbytes for picture in inputs) + math.prod(saved) * a_pixel


def free_memory(cap: float) -> tuple[float, float]:
    """Bytes that this process can have, and of a GPU, 0 if none are known; each at most `cap` GB unless that is 0.

    It is what the machine has free, or less if a cgroup leaves less.
    """
    gpu = gpu_memory().free  # first, since it may load the backend, which takes memory here
    limits: list[float] = [psutil.virtual_memory().available, *left_by_cgroups()]
    if cap:
        limits.append(cap * 1e9)
        gpu = min(gpu, cap * 1e9)
    return min(limits), gpu


def left_by_cgroups() -> list[float]:
    """What each cgroup that this process is in, or that holds one it is in, leaves of its limit; on Linux only."""
    root = Path("/sys/fs/cgroup")
    left: list[float] = []
    own: list[list[str]] = []
    with contextlib.suppress(OSError):
        own = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    for _, controllers, name in [*own, ["", "", "/"], ["", "memory", "/"]]:
        version_1 = "memory" in controllers
        limit, use = ("limit_in_bytes", "usage_in_bytes") if version_1 else ("max", "current")
        top = root / "memory" if version_1 else root
        for folder in (top / name.lstrip("/"), *(top / name.lstrip("/")).parents):
            with contextlib.suppress(OSError, ValueError):  # there is no such file, or it says "max"
                most, used = (int((folder / f"memory.{what}").read_text()) for what in (limit, use))
                # What files leave in memory is given up when it is needed.
                cached = re.search(r"^(?:total_)?inactive_file (\d+)", (folder / "memory.stat").read_text(), re.M)
                left.append(most - used + (int(cached[1]) if cached else 0))
    return left
