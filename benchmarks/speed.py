"""How fast an evaluation is on this machine, in a table and as JSON. Needs the trained weights.

usage: python benchmarks/speed.py [--rows 256 400 512 800 1024] [--tile 512] [--evaluations 5] [--json FILE]

Each row of the table is a process of its own, so that its peak memory is its own. Seconds are the median of the
evaluations that L-BFGS asks for, after a first one that compiles. GFLOP/s count the convolutions' multiplications and
additions, forward and backward, of the picture itself: what tiles compute twice does not count. The share is that rate
over the machine's own float32 matrix product. "outside" is the share of the time that is not spent in the network and
losses: SciPy, and the copies of the picture and the gradient. "vectors" is what L-BFGS itself takes for one iteration
with ten corrections at hand, in seconds, SciPy's and the device's.
"""

import argparse
import contextlib
import itertools
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(FOLDER))
import deepstyle  # noqa: E402, it is not installed but lies above
from deepstyle_support.backend import import_keras  # noqa: E402
from deepstyle_support.images import resize, to_input_space  # noqa: E402
from deepstyle_support.memory import needed_memory  # noqa: E402
from deepstyle_support.settings import OPTIMIZERS  # noqa: E402
from deepstyle_support.vgg import CHANNELS, stride  # noqa: E402


def gigaflop(size: tuple[int, int]) -> float:
    """Of all convolutions up to conv5_2, forward and backward."""
    total, inputs = 0, 3
    for name, outputs in CHANNELS["vgg16"].items():
        if name <= "conv5_2":
            positions = (size[0] // stride(name)) * (size[1] // stride(name))
            total += 2 * 2 * 9 * inputs * outputs * positions
            inputs = outputs
    return total / 1e9


def matrix_product() -> float:
    """GFLOP/s of Keras's backend for float32 matrices, the best of several."""
    ops = import_keras().ops
    n, seconds = 3000, []
    a = ops.ones((n, n))
    for _ in range(8):
        began = time.perf_counter()
        ops.convert_to_numpy(ops.matmul(a, a)[:1, :1])
        seconds.append(time.perf_counter() - began)
    return 2 * n**3 / min(seconds) / 1e9


def objective_of(rows: int, tile: int | None):
    """The objective of two of the pictures that come with the program, with four columns to three rows."""
    size = (rows, rows * 4 // 3)
    pictures = (
        resize(deepstyle.read_picture(str(FOLDER / "images" / name))[0], size)
        for name in ("rocket.jpg", "composition_viii.jpg")
    )
    content, style = pictures
    return content, deepstyle.Objective(content, style, tile=tile or "off")


def measure(rows: int, tile: int | None, evaluations: int) -> dict:
    """One row of the table, in this process."""
    content, objective = objective_of(rows, tile)
    inside = 0.0

    def timed(function):
        def call(*arguments):
            nonlocal inside
            began = time.perf_counter()
            result = function(*arguments)
            inside += time.perf_counter() - began
            return result

        return call

    for name in ("parts_and_gradient", "grams"):
        setattr(deepstyle.TiledLoss, name, timed(getattr(deepstyle.TiledLoss, name)))
    ends, insides = [], []

    class Watch(deepstyle.Watch):
        def evaluated(self, size: tuple[int, int], count: int, evaluation: deepstyle.Evaluation) -> None:
            ends.append(time.perf_counter())
            insides.append(inside)

        def should_stop(self) -> bool:
            return len(ends) > evaluations

    start = deepstyle.State(to_input_space(content))
    # No more corrections than evaluations, so that all the memory that was estimated gets used.
    list(deepstyle.minimise(objective, start, history=evaluations, watch=Watch()))
    seconds = statistics.median(later - before for before, later in itertools.pairwise(ends))
    return {
        "rows": rows,
        "columns": content.shape[1],
        "tile": tile,
        "seconds": seconds,
        "gflops": gigaflop(content.shape[:2]) / seconds,
        "outside": 1 - (insides[-1] - insides[0]) / (ends[-1] - ends[0]),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "estimated_bytes": sum(needed_memory(content.shape[:2], tile, evaluations, deepstyle.Settings())),
    }


def vector_work(rows: int, optimizer: str, corrections: int = 10) -> float:
    """Seconds outside the evaluations for one iteration of L-BFGS: the median of ten, with all corrections at hand.

    The objective is a stand-in, half the sum of curvature times x squared, which takes more steps than these.
    """
    ops = import_keras().ops
    array, total = (np.asarray, np.sum) if optimizer == "scipy" else (ops.convert_to_tensor, ops.sum)
    shape = (rows, rows * 4 // 3, 3)
    curvature = array(np.logspace(-2, 2, math.prod(shape), dtype=np.float32).reshape(shape))
    began, outside = time.perf_counter(), [0.0]

    def evaluate(x) -> deepstyle.Evaluation:
        nonlocal began
        outside[-1] += time.perf_counter() - began
        gradient = curvature * x
        loss = float(total(gradient * x) / 2)
        evaluation = deepstyle.Evaluation(deepstyle.Losses(loss, 0, 0, loss), {"bowl": loss}, gradient)
        began = time.perf_counter()
        return evaluation

    points = deepstyle.ALGORITHMS[optimizer](evaluate, np.full(shape, 50.0), corrections)
    with contextlib.closing(points):
        for _ in itertools.islice(points, corrections + 12):
            outside.append(0.0)
    return statistics.median(outside[-11:-1])


def in_its_own_process(*arguments) -> Any:
    command = [sys.executable, __file__, "--one", *map(str, arguments)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 400, 512, 800, 1024])
    parser.add_argument("--tile", type=int, default=512)
    parser.add_argument("--evaluations", type=int, default=5)
    parser.add_argument("--json", default="speed.json")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one == ["product"]:
        return print(json.dumps({"gflops": matrix_product()}))
    if arguments.one and arguments.one[0] in OPTIMIZERS:
        return print(json.dumps(vector_work(int(arguments.one[1]), arguments.one[0])))
    if arguments.one:
        rows, tile, evaluations = map(int, arguments.one)
        return print(json.dumps(measure(rows, tile or None, evaluations)))
    product = in_its_own_process("product")["gflops"]
    print(f"this machine's float32 matrix product: {product:.0f} GFLOP/s\n")
    print("     size       tile   s/evaluation  GFLOP/s  share  outside  peak GB (estimated)  vectors")
    table = []
    for count in arguments.rows:
        vectors = {who: in_its_own_process(who, count) for who in OPTIMIZERS}
        for tile in (0, arguments.tile):
            if tile < count:
                row = in_its_own_process(count, tile, arguments.evaluations)
                row |= {"share": row["gflops"] / product, "vectors": vectors}
                table.append(row)
                print(
                    f"{row['rows']:5} x {row['columns']:<5} {row['tile'] or 'whole':>5} {row['seconds']:12.2f} "
                    f"{row['gflops']:9.0f} {row['share']:6.0%} {row['outside']:7.1%} {row['peak_bytes'] / 1e9:8.2f} "
                    f"({row['estimated_bytes'] / 1e9:.2f})      "
                    + " / ".join(f"{seconds:.3f}" for seconds in vectors.values()),
                    flush=True,
                )
    Path(arguments.json).write_text(json.dumps({"matrix_product_gflops": product, "rows": table}, indent=1))
    return None


if __name__ == "__main__":
    main()
