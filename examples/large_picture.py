#!/usr/bin/env python3
"""Paint one large picture with its tiles shared out among workers: on this machine, its GPUs, or a Ray cluster.

    python examples/large_picture.py CONTENT STYLE [STYLE ...] PREFIX [deepstyle's flags] --workers 4

Its arguments, files and messages are deepstyle.py's, and a run that one of the two began is resumed by the other. It
needs the package ray. On a machine with GPUs each worker has one of its own, else they share the cores. On a cluster
that is running set RAY_ADDRESS=auto; this folder must then be at the same place on each of its machines.

An evaluation is two maps over the tiles with a sum between them. Ray's store holds x once on each machine; Gram
matrices and gradients come back. A worker that dies is replaced, and the tile that it had is computed again.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import os
import shlex
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

FOLDER = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(FOLDER))
import deepstyle  # noqa: E402, it is not installed but lies above
from deepstyle_support.backend import as_array, import_keras  # noqa: E402
from deepstyle_support.limits import usable_cores  # noqa: E402
from deepstyle_support.memory import Held, Plan, plan_memory, shared_tile  # noqa: E402
from deepstyle_support.messages import UserError  # noqa: E402
from deepstyle_support.terminal import leave, signals_kept_from_children  # noqa: E402
from deepstyle_support.weights import Weights  # noqa: E402

DEATHS = 3  # of workers one after another, for each that there is to be, without a tile that is computed in between
AHEAD = 2  # tiles a worker: how far those that are computed may be before the one that is to be added next
PATIENCE = 300  # seconds to wait for a worker if there is no other; to load a backend takes 5 to 60
LOOK = 5  # seconds between two looks at whether workers' processes are there; three times none means that they die


class Worker:
    """A process that computes tiles. It has the network on its device; all else comes with each call.

    So one that takes the place of another has nothing to be told.
    """

    def __init__(self, weights: Weights, padding: str):
        self.weights = deepstyle.on_device(weights, padding)

    def compute(self, method: str, of_tile: deepstyle.TileLosses, tile: deepstyle.Tile, *given: Any) -> Any:
        """What this method of TileLosses gives for the tile."""
        of_tile.weights = self.weights
        found = getattr(of_tile, method)(tile, *given)
        if method == "parts_and_gradient":
            parts, gradient = found
            return parts, as_array(gradient)
        return found


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

    def begin(self) -> str:
        """Start Ray, or join the cluster that RAY_ADDRESS names; says what each worker has of it."""
        import ray

        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if not on_cluster():  # "local", since Ray would else join one that happens to run on this machine
            options |= {"address": "local", "num_cpus": usable_cores(), "include_dashboard": False}
        self.began, on_sigterm = True, signal.getsignal(signal.SIGTERM)
        try:
            with signals_kept_from_children():
                context: Any = ray.init(**options)
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own handler ends the process without a word
            self.logs = None if on_cluster() else Path(context.address_info["session_dir"], "logs")
        except Exception as error:  # Ray raises anything here
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"Ray cannot start: {first}", status=1) from error
        machines = [machine["Resources"] for machine in ray.nodes() if machine["Alive"]]
        self.on_gpus = any(machine.get("GPU") for machine in machines)
        self.threads = threads_each(self.number, machines)
        if self.on_gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # they are the workers': this process computes nothing
        each = "a GPU" if self.on_gpus else f"{self.threads} CPU core{'s' * (self.threads > 1)}"
        where = f"{len(machines)} machines" if on_cluster() else "this machine"
        workers = f"{self.number} worker{'s' * (self.number > 1)}"
        return f"{workers} with {each} each of {where}, with {backend()}"

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

    def map(self, tiles: list[deepstyle.Tile], method: str, of_tile: Any, *given: Any) -> Iterator[Any]:
        """What `compute` gives for each of the tiles, in their order. `of_tile` and `given` are Ray's references."""
        waiting, found = deque(range(len(tiles))), dict[int, Any]()
        for next_one in range(len(tiles)):
            while next_one not in found:
                while self.free and waiting and waiting[0] < next_one + AHEAD * self.number:
                    worker, number = self.free.pop(), waiting.popleft()
                    self.busy[worker.compute.remote(method, of_tile, tiles[number], *given)] = worker, number, found
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


class SharedObjective(deepstyle.Objective):
    """deepstyle's Objective, with the tiles computed by workers."""

    def __init__(self, workers: Workers, content: Any, style: Any, **options: Any):
        self.workers = workers
        self.sent: dict[str, tuple[Any, Any]] = {}
        workers.employ(options["weights"], options["padding"])
        # A coarse size has smaller tiles, so that there is one for each worker as well.
        at_most = int(options["tile"]) if options["tile"].isdigit() else None
        tile = shared_tile(content.shape[:2], at_most, workers.number, options["model"], kept=True)
        # The weights are the workers'; this process computes nothing with them.
        super().__init__(content, style, **options | {"weights": {}, "tile": str(tile)})

    def evaluate(self, x: Any) -> deepstyle.Evaluation:
        # As the network takes it, which is half as much to send; and a copy, which nobody changes later.
        evaluation = super().evaluate(as_array(x).astype("float32"))
        if isinstance(x, np.ndarray):
            return evaluation
        gradient = import_keras().ops.convert_to_tensor(evaluation.gradient, "float32")
        return dataclasses.replace(evaluation, gradient=gradient)

    def for_each(self, tiles: list[deepstyle.Tile], compute: Callable, *given: Any) -> Iterator[Any]:
        import ray

        of_tile, (x, *rest) = compute.__self__, given  # type: ignore[attr-defined]
        sent = self.send("of_tile", of_tile), self.send("x", x), *map(ray.put, rest)
        return self.workers.map(tiles, compute.__name__, *sent)

    def send(self, name: str, value: Any) -> Any:
        """Ray's reference to a value, which is sent anew only if it is another object than the last by this name."""
        import ray

        if name not in self.sent or self.sent[name][0] is not value:
            self.sent.pop(name, None)  # what nobody refers to leaves Ray's store
            self.sent[name] = value, ray.put(value)
        return self.sent[name][1]


def on_cluster() -> bool:
    return bool(os.environ.get("RAY_ADDRESS"))


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
        raise UserError(f"--workers is {workers}; there are {room(1)} {'GPUs' if on_gpus else 'CPU cores'} for them")
    most = max(int(machine.get("CPU", 0)) for machine in machines)
    return next(threads for threads in range(most, 0, -1) if room(threads) >= workers)


def environment(threads: int) -> dict[str, Any]:
    """What Ray is to start a worker's process in, on any machine: with these modules, this backend and its threads."""
    own = [os.environ.get("PYTHONPATH")]  # an empty part would stand for the folder that the worker is in
    names = "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS", "NPROC"  # NPROC is JAX's
    variables = {
        "PYTHONPATH": os.pathsep.join([str(FOLDER), str(FOLDER / "examples"), *filter(None, own)]),
        "KERAS_BACKEND": backend(),
        **dict.fromkeys(names, str(threads)),
    }
    # Ray puts the interpreter into a shell's command as it is, so its path is to be without what a shell knows.
    interpreter = {} if on_cluster() else {"py_executable": shlex.quote(sys.executable)}
    return {"env_vars": variables, **interpreter}


def plan_for(
    workers: int, size: tuple[int, int], settings: deepstyle.Settings, held: Held, found: tuple[float, float] | None
) -> Plan:
    """deepstyle's plan for so many workers, with tiles that keep all of them busy.

    What each machine of a cluster has is not known before Ray is: the plan is for one worker beside this process.
    """
    here = 1 if on_cluster() else workers
    plan = plan_memory(size, settings, held, found, here)
    tile = shared_tile(size, plan.tile, workers, settings.model, kept=settings.tile != "auto")
    return plan_memory(size, dataclasses.replace(settings, tile=str(tile)), held, found, here)


def run(arguments: argparse.Namespace, settings: deepstyle.Settings) -> deepstyle.Ending:
    """deepstyle's run, with workers. Raises UserError for what is wrong with them before anything is begun."""
    number = arguments.workers
    if number < 1:
        raise UserError(f"--workers is {number}; it must be 1 or more")
    if not on_cluster() and number > usable_cores():
        raise UserError(f"--workers is {number}; this machine has {usable_cores()} CPU cores for them")
    if settings.tile == "off" and number > 1:
        raise UserError(f"--tile is off; {number} workers need tiles to share")
    if not importlib.util.find_spec("ray"):
        raise UserError(f"this needs the package ray; '{sys.executable} -m pip install ray' brings it")
    if os.path.isdir(arguments.content):
        raise UserError(f"'{arguments.content}' is a folder; name one photo, or paint the folder with deepstyle.py")
    workers = Workers(number)
    computing = deepstyle.Computing(
        plan=functools.partial(plan_for, number),
        device=workers.begin,
        make=functools.partial(SharedObjective, workers),
        program=("examples/large_picture.py", "--workers", str(number)),
        end=workers.end,
        repeatable=lambda: not workers.on_gpus and not on_cluster(),
    )
    return deepstyle.run(arguments, settings, computing=computing)


def main(argv: list[str] | None = None) -> int:
    parser = deepstyle.command_line()
    parser.prog = "large_picture.py"
    parser.description = "deepstyle.py with the picture's tiles shared out among workers, by Ray."
    parser.add_argument(
        "--workers",
        metavar="N",
        type=functools.partial(deepstyle.value_of, int),
        default=2,
        help="how many compute tiles, each with a GPU or its share of the cores (2)",
    )
    return deepstyle.main(argv, parser, run)


if __name__ == "__main__":
    leave(main())
