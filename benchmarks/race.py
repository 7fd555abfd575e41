"""This program against the old way and against PyTorch: time to the same loss, as ratios, and a plot.

usage: python benchmarks/race.py [--rows 200] [--num_iter 10] [--json FILE] [--plot FILE.png]

All contestants run one after another on the same pictures, weights and loss, each in a process of its own:

- deepstyle: this program; with --scales 3: the same, coarse to fine
- the old way: content, style and generated picture in one batch of three in every evaluation, and L-BFGS started anew
  after every 20 evaluations, as the scripts do that this program replaces; in TensorFlow, compiled
- PyTorch: the same loss written plainly, minimised by torch.optim.LBFGS as it comes, if torch is installed

The clock starts when a contestant has its libraries and weights, and runs through its targets and compilation. A loss
counts if it is that of the picture at full size. The plot needs matplotlib.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(FOLDER))
import deepstyle  # noqa: E402, it is not installed but lies above
from deepstyle_support.backend import import_keras  # noqa: E402
from deepstyle_support.pictures import resize  # noqa: E402

CONTENT, STYLE, VARIATION = 0.025, 1.0 / 5, 1e-5  # the program's default weights
LAYERS = (*deepstyle.STYLE_LAYERS, "conv5_2")


def pictures() -> tuple[np.ndarray, np.ndarray]:
    names = ("rocket.jpg", "composition_viii.jpg")
    return tuple(deepstyle.read_picture(str(FOLDER / "images" / name))[0] for name in names)


def resized(rows: int) -> tuple[np.ndarray, np.ndarray]:
    content, style = pictures()
    (size,) = deepstyle.picture_sizes(content.shape, deepstyle.Settings(image_size=rows))
    return resize(content, size), resize(style, size)


class Course:
    """(seconds, loss) of each evaluation at full size since it was made."""

    def __init__(self):
        self.began, self.points = time.perf_counter(), []

    def add(self, loss: float) -> None:
        self.points.append((time.perf_counter() - self.began, float(loss)))


def run_deepstyle(rows: int, num_iter: int, scales: int = 1) -> list:
    settings = deepstyle.Settings(image_size=rows, num_iter=num_iter, scales=scales, tile="off")
    content, style = pictures()
    weights, _ = deepstyle.load_weights()
    import_keras()
    full_size = deepstyle.picture_sizes(content.shape, settings)[-1]
    course = Course()

    def on_evaluation(size, count: int, loss: float) -> None:
        if size == full_size:
            course.add(loss)

    for _ in deepstyle.paint(deepstyle.Pictures(content, (style,)), settings, weights, on_evaluation=on_evaluation):
        pass
    return course.points


def run_coarse_to_fine(rows: int, num_iter: int) -> list:
    return run_deepstyle(rows, num_iter, scales=3)


def run_old_way(rows: int, num_iter: int) -> list:
    import_keras()  # which tells TensorFlow to use oneDNN
    import tensorflow as tf
    from scipy import optimize

    content, style = (deepstyle.to_input_space(picture) for picture in resized(rows))
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
            for name in deepstyle.STYLE_LAYERS:
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


def run_pytorch(rows: int, num_iter: int) -> list:
    import torch
    from torch.nn import functional

    def channels_first(picture: np.ndarray):
        return torch.tensor(deepstyle.to_input_space(picture)).permute(2, 0, 1)[None].contiguous()

    content, style = map(channels_first, resized(rows))
    weights = {
        name: (torch.tensor(kernel).permute(3, 2, 0, 1).contiguous(), torch.tensor(bias))
        for name, (kernel, bias) in deepstyle.load_weights()[0].items()
    }
    size = content.shape[2] * content.shape[3]
    course = Course()

    def features(x) -> dict:
        found = {}
        for name, (kernel, bias) in weights.items():
            if name > "conv5_2":
                break
            if name.endswith("_1") and name != "conv1_1":
                x = functional.avg_pool2d(x, 2)
            x = functional.relu(functional.conv2d(x, kernel, bias, padding=1))
            if name in LAYERS:
                found[name] = x
        return found

    def gram(f):
        flat = f.flatten(2)[0]
        return flat @ flat.T

    with torch.no_grad():
        content_target = features(content)["conv5_2"]
        found = features(style)
        style_targets = {name: gram(found[name]) for name in deepstyle.STYLE_LAYERS}
    x = content.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([x])

    def closure():
        optimiser.zero_grad()
        found = features(x)
        loss = CONTENT * ((found["conv5_2"] - content_target) ** 2).sum()
        for name, target in style_targets.items():
            loss = loss + STYLE * (((target - gram(found[name])) / (6 * size)) ** 2).sum()
        corner = x[..., :-1, :-1]
        square = (corner - x[..., 1:, :-1]) ** 2 + (corner - x[..., :-1, 1:]) ** 2
        loss = loss + VARIATION * (square**1.25).sum()
        loss.backward()
        course.add(loss.detach())
        return loss

    # The old way takes 20 evaluations a step, and so does this; it may go on for as many again to reach the same loss.
    while len(course.points) < 2 * 20 * num_iter:
        before = len(course.points)
        optimiser.step(closure)
        if not np.isfinite(course.points[-1][1]) or len(course.points) - before < 2:
            break
    return course.points


CONTESTANTS = {
    "deepstyle": run_deepstyle,
    "deepstyle --scales 3": run_coarse_to_fine,
    "the old way": run_old_way,
    "PyTorch": run_pytorch,
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--num_iter", type=int, default=10)
    parser.add_argument("--json", default="race.json")
    parser.add_argument("--plot", default="race.png")
    parser.add_argument("--one", choices=CONTESTANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        return print(json.dumps(CONTESTANTS[arguments.one](arguments.rows, arguments.num_iter)))
    courses = {}
    for name in CONTESTANTS:
        if name == "PyTorch" and not importlib.util.find_spec("torch"):
            print("PyTorch is not installed and does not take part")
            continue
        command = [sys.executable, __file__, "--one", name, "--rows", str(arguments.rows)]
        command += ["--num_iter", str(arguments.num_iter)]
        said = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
        courses[name] = json.loads(said.splitlines()[-1])
        print(f"{name}: {seconds_per_evaluation(courses[name]):.3f} s an evaluation, {len(courses[name])} of them")
        Path(arguments.json).write_text(json.dumps(courses))
    ours = best_so_far(courses["deepstyle"])
    for name, points in courses.items():
        points = best_so_far(points)
        goal = points[min(len(points), 20 * arguments.num_iter) - 1][1]
        taken = time_to(points, goal)
        print(f"{name}: loss {goal:.4g} after {taken:.0f} s; deepstyle is there in ", end="")
        print(f"{(time_to(ours, goal) or float('nan')) / taken:.3f} of the time, with --scales 3 in ", end="")
        print(f"{(time_to(best_so_far(courses['deepstyle --scales 3']), goal) or float('nan')) / taken:.3f}")
    goal = best_so_far(courses["the old way"])[-1][1]
    if importlib.util.find_spec("matplotlib"):
        draw(courses, arguments.plot, goal)
    else:
        print("matplotlib is not installed: no plot")
    return None


if __name__ == "__main__":
    main()
