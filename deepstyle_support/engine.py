"""Where a picture is computed: the network on its device, the plan of memory, and the way over the tiles."""

from collections.abc import Callable, Iterator
from typing import Any

from .backend import import_keras, on_cpu, to_tensors
from .cache import Cache
from .convolution import FULL, Kernel, kernel_on_device, rounded_kernel
from .device import describe_device, fastest_factors
from .memory import Plan
from .tiles import Tile
from .weights import Weights

Tensor = Any  # one of the backend's
Size = tuple[int, int]  # (rows, columns)


IN_FULL = ("conv1_1", "conv2_1")  # the convolutions that are never rounded

Network = dict[str, tuple[Kernel, Tensor]]  # of each layer its kernel as `convolve` needs it, and its bias


def on_device(weights: Weights, padding: str) -> Network:
    """The network as tensors of the backend."""
    to_tensor = import_keras().ops.convert_to_tensor
    return {name: (kernel_on_device(kernel, padding), to_tensor(bias)) for name, (kernel, bias) in weights.items()}


class Networks(dict[str, Network]):
    """The network on the device, by the type of its convolutions' factors; a rounded one is made when it is needed.

    Two convolutions are always in full: of all, rounding them harms the gradient most (docs/design.md). Beside the
    network are the targets of the tile that was computed last.
    """

    def __init__(self, weights: Weights, padding: str):
        self[FULL] = on_device(weights, padding)
        self.targets: tuple[Any, Tile | None, Any] = None, None, None  # of which loss, which tile, and as tensors

    def targets_of(self, loss: Any, tile: Tile, make: Callable[[], Any]) -> Any:
        """make(), as tensors: a picture that is one tile has them on the device from one evaluation to the next."""
        if self.targets[0] is not loss or self.targets[1] != tile:
            self.targets = None, None, None  # before there are others: memory may have run out
            self.targets = loss, tile, to_tensors(make())
        return self.targets[2]

    def __missing__(self, factors: str) -> Network:
        self[factors] = {
            name: (kernel if name in IN_FULL else rounded_kernel(kernel, factors), bias)
            for name, (kernel, bias) in self[FULL].items()
        }
        return self[factors]


class Engine:
    """Where tiles are computed: here in this process, one after another, on the backend's device.

    plan: of memory; weights: from `load_weights`; cache: may be that of other engines with the same weights and
    padding, for other pictures. An engine that computes elsewhere has another `start`, `map` and `close`.
    """

    rounds_as_this_process = True  # so what this process can know of itself says how sums are rounded

    def __init__(self, plan: Plan, weights: Weights, padding: str = "zeros", cache: Cache | None = None):
        self.plan, self.weights, self.padding = plan, weights, padding
        self.cache = Cache() if cache is None else cache

    def start(self) -> str:
        """Get ready; what it computes on, in words. Raises UserError if it cannot compute."""
        return describe_device()

    def factors(self, precision: str) -> str:
        """The type that convolutions' factors are rounded to, for a --precision."""
        return FULL if precision == "full" else self.fastest_factors()

    def fastest_factors(self) -> str:
        """The type of factors that it multiplies fastest."""
        return fastest_factors()

    def tile_at(self, size: Size) -> int | None:
        """Pixels of the largest tile of a picture of (rows, columns); None: the whole picture."""
        return self.plan.tile

    def map(self, tiles: list[Tile], compute: Callable, *given: Any) -> Iterator[Any]:
        """compute(networks, tile, *given) of each tile in their order; `compute` is a method of TiledLoss."""
        networks = self.cache.get("the network", lambda: Networks(self.weights, self.padding))
        self.weights = {}  # as large as the network, and not needed any more
        return (compute(networks, tile, *given) for tile in tiles)

    def is_repeatable(self) -> bool:
        """Whether sums are rounded alike from run to run, on the same machine."""
        return on_cpu()

    def close(self) -> None:
        """Let go of what `start` has begun."""
