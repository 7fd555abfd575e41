"""Worker processes, on this machine, its GPUs, or a Ray cluster: they are started, given work, and replaced.

On a machine with GPUs each worker has one of its own, else they share the cores. On a cluster, which RAY_ADDRESS names,
the program must be at the same place on each of its machines.
"""

import contextlib
import functools
import importlib.util
import os
import re
import shlex
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from deepstyle_support.backend import backend_name
from deepstyle_support.limits import usable_cores
from deepstyle_support.messages import UserError, counted, silenced_stderr

from . import FOLDER
from .terminal import signals_kept_from_children

MAX_DEATHS = 3  # of workers one after another, for each that there is to be, without any work that is done in between
PATIENCE = 300  # seconds to wait for a worker if there is no other; to load a backend takes 5 to 60
ANSWER = 10  # seconds in which somebody is to answer where a cluster is said to be
# Ray reads this when it is imported. By itself it asks 20 times, and if nobody answers each takes 40 seconds.
IMPATIENT = {"RAY_NUM_REDIS_GET_RETRIES": "1", "RAY_py_gcs_connect_timeout_s": "15"}
LOOK = 5  # seconds between two looks at whether workers' processes are there; three times none means that they die


class Done(NamedTuple):
    """A piece of work that has come back."""

    key: Any  # as it was submitted
    result: Any  # or the exception that it raised
    died: bool = False  # its worker has, and it is not done


class Crew:
    """So many workers, each in a process of its own: whoever is free takes the next piece of work.

    `begin` starts Ray, and `employ` the workers, once; both raise UserError, status 1, if they cannot.
    """

    def __init__(self, number: int):
        self.number, self.deaths = number, 0
        self.began, self.threads, self.on_gpus = False, 1, False
        self.logs: Path | None = None  # Ray's own, on this machine
        self.start: Callable[[], Any] | None = None
        self.free: list[Any] = []
        self.busy: dict[Any, tuple[Any, Any]] = {}  # each at work, and the work's key; None: it is starting
        self.last_sign = self.last_look = time.monotonic()
        self.unseen = 0  # looks in a row that have found no worker's process

    def begin(self) -> str:
        """Start Ray, or join the cluster that RAY_ADDRESS names; what each worker has of it, in words."""
        if on_cluster():
            os.environ.update(IMPATIENT | os.environ)
        import ray

        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if not on_cluster():  # "local", since Ray would else join one that happens to run on this machine
            options |= {"address": "local", "num_cpus": usable_cores(), "include_dashboard": False}
        self.began, on_sigterm = True, signal.getsignal(signal.SIGTERM)
        try:
            with silenced_stderr():  # Ray speaks of it if it finds several
                check_that_cluster_answers()
            with signals_kept_from_children(), silenced_stderr():  # where its C++ code writes as it likes
                context: Any = ray.init(**options)
                silence_ray()
                # Ray's own handler aborts the process, with pages of addresses; a stop that has come waits until here.
                signal.signal(signal.SIGTERM, on_sigterm)
            self.logs = None if on_cluster() else Path(context.address_info["session_dir"], "logs")
        except Exception as error:  # Ray raises anything here
            raise UserError(f"Ray cannot start: {why_not(error)}", status=1) from error
        machines = [machine["Resources"] for machine in ray.nodes() if machine["Alive"]]
        self.on_gpus = any(machine.get("GPU") for machine in machines)
        self.threads = threads_each(self.number, machines)
        if self.on_gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # they are the workers': this process computes nothing
        each = "a GPU" if self.on_gpus else counted(self.threads, "CPU core")
        where = counted(len(machines), "machine") if on_cluster() else "this machine"
        return f"{counted(self.number, 'worker')} with {each} each of {where}, with {backend_name()}"

    def employ(self, kind: type, *given: Any, calls_at_once: int = 1) -> None:
        """Start all workers, kind(*given) in a process each, unless that was done; each is free when it is ready."""
        import ray

        if not self.start:
            resources = {"num_cpus": self.threads, "num_gpus": int(self.on_gpus), "max_concurrency": calls_at_once}
            remote: Any = ray.remote(kind)
            remote = remote.options(**resources, runtime_env=environment(self.threads))
            self.start = functools.partial(remote.remote, *given)
            for _ in range(self.number):
                self.add()

    def add(self) -> None:
        assert self.start
        worker = self.start()
        self.busy[worker.__ray_ready__.remote()] = worker, None

    def submit(self, key: Any, method: str, *given: Any) -> None:
        """Let a worker that is free call its method."""
        worker = self.free.pop()
        self.busy[getattr(worker, method).remote(*given)] = worker, key

    def is_working(self) -> bool:
        """Whether there is work that has not come back."""
        return any(key is not None for _, key in self.busy.values())

    def call_all(self, method: str, *given: Any) -> None:
        """Let all workers that are at work call a method besides; nobody waits for it."""
        for worker, key in self.busy.values():
            if key is not None:
                getattr(worker, method).remote(*given)

    def next_done(self, seconds: float | None = None) -> Done | None:
        """The next work that comes back. None after so many seconds, or when a worker has got ready, or was replaced.

        Raises UserError if there is nobody who works, nor comes to, or if all die.
        """
        import ray

        done = self._first_done(seconds)
        if done is None:
            return None
        worker, key = self.busy.pop(done)
        try:
            result = ray.get(done)
        except ray.exceptions.RayTaskError as error:  # the worker lives, but this cannot be done
            result = error.cause
        except ray.exceptions.RayError as error:
            self.deaths += 1
            if self.deaths > MAX_DEATHS * self.number:
                last = (str(error).strip() or type(error).__name__).splitlines()[-1]
                raise UserError(f"no worker is left: {self.deaths} died one after another; {last}", status=1) from error
            self.add()
            return None if key is None else Done(key, None, died=True)
        self.free.append(worker)
        if key is None:
            return None
        self.deaths = 0
        return Done(key, result)

    def _first_done(self, seconds: float | None) -> Any:
        """Ray's reference to the next that is done, or that fails; None after so many seconds."""
        import ray

        while True:
            step = None if self.is_working() else LOOK
            done, _ = ray.wait(list(self.busy), num_returns=1, timeout=step if seconds is None else seconds)
            if done:
                self.last_sign, self.unseen = time.monotonic(), 0
                return done[0]
            if not self.is_working():
                self._require_sign()
            if seconds is not None:
                return None

    def _require_sign(self) -> None:
        """Raise UserError if no worker is there, nor comes to be."""
        now = time.monotonic()
        if now - self.last_look < LOOK:
            return
        self.last_look = now
        self.unseen = 0 if on_cluster() or worker_processes() else self.unseen + 1
        if self.unseen == 3:
            raise UserError(f"the workers' processes end as soon as they start: {self.last_words()}", status=1)
        if now - self.last_sign > PATIENCE:
            raise UserError(f"no worker is ready after {PATIENCE} seconds; is there room for one?", status=1)

    def last_words(self) -> str:
        """What a process that Ray started has said last, and where Ray says more."""
        said = (self.logs / "raylet.err").read_text(errors="replace").split("\n") if self.logs else []
        return f"{next(filter(str.strip, reversed(said)), 'without a word')}; Ray's logs are in {self.logs}"

    def end(self) -> None:
        """Let go of the workers, and of Ray, if it was begun: nothing that it started on this machine is left."""
        if self.began:
            import ray

            started = [] if on_cluster() else raylets_and_theirs()
            kill_at_shutdown()
            ray.shutdown()
            kill_left(started)


def kill_at_shutdown() -> None:
    """Keep Ray from asking its five processes to end, and from waiting a second for each: no such signal reaches them.

    It has no setting for that; another version of it may have the function elsewhere.
    """
    with contextlib.suppress(ImportError, AttributeError):
        from ray._private import worker

        node: Any = worker._global_node
        kill = node.kill_all_processes
        node.kill_all_processes = lambda **options: kill(**options | {"allow_graceful": False})


def raylets_and_theirs() -> list[psutil.Process]:
    """Those processes of Ray's that start workers, and what they have started."""
    found = []
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # it has ended
            if process.name() == "raylet":
                found += [process, *process.children(recursive=True)]
    return found


def kill_left(started: list[psutil.Process]) -> None:
    """End these, `raylets_and_theirs`, and the workers that have been started since.

    One that was only starting when Ray was shut down would look for it for a minute.
    """
    raylets = {str(process.pid) for process in started}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it has ended, or is somebody else's
            if process in started or process.environ().get("RAY_RAYLET_PID") in raylets:
                process.kill()


def worker_processes() -> list[psutil.Process]:
    """Those that Ray runs for us on this machine, less what it keeps for itself and those that wait for work."""
    found = []
    for process in raylets_and_theirs():
        with contextlib.suppress(psutil.Error):  # it has ended
            idle = process.name().startswith(("ray::IDLE", "ray::DashboardA", "ray::RuntimeEnv"))
            if process.parent().name() == "raylet" and not idle:
                found.append(process)
    return found


def on_cluster() -> bool:
    return os.environ.get("RAY_ADDRESS", "") not in ("", "local")


def why_not(error: BaseException) -> str:
    """What Ray says, in a line, with the first sentence of what it was caused by: a traceback, as a text."""
    said = [" ".join(str(error).split()) or type(error).__name__]
    if cause := str(error.__cause__ or "").strip():
        said.append(cause.splitlines()[-1].partition(". ")[0])
    return "; ".join(said)


def silence_ray() -> None:
    """Keep Ray from saying, in a paragraph and from a thread of its own, that a worker has died: we say it in a line.

    It has no setting for that; another version of it may have the function elsewhere.
    """
    with contextlib.suppress(ImportError):
        from ray._private import worker

        worker.print_to_stdstream = lambda *given, **options: None


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
        "KERAS_BACKEND": backend_name(),
        **dict.fromkeys(names, str(threads)),
    }
    # Ray puts the interpreter into a shell's command as it is, so its path is to be without what a shell knows.
    interpreter = {} if on_cluster() else {"py_executable": shlex.quote(sys.executable)}
    return {"env_vars": variables, **interpreter}


def crew_for(number: int) -> Crew:
    """So many workers. Raises UserError for what is wrong with that; nothing is begun."""
    if number < 1:
        raise UserError(f"--workers is {number}; it must be 1 or more")
    if not on_cluster() and number > usable_cores():
        raise UserError(f"--workers is {number}; this machine has {usable_cores()} CPU cores for them")
    if not importlib.util.find_spec("ray"):
        raise UserError(f"--workers needs the package ray; '{sys.executable} -m pip install ray' brings it")
    return Crew(number)
