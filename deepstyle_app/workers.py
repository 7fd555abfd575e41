"""Tiles shared out among workers: on this machine, its GPUs, or a Ray cluster.

An evaluation is two maps over the tiles with a sum between them. Ray's store holds x once on each machine; Gram
matrices and gradients come back. A worker that dies is replaced, and the tile that it had is computed again. On a
machine with GPUs each worker has one of its own, else they share the cores. On a cluster, which RAY_ADDRESS names, the
program must be at the same place on each of its machines.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import re
import shlex
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from deepstyle_support.backend import as_array, import_keras, to_arrays
from deepstyle_support.engine import Engine, on_device
from deepstyle_support.limits import usable_cores
from deepstyle_support.memory import Held, Plan, plan_memory, shared_tile
from deepstyle_support.messages import UserError, counted, silenced_stderr
from deepstyle_support.settings import Settings
from deepstyle_support.tiles import Tile
from deepstyle_support.weights import Weights

from .job import Job
from .terminal import signals_kept_from_children

Size = tuple[int, int]  # (rows, columns)
FOLDER = Path(__file__).resolve().parent.parent  # which the workers' processes import from
DEATHS = 3  # of workers one after another, for each that there is to be, without a tile that is computed in between
AHEAD = 2  # tiles a worker: how far those that are computed may be before the one that is to be added next
PATIENCE = 300  # seconds to wait for a worker if there is no other; to load a backend takes 5 to 60
ANSWER = 10  # seconds in which somebody is to answer where a cluster is said to be
# Ray reads this when it is imported. By itself it asks 20 times, and if nobody answers each takes 40 seconds.
IMPATIENT = {"RAY_NUM_REDIS_GET_RETRIES": "1", "RAY_py_gcs_connect_timeout_s": "15"}
LOOK = 5  # seconds between two looks at whether workers' processes are there; three times none means that they die


class Worker:
    """A process that computes tiles. It has the network on its device; all else comes with each call.

    So one that takes the place of another has nothing to be told.
    """

    def __init__(self, weights: Weights, padding: str):
        self.network = on_device(weights, padding)

    def compute(self, method: Callable, tiled: Any, tile: Tile, *given: Any) -> Any:
        """What this method of TiledLoss gives for the tile, in arrays."""
        return to_arrays(method(tiled, self.network, tile, *given))


class Workers:
    """So many workers, each in a process of its own: whoever is free computes the next tile.

    `begin` starts Ray, and `employ` the workers, once; both raise UserError, status 1, if they cannot.
    """

    def __init__(self, number: int):
        self.number, self.deaths = number, 0
        self.began, self.threads, self.on_gpus = False, 1, False
        self.logs: Path | None = None  # Ray's own, on this machine
        self.start: Callable[[], Any] | None = None
        self.free: list[Any] = []
        # What each is doing: the number of its tile, and where the result goes. One that is starting has no tile.
        self.busy: dict[Any, tuple[Any, int | None, dict[int, Any]]] = {}

    def plan(self, size: Size, settings: Settings, held: Held) -> Plan:
        """The plan for so many workers, with tiles that keep all of them busy. Raises TooLarge as `plan_memory`.

        What each machine of a cluster has is not known before Ray is: the plan is for one worker beside this process.
        """
        here = 1 if on_cluster() else self.number
        plan = plan_memory(size, settings, held, None, here)
        tile = shared_tile(size, plan.tile, self.number, settings.model, kept=settings.tile != "auto")
        return plan_memory(size, dataclasses.replace(settings, tile=str(tile)), held, None, here)

    def engine(self, plan: Plan, weights: Weights, settings: Settings) -> "WorkersEngine":
        """The engine whose tiles they compute."""
        return WorkersEngine(self, plan, weights, settings)

    def begin(self) -> str:
        """Start Ray, or join the cluster that RAY_ADDRESS names; says what each worker has of it."""
        self.began, on_sigterm = True, signal.getsignal(signal.SIGTERM)
        with signals_kept_from_children():
            context = start_ray(usable_cores())
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own handler ends the process without a word
        self.logs = None if on_cluster() else Path(context.address_info["session_dir"], "logs")
        import ray

        machines = [machine["Resources"] for machine in ray.nodes() if machine["Alive"]]
        self.on_gpus = any(machine.get("GPU") for machine in machines)
        self.threads = threads_each(self.number, machines)
        if self.on_gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # they are the workers': this process computes nothing
        each = "a GPU" if self.on_gpus else counted(self.threads, "CPU core")
        where = counted(len(machines), "machine") if on_cluster() else "this machine"
        return f"{counted(self.number, 'worker')} with {each} each of {where}, with {backend()}"

    def employ(self, weights: Weights, padding: str) -> None:
        """Start all workers unless that was done; each is free when it is ready."""
        import ray

        if not self.start:
            resources = {"num_cpus": self.threads, "num_gpus": int(self.on_gpus)}
            kind: Any = ray.remote(Worker)
            kind = kind.options(**resources, runtime_env=environment(self.threads))
            self.start = functools.partial(kind.remote, ray.put(weights), padding)
            for _ in range(self.number):
                self.add()

    def add(self) -> None:
        assert self.start
        worker = self.start()
        self.busy[worker.__ray_ready__.remote()] = worker, None, {}

    def end(self) -> None:
        """Let go of the workers, and of Ray, if it was begun."""
        if self.began:
            import ray

            ray.shutdown()

    def map(self, tiles: list[Tile], method: Callable, tiled: Any, *given: Any) -> Iterator[Any]:
        """What `compute` gives for each of the tiles, in their order. `tiled` and `given` are Ray's references."""
        waiting, found = deque(range(len(tiles))), dict[int, Any]()
        for next_one in range(len(tiles)):
            while next_one not in found:
                while self.free and waiting and waiting[0] < next_one + AHEAD * self.number:
                    worker, number = self.free.pop(), waiting.popleft()
                    self.busy[worker.compute.remote(method, tiled, tiles[number], *given)] = worker, number, found
                self.wait(waiting)
            if isinstance(found[next_one], Exception):
                raise found[next_one]
            yield found.pop(next_one)

    def wait(self, waiting: deque[int]) -> None:
        """Take the next result, or error, or put the tile of a worker that died back to those that are waiting."""
        import ray

        done = self.first_done()
        worker, number, found = self.busy.pop(done)
        try:
            result = ray.get(done)
        except ray.exceptions.RayTaskError as error:  # the worker lives, but this cannot be computed
            result = error.cause
        except ray.exceptions.RayError as error:
            self.deaths += 1
            if self.deaths > DEATHS * self.number:
                last = (str(error).strip() or type(error).__name__).splitlines()[-1]
                raise UserError(f"no worker is left: {self.deaths} died one after another; {last}", status=1) from error
            self.add()
            if number is not None:
                waiting.appendleft(number)
            return
        self.free.append(worker)
        if number is not None:
            found[number], self.deaths = result, 0

    def first_done(self) -> Any:
        """Ray's reference to the next result. Raises UserError if there is nobody who computes, nor comes to."""
        import ray

        computing, unseen = any(number is not None for _, number, _ in self.busy.values()), 0
        for _ in range(PATIENCE // LOOK):
            done, _ = ray.wait(list(self.busy), num_returns=1, timeout=None if computing else LOOK)
            if done:
                return done[0]
            unseen = 0 if on_cluster() or worker_processes() else unseen + 1
            if unseen == 3:
                raise UserError(f"the workers' processes end as soon as they start: {self.last_words()}", status=1)
        raise UserError(f"no worker is ready after {PATIENCE} seconds; is there room for one?", status=1)

    def last_words(self) -> str:
        """What a process that Ray started has said last, and where Ray says more."""
        said = (self.logs / "raylet.err").read_text(errors="replace").split("\n") if self.logs else []
        return f"{next(filter(str.strip, reversed(said)), 'without a word')}; Ray's logs are in {self.logs}"


class WorkersEngine(Engine):
    """The engine whose tiles are computed by workers. The weights are theirs: this process computes nothing itself."""

    rounds_as_this_process = False  # they may have other threads, and be on other machines

    def __init__(self, workers: Workers, plan: Plan, weights: Weights, settings: Settings):
        super().__init__(plan, weights, settings.padding)
        self.workers, self.model = workers, settings.model
        self._sent_x: Any = None  # Ray's references to what was sent last
        self._sent_tiled: tuple[Any, Any] = None, None  # with the object itself

    def start(self) -> str:
        return self.workers.begin()

    def tile_at(self, size: Size) -> int:
        # A coarse size has smaller tiles, so that there is one for each worker as well.
        return shared_tile(size, self.plan.tile, self.workers.number, self.model, kept=True)

    def map(self, tiles: list[Tile], compute: Callable, *given: Any) -> Iterator[Any]:
        import ray

        self.workers.employ(self.weights, self.padding)
        tiled, (x, *rest) = compute.__self__, given  # type: ignore[attr-defined]
        sent = self._send_tiled(tiled), self._send_x(x), *map(ray.put, rest)
        return self.workers.map(tiles, compute.__func__, *sent)  # type: ignore[attr-defined]

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
        return not self.workers.on_gpus and not on_cluster()

    def close(self) -> None:
        self.workers.end()


def worker_processes() -> list[psutil.Process]:
    """Those that Ray runs for us on this machine, less what it keeps for itself and those that wait for work."""
    by_ray = psutil.Process().children(recursive=True)
    found = []
    for process in by_ray:
        with contextlib.suppress(psutil.Error):  # it has ended
            idle = process.name().startswith(("ray::IDLE", "ray::DashboardA", "ray::RuntimeEnv"))
            if process.parent().name() == "raylet" and not idle:
                found.append(process)
    return found


def on_cluster() -> bool:
    return os.environ.get("RAY_ADDRESS", "") not in ("", "local")


def start_ray(cores: int) -> Any:
    """Start Ray on so many of this machine's cores, or join the cluster that RAY_ADDRESS names: Ray's context.

    Raises UserError, status 1, if it cannot. What Ray has to say then, and later, is not shown.
    """
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if on_cluster():
        os.environ.update(IMPATIENT | os.environ)
    else:  # "local", since Ray would else join one that happens to run on this machine
        options |= {"address": "local", "num_cpus": cores, "include_dashboard": False}
    try:
        import ray

        check_that_cluster_answers()
        with silenced_stderr():  # where its C++ code writes as it likes
            return ray.init(**options)
    except Exception as error:  # Ray raises anything here
        raise UserError(f"Ray cannot start: {why_not(error)}", status=1) from error


def why_not(error: BaseException) -> str:
    """What Ray says, in a line, with the first sentence of what it was caused by: a traceback, as a text."""
    said = [" ".join(str(error).split()) or type(error).__name__]
    if cause := str(error.__cause__ or "").strip():
        said.append(cause.splitlines()[-1].partition(". ")[0])
    return "; ".join(said)


def check_that_cluster_answers() -> None:
    """Raise ConnectionError if nobody listens where RAY_ADDRESS says; Ray itself would try for minutes."""
    if not on_cluster():
        return
    import ray

    address = os.environ["RAY_ADDRESS"]
    if address == "auto":
        with contextlib.suppress(ImportError, AttributeError):  # another version of Ray may have it elsewhere
            from ray._private.services import canonicalize_bootstrap_address_or_die

            address = canonicalize_bootstrap_address_or_die(address)
    parts = re.fullmatch(r"(?:ray://)?\[?([^/]+?)\]?:(\d{1,5})", address)
    if not parts:  # Ray says what is wrong with it
        return
    host = parts[1] if parts[1] not in ("localhost", "127.0.0.1", "::1") else ray.util.get_node_ip_address()
    try:
        socket.create_connection((host, int(parts[2])), ANSWER).close()
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConnectionError(f"nobody answers at {address}, which RAY_ADDRESS names: {why}") from None


def backend() -> str:
    return import_keras().backend.backend()


def threads_each(workers: int, machines: list[dict[str, float]]) -> int:
    """The most cores that each worker can have, so that there is room for all. Raises UserError if there is not.

    machines: what Ray calls their resources. If any has GPUs, each worker has one.
    """
    on_gpus = any(machine.get("GPU") for machine in machines)

    def room(threads: int) -> int:
        at_most = (int(machine.get("CPU", 0)) // threads for machine in machines)
        return sum(
            min(most, int(machine.get("GPU", 0))) if on_gpus else most
            for most, machine in zip(at_most, machines, strict=True)
        )

    if room(1) < workers:
        there = counted(room(1), "GPU" if on_gpus else "CPU core")
        raise UserError(f"--workers is {workers}; Ray has {there} for them")
    most = max(int(machine.get("CPU", 0)) for machine in machines)
    return next(threads for threads in range(most, 0, -1) if room(threads) >= workers)


def environment(threads: int) -> dict[str, Any]:
    """What Ray is to start a worker's process in, on any machine: with these modules, this backend and its threads."""
    own = [os.environ.get("PYTHONPATH")]  # an empty part would stand for the folder that the worker is in
    names = "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS", "NPROC"  # NPROC is JAX's
    variables = {
        "PYTHONPATH": os.pathsep.join([str(FOLDER), *filter(None, own)]),
        "KERAS_BACKEND": backend(),
        **dict.fromkeys(names, str(threads)),
    }
    # Ray puts the interpreter into a shell's command as it is, so its path is to be without what a shell knows.
    interpreter = {} if on_cluster() else {"py_executable": shlex.quote(sys.executable)}
    return {"env_vars": variables, **interpreter}


def workers_for(job: Job) -> Workers:
    """The workers of a job that asks for several. Raises UserError for what is wrong with them; nothing is begun."""
    number = job.workers
    if number < 1:
        raise UserError(f"--workers is {number}; it must be 1 or more")
    if os.path.isdir(job.content):
        raise UserError(f"'{job.content}' is a folder; --workers shares out one photo's tiles")
    if not on_cluster() and number > usable_cores():
        cores = counted(usable_cores(), "CPU core")
        raise UserError(f"--workers is {number}; this machine has {cores} for them")
    if job.settings.tile == "off":
        raise UserError(f"--tile is off; {number} workers need tiles to share")
    if not importlib.util.find_spec("ray"):
        raise UserError(f"--workers needs the package ray; '{sys.executable} -m pip install ray' brings it")
    return Workers(number)
