"""This program against the old way and against PyTorch: time to the same loss, as ratios, and a plot.

usage: python benchmarks/race.py [CONTENT STYLE] [--rows 200] [--num_iter 10] [--only NAME ...] [--until_plain]
                                 [--json FILE] [--plot FILE.png] [--pictures FOLDER]

All contestants run one after another on the same pictures, weights and loss, each in a process of its own:

- deepstyle: this program, with no flags but those that are named
- the old way: content, style and generated picture in one batch of three in every evaluation, and L-BFGS started anew
  after every 20 evaluations, as the scripts do that this program replaces; in TensorFlow, compiled
- PyTorch L-BFGS, PyTorch Adam: the same loss written plainly, minimised by torch.optim's, if torch is installed; Adam
  with the best of steps of 1, 3 and 10 grey levels

With --until_plain ours end as soon as they have the loss of the first, the plain one; with --only some take part, by
the names above or as `deepstyle` with flags. The clock starts when a contestant has its libraries and weights, and runs
through its targets and compilation. A loss counts if it is that of the picture at full size; with --precision mixed it
is off by some thousandths until the last part of a run. The plot needs matplotlib.
With --pictures ours leave the picture that they ended with.
"""

import argparse
import functools
import importlib.util
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import deepstyle
from deepstyle_support.backend import import_keras
from deepstyle_support.engine import Engine
from deepstyle_support.images import resize, to_input_space
from deepstyle_support.settings import STYLE_LAYERS

FOLDER = Path(__file__).resolve().parent.parent

CONTENT, STYLE, VARIATION = 0.025, 1.0 / 5, 1e-5  # the program's default weights


def resized(paths: list[str], rows: int) -> list[np.ndarray]:
    """The content and the style, (H, W, 3) uint8 RGB, as the network is shown them."""
    content, style = (deepstyle.read_picture(path)[0] for path in paths)
    (size,) = deepstyle.picture_sizes(content.shape, deepstyle.Settings(image_size=rows))
    return [resize(content, size), resize(style, size)]


class Course:
    """(seconds, loss) of each evaluation at full size since it was made."""

    def __init__(self):
        self.began, self.points = time.perf_counter(), []

    def add(self, loss: float) -> None:
        self.points.append((time.perf_counter() - self.began, float(loss)))


def run_deepstyle(
    paths: list[str], rows: int, num_iter: int, goal: float = -math.inf, saved: Path | None = None, **flags: Any
) -> list:
    """The course until its loss is at most `goal`; the last picture is saved, if there is a file to save it in."""
    settings = deepstyle.Settings(image_size=rows, num_iter=num_iter, tile="off", **flags)
    content, style = (deepstyle.read_picture(path)[0] for path in paths)
    weights, _ = deepstyle.load_weights()
    import_keras()
    full_size = deepstyle.picture_sizes(content.shape, settings)[-1]
    course = Course()

    class Watch(deepstyle.Watch):
        def evaluated(self, size: tuple[int, int], count: int, evaluation: deepstyle.Evaluation) -> None:
            if size == full_size:
                course.add(evaluation.loss)

        def should_stop(self) -> bool:
            return bool(course.points) and course.points[-1][1] <= goal

    pictures = deepstyle.Pictures(content, (style,))
    engine = Engine(deepstyle.planned(pictures, settings), weights, settings.padding)
    for iteration in deepstyle.paint(pictures, settings, engine, watch=Watch()):
        if saved:
            Image.fromarray(iteration.picture).save(saved)
    return course.points


def run_old_way(paths: list[str], rows: int, num_iter: int) -> list:
    import_keras()  # which tells TensorFlow to use oneDNN
    import tensorflow as tf
    from scipy import optimize

    content, style = (to_input_space(picture) for picture in resized(paths, rows))
    weights = {name: (tf.constant(k), tf.constant(b)) for name, (k, b) in deepstyle.load_weights()[0].items()}
    size = content.shape[0] * content.shape[1]
    course = Course()

    def batch_features(batch) -> dict:
        found = {}
        for name, (kernel, bias) in weights.items():
            if name.endswith("_1") and name != "conv1_1":
                batch = tf.nn.avg_pool2d(batch, 2, 2, "VALID")
            batch = tf.nn.relu(tf.nn.bias_add(tf.nn.conv2d(batch, kernel, 1, "SAME"), bias))
            found[name] = batch
        return found

    def gram(f):
        flat = tf.reshape(f, (-1, f.shape[-1]))
        return tf.matmul(flat, flat, transpose_a=True)

    @tf.function
    def loss_and_gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            found = batch_features(tf.stack([content, style, x]))
            loss = CONTENT * tf.reduce_sum((found["conv5_2"][2] - found["conv5_2"][0]) ** 2)
            for name in STYLE_LAYERS:
                difference = gram(found[name][1]) - gram(found[name][2])
                loss += STYLE * tf.reduce_sum((difference / (6 * size)) ** 2)
            loss += VARIATION * deepstyle.total_variation(x)
        return loss, tape.gradient(loss, x)

    def evaluate(flat):
        loss, gradient = loss_and_gradient(tf.constant(flat.reshape(content.shape), tf.float32))
        course.add(loss)
        return float(loss), gradient.numpy().ravel().astype(np.float64)

    x = content.ravel().astype(np.float64)
    for _ in range(num_iter):
        x, _, _ = optimize.fmin_l_bfgs_b(evaluate, x, maxfun=20)
    return course.points


def run_pytorch(paths: list[str], rows: int, num_iter: int, name: str = "LBFGS", **options: float) -> list:
    import plain_pytorch
    import torch

    weights, _ = deepstyle.load_weights()
    content, style = resized(paths, rows)
    course = Course()
    loss_of = plain_pytorch.loss_of(content, style, weights)
    x = plain_pytorch.channels_first(content).requires_grad_()
    optimiser = getattr(torch.optim, name)([x], **options)

    def closure() -> Any:
        optimiser.zero_grad()
        loss = loss_of(x)
        loss.backward()
        course.add(loss.detach())
        return loss

    # The old way takes 20 evaluations a step, and so does torch's L-BFGS; it may go on for as many again to reach the
    # same loss.
    while len(course.points) < 2 * 20 * num_iter:
        before = len(course.points)
        optimiser.step(closure)
        ended = name == "LBFGS" and len(course.points) - before < 2
        if ended or not np.isfinite(course.points[-1][1]):
            break
    return course.points


def run_adam(paths: list[str], rows: int, num_iter: int) -> list:
    """The course of the best step."""
    courses = [run_pytorch(paths, rows, num_iter, "Adam", lr=step) for step in (1.0, 3.0, 10.0)]
    return min(courses, key=lambda points: best_so_far(points)[-1][1])


def flags_in_words(flags: dict[str, Any]) -> str:
    return " ".join(["deepstyle", *(f"--{name} {value}" for name, value in flags.items())])


FLAGS: list[dict[str, Any]] = [
    {},
    {"scales": 3},
    {"init_image": "recolored"},
    {"scales": 3, "init_image": "recolored"},
    {"optimizer": "device"},
    {"precision": "mixed"},
    {"optimizer": "device", "precision": "mixed"},
    {"scales": 3, "coarse_iter": 3, "optimizer": "device", "history": 30},
    {"scales": 3, "coarse_iter": 3, "optimizer": "device", "history": 30, "precision": "mixed"},
]
OURS: dict[str, Callable] = {flags_in_words(flags): functools.partial(run_deepstyle, **flags) for flags in FLAGS}
CONTESTANTS: dict[str, Callable] = {
    **OURS,
    "the old way": run_old_way,
    "PyTorch L-BFGS": run_pytorch,
    "PyTorch Adam": run_adam,
}


def best_so_far(points: list) -> list:
    """The points with each loss replaced by the least until then: a line search tries worse ones."""
    least = np.minimum.accumulate([loss for _, loss in points])
    return [(seconds, float(loss)) for (seconds, _), loss in zip(points, least, strict=True)]


def time_to(points: list, goal: float) -> float | None:
    return next((seconds for seconds, loss in points if loss <= goal), None)


def seconds_per_evaluation(points: list) -> float:
    """Median of the steps, the first of which compiles."""
    return float(np.median(np.diff([seconds for seconds, _ in points])[1:]))


def draw(courses: dict, path: str, goal: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, points in courses.items():
        axes.plot(*zip(*best_so_far(points), strict=True), label=name)
    axes.axhline(goal, color="grey", linestyle=":", linewidth=1)
    axes.set(xlabel="seconds", ylabel="loss", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=100)


def compare(courses: dict, evaluations: int) -> None:
    """Print how much of each contestant's time ours take to the loss that it has after so many evaluations."""
    ours = [name for name in courses if name in OURS]
    for name, points in courses.items():
        points = best_so_far(points)
        goal = points[min(len(points), evaluations) - 1][1]
        taken = time_to(points, goal)
        print(f"{name}: loss {goal:.4g} after {taken:.0f} s; there in")
        for other in ours:
            sooner = time_to(best_so_far(courses[other]), goal)
            print(f"    {f'{sooner / taken:.3f} of the time' if sooner else 'not at all':>18} with {other}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    images = [str(FOLDER / "images" / name) for name in ("rocket.jpg", "composition_viii.jpg")]
    parser.add_argument("pair", nargs="*", default=images, metavar="CONTENT STYLE")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--num_iter", type=int, default=10)
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=[*CONTESTANTS], metavar="NAME")
    parser.add_argument("--until_plain", action="store_true")
    parser.add_argument("--json", default="race.json")
    parser.add_argument("--plot", default="race.png")
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--one", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--goal", type=float, default=-math.inf, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if len(arguments.pair) != 2:
        parser.error("give one content and one style, or neither")
    if arguments.one:
        ours: dict[str, Any] = {"goal": arguments.goal}
        if arguments.pictures:
            ours["saved"] = arguments.pictures / f"{arguments.one.replace(' ', '_')}.png"
        given = arguments.pair, arguments.rows, arguments.num_iter
        return print(json.dumps(CONTESTANTS[arguments.one](*given, **(ours if arguments.one in OURS else {}))))
    if arguments.pictures:
        arguments.pictures.mkdir(parents=True, exist_ok=True)
    courses: dict[str, list] = {}
    for name in arguments.only:
        if name.startswith("PyTorch") and not importlib.util.find_spec("torch"):
            print(f"torch is not installed: {name} does not take part")
            continue
        command = [sys.executable, __file__, *arguments.pair, "--one", name, "--rows", str(arguments.rows)]
        command += ["--num_iter", str(arguments.num_iter)]
        if arguments.until_plain and (plain := courses.get("deepstyle")):
            command += [f"--goal={best_so_far(plain)[-1][1]}"]
        if arguments.pictures:
            command += ["--pictures", str(arguments.pictures)]
        said = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
        courses[name] = json.loads(said.splitlines()[-1])
        print(f"{name}: {seconds_per_evaluation(courses[name]):.3f} s an evaluation, {len(courses[name])} of them")
        Path(arguments.json).write_text(json.dumps(courses))
    compare(courses, 20 * arguments.num_iter)
    if importlib.util.find_spec("matplotlib"):
        draw(courses, arguments.plot, goal=best_so_far(courses.get("the old way", next(iter(courses.values()))))[-1][1])
    else:
        print("matplotlib is not installed: no plot")
    return None


if __name__ == "__main__":
    main()
