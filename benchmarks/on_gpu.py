"""All that has to be checked on a GPU, in one command of under eight minutes: results, times and memory.

usage: python benchmarks/on_gpu.py [--rows 400 1024 2048] [--tile 512] [--minutes 7.5] [--part 1|2]
       [--backends tensorflow jax torch] [--weights random] [--json on_gpu.json]

For each of TensorFlow, JAX and PyTorch that is installed, each measurement in a process of its own:

- exact: the error of the loss and of the gradient's slope in three directions against the tests' float64 NumPy oracle,
  in full float32 as deepstyle computes and with TF32, and how far the two gradients differ;
- plain, with rows and precision: the same picture by plain_pytorch.py, which is what a person would use instead, with
  PyTorch's own defaults (tf32) and in full: seconds of an evaluation, and from the command to the tenth picture;
- command, with rows, optimiser and precision: seconds from the command to the tenth picture of deepstyle itself;
- again, with the same, for JAX: the command twice, with a folder where JAX keeps what it has compiled and tried out;
- ways, with rows and the type of factors: each way to compute the convolutions that the backend leaves open, the
  program's own first, and PyTorch's also with cuDNN's search for the best algorithm; the fastest is named;
- rounded, with rows: how much of an evaluation's seconds it takes with TF32, and with --precision mixed, and how far
  the gradients are off;
- size, with rows, tile (0: as a whole) and optimiser: seconds of an evaluation, the optimiser's share of them, and the
  peak of memory on the GPU and here, beside what is planned; shared: the same of two runs at once.

When the time is nearly over, what is left is left out, and named. Part 1 is the first size, part 2 the others; each
fits five minutes. It runs without a GPU too, as a check of itself: --rows 64 96 --tile 80. The weights are random
unless a file is given, since they do not change the times.
"""

import argparse
import importlib.util
import itertools
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(FOLDER / "tests"))
import oracle  # noqa: E402, it is not installed but lies in tests/

import deepstyle  # noqa: E402
from deepstyle_support import convolution  # noqa: E402
from deepstyle_support.backend import as_array, import_keras  # noqa: E402
from deepstyle_support.convolution import FULL, Way, way_of  # noqa: E402
from deepstyle_support.device import describe_device, gpu_memory  # noqa: E402
from deepstyle_support.engine import Engine  # noqa: E402
from deepstyle_support.images import resize, to_input_space  # noqa: E402
from deepstyle_support.memory import Plan, needed_memory  # noqa: E402
from deepstyle_support.weights import Weights, load_weights  # noqa: E402

EVALUATIONS = 12  # the first of them compile
PAIR = [str(FOLDER / "images" / name) for name in ("rocket.jpg", "composition_viii.jpg")]


def pictures(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Content and style, with four columns to three rows."""
    content, style = (deepstyle.read_picture(path)[0] for path in PAIR)
    return resize(content, (rows, rows * 4 // 3)), resize(style, (rows, rows * 4 // 3))


def with_tf32() -> None:
    """Let the backend round to TF32, which deepstyle forbids, in all that is compiled from now on."""
    deepstyle.compiled.cache_clear()
    backend = import_keras().backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.enable_tensor_float_32_execution(True)
    elif backend == "jax":
        import jax

        jax.config.update("jax_default_matmul_precision", "tensorfloat32")
    else:
        import torch

        if hasattr(torch.backends, "fp32_precision"):
            torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "tf32"
        else:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True


def exact(weights: Weights) -> dict[str, Any]:
    """Relative errors at 32 rows, as deepstyle computes and with TF32: of the loss, and of the gradient's slopes."""
    content, style = pictures(32)
    x = to_input_space(content) + np.random.default_rng(3).normal(0, 20, content.shape)
    targets, settings = oracle.targets(content, style, weights, "ave"), deepstyle.Settings()
    factors = settings.content_weight, settings.style_weight[0], settings.total_variation_weight

    def loss_at(x: np.ndarray) -> float:
        return float(np.dot(factors, oracle.losses(x, targets, weights)))

    def errors(loss: float, gradient: np.ndarray) -> tuple[float, float]:
        """Of the loss, over it, and the largest of the slopes in three directions, over the gradient's length."""
        directions = [gradient, *(np.random.default_rng(seed).normal(0, 1, x.shape) for seed in (4, 5))]
        found, step, length = [], 1e-3, np.linalg.norm(gradient)
        for direction in (direction / np.linalg.norm(direction) for direction in directions):
            slope = (loss_at(x + step * direction) - loss_at(x - step * direction)) / (2 * step)
            found.append(abs(np.vdot(gradient, direction) - slope) / length)
        return abs(loss / loss_at(x) - 1), max(found)

    in_full = deepstyle.Objective(content, style, weights=weights)(x)
    device = describe_device()
    with_tf32()
    in_tf32 = deepstyle.Objective(content, style, weights=weights)(x)
    difference = np.linalg.norm(in_tf32[1] - in_full[1]) / np.linalg.norm(in_full[1])
    full, tf32 = errors(*in_full), errors(*in_tf32)
    return {"device": device, "errors": full, "errors_tf32": tf32, "gradient_difference_tf32": float(difference)}


class Evaluations:
    """Some evaluations of a whole picture at one x: their seconds, and the gradient there."""

    def __init__(self, weights: Weights, rows: int, precision: str = "full"):
        content, style = pictures(rows)
        x = import_keras().ops.convert_to_tensor(to_input_space(content))
        objective = deepstyle.Objective(content, style, weights=weights, precision=precision)
        took: list[float] = []
        evaluate = timed(objective.evaluate, took)
        for _ in range(EVALUATIONS):
            evaluation = evaluate(x)
        self.gradient = as_array(evaluation.gradient)
        self.seconds, self.until_second = statistics.median(took[1:]), sum(took[:2])

    def error(self, exact: "Evaluations") -> float:
        """The gradient's, relative to that of another one."""
        return float(np.linalg.norm(self.gradient - exact.gradient) / np.linalg.norm(exact.gradient))


def rounded(weights: Weights, rows: int) -> dict[str, Any]:
    """Of an evaluation of the whole picture, in full, mixed and with TF32: seconds, and the gradient's error."""
    full, mixed = (Evaluations(weights, rows, precision) for precision in ("full", "mixed"))
    with_tf32()
    found = {"seconds": full.seconds}
    for name, one in (("mixed", mixed), ("tf32", Evaluations(weights, rows))):
        found |= {f"seconds_{name}": one.seconds, f"gradient_error_{name}": one.error(full)}
    return found


def ways_of_backend(factors: str) -> list[tuple[Way, bool]]:
    """The ways that the backend leaves open, each with whether cuDNN searches; those that are the program's first."""
    own, open_to_torch = way_of(factors), (False, True) if import_keras().backend.backend() == "torch" else (False,)
    choices = itertools.product((False, True), open_to_torch, open_to_torch)
    found = [(Way(transposed, channels_last), search) for transposed, channels_last, search in choices]
    return sorted(found, key=lambda one: one[0] != own)


def always(way: Way) -> Callable:
    """`way_of` for which there is one way."""
    return lambda factors: way


def ways(weights: Weights, rows: int, factors: str) -> dict[str, Any]:
    """Seconds of an evaluation, and until the second, for each way; and how far its gradient is from the program's."""
    found, first = [], None
    Engine.fastest_factors = lambda self: factors  # a device without such units is measured as well
    for way, search in ways_of_backend(factors):
        deepstyle.compiled.cache_clear()
        convolution.way_of = always(way)
        if import_keras().backend.backend() == "torch":
            import torch

            torch.backends.cudnn.benchmark = search
        one = Evaluations(weights, rows, "full" if factors == FULL else "mixed")
        first = first or one
        name = ", ".join(name for name, is_so in (*way._asdict().items(), ("search", search)) if is_so) or "forward"
        found.append(
            {"way": name, "seconds": one.seconds, "until_second": one.until_second, "difference": one.error(first)}
        )
    return {"ways": found}


def until_tenth(script: str, *flags: str, **variables: str) -> dict[str, Any]:
    """Seconds from a command to its end, when its tenth picture is there, and the JSON of its last line, if it is.

    variables: of its environment.
    """
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        line = [sys.executable, str(FOLDER / script), *PAIR, str(Path(folder, "a")), "--num_iter", "10", *flags]
        ended = subprocess.run(line, capture_output=True, text=True, env=os.environ | variables)
        took = time.perf_counter() - began
        if ended.returncode or not Path(folder, "a_at_iteration_10.png").exists():
            raise RuntimeError((ended.stderr.splitlines() or ["it made no tenth picture"])[-1])
    said = ended.stdout.splitlines()[-1:]
    return {"until_tenth": took} | (json.loads(said[0]) if said and said[0].startswith("{") else {})


def again(*flags: str) -> dict[str, Any]:
    """Seconds as in `until_tenth` when JAX has kept what the same command compiled before, and of the one before."""
    with tempfile.TemporaryDirectory() as kept:
        first, second = (until_tenth("deepstyle.py", *flags, JAX_COMPILATION_CACHE_DIR=kept) for _ in range(2))
        size = sum(path.stat().st_size for path in Path(kept).rglob("*") if path.is_file())
    return {"until_tenth": second["until_tenth"], "before": first["until_tenth"], "kept": size}


def peak_on_gpu() -> float:
    """Bytes that the backend's allocator had in use at most; 0 where it does not say."""
    backend = import_keras().backend.backend()
    try:
        if backend == "tensorflow":
            import tensorflow as tf

            return tf.config.experimental.get_memory_info("GPU:0")["peak"]
        if backend == "jax":
            import jax

            return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
        import torch

        return torch.cuda.max_memory_allocated(0) if torch.cuda.is_available() else 0
    except (ValueError, RuntimeError):  # there is no such device
        return 0


def timed(function: Callable, inside: list[float]) -> Callable:
    """The function, which puts the seconds of each call into the list."""

    def call(*given: Any) -> Any:
        began = time.perf_counter()
        result = function(*given)
        inside.append(time.perf_counter() - began)
        return result

    return call


def size(weights: Weights, rows: int, tile: int, optimiser: str) -> dict[str, Any]:
    """Seconds of an evaluation in a run, as a whole (tile 0) or in tiles, and what memory they took."""
    content, style = pictures(rows)
    settings = deepstyle.Settings(image_size=rows, num_iter=1, optimizer=optimiser)
    began, before = time.perf_counter(), gpu_memory()
    smaller: list[int] = []
    inside: list[float] = []
    ends: list[tuple[float, float]] = []
    # It ends by asking whether the gradient is finite, so when the device has computed it.
    deepstyle.Objective.evaluate = timed(deepstyle.Objective.evaluate, inside)

    class Watch(deepstyle.Watch):
        def evaluated(self, size: tuple[int, int], count: int, evaluation: deepstyle.Evaluation) -> None:
            ends.append((time.perf_counter(), sum(inside)))

        def should_stop(self) -> bool:
            return len(ends) >= EVALUATIONS

        def smaller_tiles(self, tile: int) -> None:
            smaller.append(tile)

    engine = Engine(Plan(tile or None, settings.history), weights, settings.padding)
    list(deepstyle.paint(deepstyle.Pictures(content, (style,)), settings, engine, watch=Watch()))
    whole, network = (
        [later[which] - earlier[which] for earlier, later in itertools.pairwise(ends)] for which in (0, 1)
    )
    needed = needed_memory(content.shape[:2], tile or None, settings.history, settings)
    here, on_gpu = needed.shared(bool(before.total), optimiser)
    return {
        "seconds": statistics.median(whole),
        "until_first": ends[0][0] - began,
        # By medians: in the first steps the optimiser's own parts are compiled.
        "optimiser_share": max(0.0, 1 - statistics.median(network) / statistics.median(whole)),
        "gpu_free": before.free,
        "gpu_peak": peak_on_gpu(),
        "gpu_planned": on_gpu,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "planned": here,
        "smaller_tiles": smaller,
    }


class Jobs:
    """The measurements, each in a process of its own, as long as the time lasts."""

    def __init__(self, minutes: float, weights: str):
        self.end, self.weights = time.monotonic() + 60 * minutes, weights
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[str] = []

    def run(self, backend: str, *asked: Any) -> None:
        """Note and show what a process says, or two at once that share the GPU, or an error's last line."""
        name = " ".join(map(str, (backend, *asked)))
        left = self.end - time.monotonic()
        if left < 15:
            self.left_out.append(name)
            return
        command = [sys.executable, __file__, "--weights", self.weights, "--one", *map(str, asked)]
        environment = os.environ | {"KERAS_BACKEND": backend}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        pipes["start_new_session"] = True  # so that what a process has started ends with it
        started = [subprocess.Popen(command, env=environment, **pipes) for _ in range(1 + (asked[0] == "shared"))]
        found = []
        for process in started:
            try:
                said, errors = process.communicate(timeout=max(1.0, self.end - time.monotonic()))
                lines = errors.splitlines() or [f"ended with status {process.returncode}"]
                found.append(json.loads(said.splitlines()[-1]) if not process.returncode else {"error": lines[-1]})
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                self.left_out.append(f"{name} (stopped)")
        for row in found:
            self.rows.append({"backend": backend, "asked": [*asked], **row})
            show(self.rows[-1])


def show(row: dict[str, Any]) -> None:
    """A line of the table."""
    said = f"FAILED: {row['error']}" if "error" in row else SHOWN[row["asked"][0]](row)
    print(f"{row['backend']:10} {' '.join(map(str, row['asked'])):28} {said}", flush=True)


def show_exact(row: dict[str, Any]) -> str:
    (loss, slope), (loss_tf32, slope_tf32) = row["errors"], row["errors_tf32"]
    return (
        f"{row['device']}: errors of the loss {loss:.1e}, of slopes {slope:.1e}; with TF32 {loss_tf32:.1e}, "
        f"{slope_tf32:.1e}, and the gradient differs by {row['gradient_difference_tf32']:.1e}"
    )


def show_until_tenth(row: dict[str, Any]) -> str:
    said = f"{row['until_tenth']:.1f} s from the command to the tenth picture"
    if "seconds" in row:
        said += (
            f"; {row['seconds']:.4f} s an evaluation, the first after {row['until_first']:.1f} s, "
            f"{row['gpu_peak'] / 1e9:.2f} GB on the GPU"
        )
    return said


def show_again(row: dict[str, Any]) -> str:
    return f"{show_until_tenth(row)}, {row['before']:.1f} s before; {row['kept'] / 1e6:.1f} MB are kept"


def show_ways(row: dict[str, Any]) -> str:
    ways, own = row["ways"], row["ways"][0]
    fastest = min(ways, key=lambda one: one["seconds"])
    lines = [
        f"{one['way']:36} {one['seconds']:.4f} s an evaluation ({one['seconds'] / own['seconds']:.2f}), the second "
        f"after {one['until_second']:.1f} s, gradient off by {one['difference']:.1e}"
        for one in ways
    ]
    return "\n    ".join([f"fastest: {fastest['way']}; the program's is the first of", *lines])


def show_rounded(row: dict[str, Any]) -> str:
    said = f"{row['seconds']:.4f} s an evaluation in full"
    for name in ("mixed", "tf32"):
        share, error = row[f"seconds_{name}"] / row["seconds"], row[f"gradient_error_{name}"]
        said += f"; {name} {share:.2f} of it, gradient off by {error:.1e}"
    return said


def show_size(row: dict[str, Any]) -> str:
    gigabytes = {name: row[name] / 1e9 for name in ("gpu_peak", "gpu_planned", "gpu_free", "peak", "planned")}
    said = (
        f"{row['seconds']:.4f} s an evaluation, optimiser {row['optimiser_share']:.0%}, the first after "
        f"{row['until_first']:.1f} s; "
        "GB at the peak (planned): GPU {gpu_peak:.2f} ({gpu_planned:.2f}) of {gpu_free:.1f}, "
        "here {peak:.2f} ({planned:.2f})".format(**gigabytes)
    )
    return said + "; RAN OUT, in smaller tiles" * bool(row["smaller_tiles"])


SHOWN: dict[str, Callable[[dict[str, Any]], str]] = {
    "exact": show_exact,
    "plain": show_until_tenth,
    "command": show_until_tenth,
    "again": show_again,
    "ways": show_ways,
    "rounded": show_rounded,
    "size": show_size,
    "shared": show_size,
}


def measure(asked: list[str], weights: str) -> dict[str, Any]:
    """What one process does."""
    kind, *given = asked
    if kind == "plain":
        rows, precision = given
        flags = ["--full"] if precision == "full" else []
        return until_tenth("benchmarks/plain_pytorch.py", "--rows", rows, "--weights", weights, *flags)
    if kind in ("command", "again"):
        rows, optimiser, precision = given
        flags = ["--optimizer", optimiser, "--precision", precision, "--image_size", rows, "--weights", weights]
        return until_tenth("deepstyle.py", *flags) if kind == "command" else again(*flags)
    tensors, source = load_weights(weights)
    if kind == "exact":
        found = exact(tensors)
    elif kind == "ways":
        found = ways(tensors, int(given[0]), given[1])
    elif kind == "rounded":
        found = rounded(tensors, int(given[0]))
    else:
        found = size(tensors, int(given[0]), int(given[1]), given[2])
    return found | {"weights": source}


def measurements(arguments: argparse.Namespace) -> Iterator[tuple[Any, ...]]:
    """(backend, what to measure, ...), what matters most first: the time may not last for all, least of all JAX's."""
    there = [name for name in ("tensorflow", "torch", "jax") if name in installed(arguments.backends)]
    first, *others = arguments.rows
    for backend in there if arguments.part != 2 else []:
        yield backend, "exact"
        if backend == "torch":
            yield from ((backend, "plain", first, precision) for precision in ("full", "tf32"))
        for given in (("device", "full"), ("device", "mixed"), ("scipy", "full")):
            yield backend, "command", first, *given
        if backend == "jax":
            yield backend, "again", first, "device", "full"
        yield from sizes(backend, first, arguments.tile)
        yield from ((backend, "ways", first, factors) for factors in (FULL, "bfloat16") if backend != "jax")
        yield backend, "shared", first, 0, "scipy"
    for rows, backend in itertools.product(others if arguments.part != 1 else [], there):
        yield from sizes(backend, rows, arguments.tile)


def sizes(backend: str, rows: int, tile: int) -> Iterator[tuple[Any, ...]]:
    """What is measured at each size of picture."""
    for pixels, optimiser in itertools.product([0, tile] if tile < rows * 4 // 3 else [0], ("device", "scipy")):
        yield backend, "size", rows, pixels, optimiser
    yield backend, "rounded", rows


def installed(backends: list[str]) -> list[str]:
    return [backend for backend in backends if importlib.util.find_spec(backend)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[400, 1024, 2048])
    parser.add_argument("--tile", type=int, default=512)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--part", type=int, choices=(1, 2))
    parser.add_argument("--backends", nargs="+", default=["tensorflow", "jax", "torch"])
    parser.add_argument("--weights", default="random")
    parser.add_argument("--json", default="on_gpu.json")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.weights)))
        return 0
    if arguments.part == 2 and len(arguments.rows) == 1:
        parser.error("part 2 measures the sizes after the first; give more --rows")
    minutes = (4.8 if arguments.part else 7.5) if arguments.minutes is None else arguments.minutes
    jobs = Jobs(minutes, arguments.weights)
    for backend, *asked in measurements(arguments):
        jobs.run(backend, *asked)
    absent = sorted({*arguments.backends} - {*installed(arguments.backends)})
    found = {"rows": jobs.rows, "left_out": jobs.left_out, "not_installed": absent}
    Path(arguments.json).write_text(json.dumps(found, indent=1))
    for name, what in (("not installed", absent), ("left out for lack of time", jobs.left_out)):
        if what:
            print(f"{name}: {', '.join(what)}")
    return 1 if any("error" in row for row in jobs.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
