"""What sharing work out costs, tiles or whole pictures: measured on this machine, and calculated for others.

usage: python benchmarks/many_workers.py measure [--rows 1024] [--tile 512] [--workers 2] [--rounds 5]
       python benchmarks/many_workers.py table [--seconds 9.5] [--largest 1024]
       python benchmarks/many_workers.py folder [--photos 1000] [--seconds 128]

`measure` evaluates the same picture in the same tiles in turn, in this process with all cores and with workers that
share them, and prints the ratio of each round and their median; also the seconds of a megapixel of window, all passes,
with which `table` calculates. Weights are random, which makes no difference to the time. It takes about five minutes.

`table` prints docs/many_workers.md's: for each size and number of workers the bytes of an evaluation that leave or
reach this program's machine, the seconds that they take, and the seconds of computing.

`folder` prints its other table: a folder of photos, of which each takes a worker so many seconds, on 1 to 64 machines.
"""

import argparse
import math
import os
import statistics
import time

import numpy as np

import deepstyle
from deepstyle_app.crew import Crew
from deepstyle_app.tile_workers import WorkersEngine
from deepstyle_support.engine import Engine
from deepstyle_support.images import resize, to_input_space
from deepstyle_support.memory import Plan, largest_window, shared_tile
from deepstyle_support.pictures import Pictures
from deepstyle_support.settings import STYLE_LAYERS, Settings
from deepstyle_support.tiles import tiles_of
from deepstyle_support.vgg import CHANNELS, halo
from deepstyle_support.weights import random_weights

START = 15  # seconds until a worker paints: Ray, its process, and the backend


def seconds_of(objective: deepstyle.Objective, x: np.ndarray) -> float:
    began = time.perf_counter()
    objective(x)
    return time.perf_counter() - began


def measure(rows: int, tile: int, number: int, rounds: int) -> None:
    random = np.random.default_rng(0)
    content, style = (resize(random.integers(0, 256, (40, 40, 3), np.uint8), (rows, rows)) for _ in range(2))
    settings, weights = Settings(tile=str(tile)), random_weights(0)
    stage = deepstyle.Stage(Pictures(content, (style,)), settings, (rows, rows), (rows, rows), 1)
    plan, crew = Plan(tile, settings.history), Crew(number)
    print(f"{crew.begin()}; load {os.getloadavg()[0]:.1f}", flush=True)
    try:
        engines = Engine(plan, weights, settings.padding), WorkersEngine(crew, plan, weights, settings)
        here, shared = (deepstyle.Objective.at(stage, engine, deepstyle.Watch()) for engine in engines)
        x = to_input_space(content)
        losses = here(x)[0], shared(x)[0]  # both have compiled now
        print(f"losses agree to {abs(losses[1] / losses[0] - 1):.0e}", flush=True)
        pairs = []
        for _ in range(rounds):
            pairs.append((seconds_of(here, x), seconds_of(shared, x)))
            print(f"one process {pairs[-1][0]:.2f} s, {number} workers {pairs[-1][1]:.2f} s, ", end="")
            print(f"ratio {pairs[-1][1] / pairs[-1][0]:.2f}; load {os.getloadavg()[0]:.1f}", flush=True)
    finally:
        crew.end()
    seconds = statistics.median(one for one, _ in pairs)
    print(f"median ratio {statistics.median(shared / one for one, shared in pairs):.2f}")
    print(f"{seconds / window_pixels((rows, rows), tile) * 1e6:.2f} s a megapixel of window in one process")


def window_pixels(size: tuple[int, int], tile: int) -> int:
    """Of all windows of the second pass."""
    tiles = tiles_of(size, tile, halo(["conv5_2"], "vgg16"))
    return sum(math.prod(part.stop - part.start for part in tile.window) for tile in tiles)


def row(side: int, workers: int, at_most: int, seconds: float) -> list[str]:
    """Of one size and number of workers, each on a machine of its own."""
    size = side, side
    tile = shared_tile(size, at_most, workers, "vgg16", kept=False)
    tiles = math.ceil(side / tile) ** 2
    x = 4 * 3 * side**2 * workers
    grams = 4 * sum(CHANNELS["vgg16"][layer] ** 2 for layer in STYLE_LAYERS)
    gradients = 4 * 3 * window_pixels(size, tile)
    sent = x + grams * (tiles + workers) + gradients
    computing = math.ceil(tiles / workers) * largest_window(size, tile, "vgg16") / 1e6 * seconds
    slow, fast = (8 * sent / rate for rate in (10e9, 100e9))
    cells = [f"{side} x {side}", f"{workers}", f"{tiles} of {tile}"]
    cells += [f"{part / 1e9:.2f}" for part in (x, grams * (tiles + workers), gradients)]
    cells += [f"{slow:.1f}", f"{fast:.1f}", f"{computing:.0f}"]
    return [*cells, *(f"{sending / computing:.1%}" for sending in (slow, fast))]


def table(at_most: int, seconds: float) -> None:
    heads = ["pixels", "workers", "tiles", "x, GB", "Grams, GB", "gradients, GB", "at 10 Gbit/s, s", "at 100 Gbit/s, s"]
    heads += ["computing, s", "sending / computing at 10", "at 100"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for side in (4096, 8192, 16384):
        for workers in (1, 2, 4, 8, 16, 32, 64):
            print(f"| {' | '.join(row(side, workers, at_most, seconds))} |")


def folder(photos: int, seconds: float) -> None:
    """Each machine, with one worker, gets the weights and a style of 12 megapixels once; of a photo only its name."""
    inputs, weights = 3, 0
    for outputs in CHANNELS["vgg16"].values():
        weights += 4 * (9 * inputs * outputs + outputs)
        inputs = outputs
    heads = ["machines", "weights and style, GB", "at 10 Gbit/s, s", "photos of the busiest", "hours", "of the ideal"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for machines in (1, 2, 4, 8, 16, 32, 64):
        sent = machines * (weights + 3 * 12e6)
        busiest = math.ceil(photos / machines)
        hours = (START + 8 * sent / 10e9 + busiest * seconds) / 3600
        ideal = photos * seconds / machines / 3600
        print(
            f"| {machines} | {sent / 1e9:.2f} | {8 * sent / 10e9:.1f} | {busiest} | {hours:.2f} | {ideal / hours:.1%} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["measure", "table", "folder"])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--tile", type=int, default=512, help="of measure")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--largest", type=int, default=1024, help="tile of table, at most")
    parser.add_argument("--photos", type=int, default=1000, help="of folder")
    parser.add_argument("--seconds", type=float, help="for a megapixel of window (9.5), or for a photo (128)")
    arguments = parser.parse_args()
    if arguments.what == "measure":
        measure(arguments.rows, arguments.tile, arguments.workers, arguments.rounds)
    elif arguments.what == "table":
        table(arguments.largest, arguments.seconds or 9.5)
    else:
        folder(arguments.photos, arguments.seconds or 128)


if __name__ == "__main__":
    main()
