"""All that has to be checked on a GPU, in one command of under eight minutes: results, times and memory.

usage: python benchmarks/on_gpu.py [--rows 400 1024 2048] [--tile 512] [--minutes 7.5] [--backends tensorflow jax torch]
       [--weights random] [--json on_gpu.json]

For each of TensorFlow, JAX and PyTorch that is installed, each measurement in a process of its own:

- exact: the error of the loss and of the gradient's slope in three directions against the tests' float64 NumPy oracle,
  in full float32 as deepstyle computes and with TF32, and how far the two gradients differ;
- rounded, with rows: how much of an evaluation's seconds it takes with TF32, and with --precision mixed, and how far
  the gradients are off;
- size, with rows, tile (0: as a whole) and optimiser: seconds of an evaluation, the optimiser's share of them, and the
  peak of memory on the GPU and here, beside what is planned; at the first size also of two runs that share the GPU.

When the time is nearly over, what is left is left out, and named. It runs without a GPU too, as a check of itself:
--rows 64 96 --tile 80. The weights are random unless a file is given, since they do not change the times.
"""

import argparse
import importlib.util
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(FOLDER / "tests"))
import oracle  # noqa: E402, it is not installed but lies in tests/

import deepstyle  # noqa: E402
from deepstyle_support.backend import as_array, import_keras  # noqa: E402
from deepstyle_support.device import describe_device, gpu_memory  # noqa: E402
from deepstyle_support.engine import Engine  # noqa: E402
from deepstyle_support.images import resize, to_input_space  # noqa: E402
from deepstyle_support.memory import Plan, needed_memory  # noqa: E402
from deepstyle_support.weights import Weights, load_weights  # noqa: E402

EVALUATIONS = 12  # the first of them compile


def pictures(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Content and style, with four columns to three rows."""
    content, style = (
        deepstyle.read_picture(str(FOLDER / "images" / name))[0] for name in ("rocket.jpg", "composition_viii.jpg")
    )
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


def rounded(weights: Weights, rows: int) -> dict[str, Any]:
    """Of an evaluation of the whole picture, in full, mixed and with TF32: seconds, and the gradient's error."""
    content, style = pictures(rows)
    x = import_keras().ops.convert_to_tensor(to_input_space(content))
    gradients = []

    def seconds(precision: str = "full") -> float:
        objective = deepstyle.Objective(content, style, weights=weights, precision=precision)
        took: list[float] = []
        evaluate = timed(objective.evaluate, took)
        for _ in range(EVALUATIONS):
            evaluation = evaluate(x)
        gradients.append(as_array(evaluation.gradient))
        return statistics.median(took[1:])

    found = {"seconds": seconds(), "seconds_mixed": seconds("mixed")}
    with_tf32()
    found["seconds_tf32"] = seconds()
    for name, gradient in zip(("mixed", "tf32"), gradients[1:], strict=True):
        found[f"gradient_error_{name}"] = float(np.linalg.norm(gradient - gradients[0]) / np.linalg.norm(gradients[0]))
    return found


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

    def run(self, backend: str, *asked: Any, at_once: int = 1) -> list[dict[str, Any]]:
        """What each of so many processes says, none if there was no time, or an error's last line."""
        name = " ".join(map(str, (backend, *asked)))
        left = self.end - time.monotonic()
        if left < 15:
            self.left_out.append(name)
            return []
        command = [sys.executable, __file__, "--weights", self.weights, "--one", *map(str, asked)]
        environment = os.environ | {"KERAS_BACKEND": backend}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started = [subprocess.Popen(command, env=environment, **pipes) for _ in range(at_once)]
        found = []
        for process in started:
            try:
                said, errors = process.communicate(timeout=max(1.0, self.end - time.monotonic()))
                lines = errors.splitlines() or [f"ended with status {process.returncode}"]
                found.append(json.loads(said.splitlines()[-1]) if not process.returncode else {"error": lines[-1]})
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                self.left_out.append(f"{name} (stopped)")
        for row in found:
            self.rows.append({"backend": backend, "asked": [*asked], "at_once": at_once, **row})
            show(self.rows[-1])
        return found


def show(row: dict[str, Any]) -> None:
    """A line of the table."""
    what = f"{row['backend']:10} {' '.join(map(str, row['asked'])):22}"
    if "error" in row:
        said = f"FAILED: {row['error']}"
    elif row["asked"][0] == "exact":
        (loss, slope), (loss_tf32, slope_tf32) = row["errors"], row["errors_tf32"]
        said = (
            f"{row['device']}: errors of the loss {loss:.1e}, of slopes {slope:.1e}; with TF32 {loss_tf32:.1e}, "
            f"{slope_tf32:.1e}, and the gradient differs by {row['gradient_difference_tf32']:.1e}"
        )
    elif row["asked"][0] == "rounded":
        said = f"{row['seconds']:.4f} s an evaluation in full"
        for name in ("mixed", "tf32"):
            share, error = row[f"seconds_{name}"] / row["seconds"], row[f"gradient_error_{name}"]
            said += f"; {name} {share:.2f} of it, gradient off by {error:.1e}"
    else:
        share = f", optimiser {row['optimiser_share']:.0%}"
        gigabytes = {name: row[name] / 1e9 for name in ("gpu_peak", "gpu_planned", "gpu_free", "peak", "planned")}
        said = (
            f"{row['seconds']:.4f} s an evaluation{share}, the first after {row['until_first']:.1f} s; "
            "GB at the peak (planned): GPU {gpu_peak:.2f} ({gpu_planned:.2f}) of {gpu_free:.1f}, "
            "here {peak:.2f} ({planned:.2f})".format(**gigabytes)
        )
        said += "; two at once" * (row["at_once"] > 1) + "; RAN OUT, in smaller tiles" * bool(row["smaller_tiles"])
    print(f"{what} {said}", flush=True)


def measure(asked: list[str], weights: str) -> dict[str, Any]:
    """What one process does."""
    tensors, source = load_weights(weights)
    kind, *given = asked
    if kind == "exact":
        found = exact(tensors)
    elif kind == "rounded":
        found = rounded(tensors, int(given[0]))
    else:
        found = size(tensors, int(given[0]), int(given[1]), given[2])
    return found | {"weights": source}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[400, 1024, 2048])
    parser.add_argument("--tile", type=int, default=512)
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--backends", nargs="+", default=["tensorflow", "jax", "torch"])
    parser.add_argument("--weights", default="random")
    parser.add_argument("--json", default="on_gpu.json")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.weights)))
        return 0
    jobs = Jobs(arguments.minutes, arguments.weights)
    there = [backend for backend in arguments.backends if importlib.util.find_spec(backend)]
    # What matters most comes first, of each backend: the time may not last for all.
    for backend in there:
        jobs.run(backend, "exact")
    for rows in arguments.rows:
        tiles = [0, arguments.tile] if arguments.tile < rows * 4 // 3 else [0]
        for backend, tile, optimiser in itertools.product(there, tiles, ("scipy", "device")):
            jobs.run(backend, "size", rows, tile, optimiser)
        for backend in there:
            jobs.run(backend, "rounded", rows)
        if rows == arguments.rows[0]:
            for backend in there:
                jobs.run(backend, "size", rows, 0, "scipy", at_once=2)
    absent = [backend for backend in arguments.backends if backend not in there]
    found = {"rows": jobs.rows, "left_out": jobs.left_out, "not_installed": absent}
    Path(arguments.json).write_text(json.dumps(found, indent=1))
    for name, what in (("not installed", absent), ("left out for lack of time", jobs.left_out)):
        if what:
            print(f"{name}: {', '.join(what)}")
    return 1 if any("error" in row for row in jobs.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
