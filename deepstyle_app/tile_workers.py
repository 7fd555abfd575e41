"""The tiles of one picture shared out among workers.

An evaluation is two maps over the tiles with a sum between them. Ray's store holds x once on each machine; Gram
matrices and gradients come back. A worker that dies is replaced, and the tile that it had is computed again.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from deepstyle_support.backend import as_array, to_arrays
from deepstyle_support.device import fastest_factors
from deepstyle_support.engine import Engine, Networks
from deepstyle_support.memory import Overhead, Plan, plan_memory, shared_tile
from deepstyle_support.messages import UserError
from deepstyle_support.settings import Settings
from deepstyle_support.tiles import Tile
from deepstyle_support.weights import Weights

from .crew import Crew, crew_for, on_cluster
from .job import Job

Size = tuple[int, int]  # (rows, columns)
AHEAD = 2  # tiles a worker: how far those that are computed may be before the one that is to be added next


class TileWorker:
    """A process that computes tiles. It has the network on its device; all else comes with each call.

    So one that takes the place of another has nothing to learn.
    """

    def __init__(self, weights: Weights, padding: str):
        self.networks = Networks(weights, padding)

    def fastest_factors(self) -> str:
        return fastest_factors()

    def compute(self, method: Callable, tiled: Any, tile: Tile, *given: Any) -> Any:
        """What this method of TiledLoss gives for the tile, in arrays."""
        return to_arrays(method(tiled, self.networks, tile, *given))


class WorkersEngine(Engine):
    """The engine whose tiles are computed by workers. The weights are theirs: this process computes nothing itself."""

    rounds_as_this_process = False  # they may have other threads, and be on other machines

    def __init__(self, crew: Crew, plan: Plan, weights: Weights, settings: Settings):
        super().__init__(plan, weights, settings.padding)
        self.crew, self.model = crew, settings.model
        self._factors = ""  # that the workers multiply fastest; not asked yet
        self._sent_x: Any = None  # Ray's references to what was sent last
        self._sent_tiled: tuple[Any, Any] = None, None  # with the object itself

    def start(self) -> str:
        return self.crew.begin()

    def fastest_factors(self) -> str:
        """That of one of the workers, where they have other devices than this process."""
        if not self.crew.began or not (self.crew.on_gpus or on_cluster()):
            return fastest_factors()
        if not self._factors:
            self._employ()
            while not self._factors:
                if self.crew.free and not self.crew.is_working():
                    self.crew.submit("factors", "fastest_factors")
                done = self.crew.next_done()
                if done and isinstance(done.result, Exception):
                    raise done.result
                if done and not done.died:
                    self._factors = done.result
        return self._factors

    def _employ(self) -> None:
        """Start the workers, unless that was done."""
        import ray

        if not self.crew.start:
            self.crew.employ(TileWorker, ray.put(self.weights), self.padding)
            self.weights = {}  # in Ray's store now

    def tile_at(self, size: Size) -> int:
        # A coarse size has smaller tiles, so that there is one for each worker as well.
        return shared_tile(size, self.plan.tile, self.crew.number, self.model, kept=True)

    def map(self, tiles: list[Tile], compute: Callable, *given: Any) -> Iterator[Any]:
        import ray

        self._employ()
        tiled, (x, *rest) = compute.__self__, given  # type: ignore[attr-defined]
        sent = self._send_tiled(tiled), self._send_x(x), *map(ray.put, rest)
        return self._map(tiles, compute.__func__, *sent)  # type: ignore[attr-defined]

    def _map(self, tiles: list[Tile], method: Callable, *sent: Any) -> Iterator[Any]:
        """What `compute` gives for each of the tiles, in their order; `sent` are Ray's references."""
        crew, waiting, found = self.crew, deque(range(len(tiles))), dict[int, Any]()
        for next_one in range(len(tiles)):
            while next_one not in found:
                while crew.free and waiting and waiting[0] < next_one + AHEAD * crew.number:
                    number = waiting.popleft()
                    tiled, *others = sent
                    crew.submit((found, number), "compute", method, tiled, tiles[number], *others)
                done = crew.next_done()
                if not done or done.key[0] is not found:  # of a map that nobody waits for any more
                    continue
                if done.died:
                    waiting.appendleft(done.key[1])
                else:
                    found[done.key[1]] = done.result
            if isinstance(found[next_one], Exception):
                raise found[next_one]
            yield found.pop(next_one)

    def _send_x(self, x: Any) -> Any:
        """Ray's reference to x, (H, W, 3), in float32, as the network takes it, which is half as much to send.

        It is sent once for both passes of an evaluation. Whether it is the same is asked of its values: the caller may
        have changed the array in place since.
        """
        import ray

        values = as_array(x).astype("float32")
        if self._sent_x is None or not np.array_equal(ray.get(self._sent_x), values):
            self._sent_x = None  # what nobody refers to leaves Ray's store
            self._sent_x = ray.put(values)
        return self._sent_x

    def _send_tiled(self, tiled: Any) -> Any:
        """Ray's reference to a TiledLoss, which is sent anew only if it is another object than the last."""
        import ray

        if self._sent_tiled[0] is not tiled:
            self._sent_tiled = None, None
            self._sent_tiled = tiled, ray.put(tiled)
        return self._sent_tiled[1]

    def is_repeatable(self) -> bool:
        return not self.crew.on_gpus and not on_cluster()

    def close(self) -> None:
        self.crew.end()


class TileWorkers:
    """The workers that a job of one picture asks for. Raises UserError if it cannot have them; nothing is begun."""

    def __init__(self, job: Job):
        self.crew = crew_for(job.workers)
        if job.settings.tile == "off":
            raise UserError(f"--tile is off; {job.workers} workers need tiles to share")

    def plan(self, size: Size, settings: Settings, overhead: Overhead) -> Plan:
        """The plan for so many workers, with tiles that keep all of them busy. Raises TooLarge as `plan_memory`.

        What each machine of a cluster has is not known before Ray is: the plan is for one worker beside this process.
        """
        workers = self.crew.number
        here = 1 if on_cluster() else workers
        plan = plan_memory(size, settings, overhead, None, here)
        tile = shared_tile(size, plan.tile, workers, settings.model, kept=settings.tile != "auto")
        return plan_memory(size, dataclasses.replace(settings, tile=str(tile)), overhead, None, here)

    def engine(self, plan: Plan, weights: Weights, settings: Settings) -> WorkersEngine:
        return WorkersEngine(self.crew, plan, weights, settings)
