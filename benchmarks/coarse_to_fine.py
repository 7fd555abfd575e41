"""How much sooner --scales N reaches the loss of a plain run, and both pictures side by side.

usage: python benchmarks/coarse_to_fine.py CONTENT STYLE PICTURE.png [--rows 800] [--num_iter 20] [--scales 3]
"""

import argparse
import contextlib
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import deepstyle
from deepstyle_support.backend import import_keras
from deepstyle_support.engine import Engine


def run(content, style, settings, weights, goal: float = 0.0) -> tuple[float, float, np.ndarray]:
    """Seconds, least loss and picture of a run that ends when its loss is at most `goal`; prints its course."""
    full_size = deepstyle.picture_sizes(content.shape, settings)[-1]
    began, reached = time.perf_counter(), []

    class Watch(deepstyle.Watch):
        def evaluated(self, size: tuple[int, int], count: int, evaluation: deepstyle.Evaluation) -> None:
            loss = evaluation.loss
            seconds = time.perf_counter() - began
            if count % 20 == 1:
                print(f"{seconds:8.1f} s  {size[0]:4} rows  evaluation {count:3}  loss {loss:.5g}", flush=True)
            if size == full_size and loss <= goal:
                reached.append((seconds, loss))

        def should_stop(self) -> bool:
            return bool(reached)

    pictures = deepstyle.Pictures(content, (style,))
    engine = Engine(deepstyle.planned(pictures, settings), weights, settings.padding)
    with contextlib.closing(deepstyle.paint(pictures, settings, engine, watch=Watch())) as iterations:
        *_, last = iterations
    seconds, loss = reached[0] if reached else (time.perf_counter() - began, last.loss)
    return seconds, loss, last.picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", nargs=3, metavar=("CONTENT", "STYLE", "PICTURE"))
    parser.add_argument("--rows", type=int, default=800)
    parser.add_argument("--num_iter", type=int, default=20)
    parser.add_argument("--scales", type=int, default=3)
    arguments = parser.parse_args()
    content, style = (deepstyle.read_picture(path)[0] for path in arguments.pictures[:2])
    weights, _ = deepstyle.load_weights()
    import_keras()
    plain = deepstyle.Settings(image_size=arguments.rows, num_iter=arguments.num_iter)
    seconds, loss, picture = run(content, style, plain, weights)
    print(f"1 scale: loss {loss:.5g} after {seconds:.1f} s")
    scaled = deepstyle.Settings(image_size=arguments.rows, num_iter=arguments.num_iter, scales=arguments.scales)
    sooner, reached, other = run(content, style, scaled, weights, goal=loss)
    print(f"{arguments.scales} scales: loss {reached:.5g} after {sooner:.1f} s, {sooner / seconds:.3f} of the time")
    Image.fromarray(np.concatenate([picture, other], axis=1)).save(arguments.pictures[2])


if __name__ == "__main__":
    main()
