"""What several test files share: a small network, small pictures, and files of them.

Most of what is tested is the same whatever the network's width, and 99 % of the time goes into its width. So the tests
paint with a network of a sixteenth of VGG's channels, in this process and in those that `forked` starts. What the width
decides (genuine weights, memory, other backends, the processes that are started cold) asks for `full_network`.
"""

import contextlib
import gc
import math
import os
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

import deepstyle
from deepstyle_support.engine import Engine
from deepstyle_support.images import resize
from deepstyle_support.memory import overhead_of
from deepstyle_support.vgg import CHANNELS
from deepstyle_support.weights import random_weights

IMAGES = Path(__file__).parent.parent / "images"
SMALL = ["--weights", "random", "--image_size", "32", "--num_iter", "2"]
FULL = {model: dict(layers) for model, layers in CHANNELS.items()}
NARROW = {model: {name: width // 16 for name, width in layers.items()} for model, layers in FULL.items()}

ONE_THREAD = dict.fromkeys(("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS"), "1")


def pytest_configure():
    """One thread for each of the suite's workers, which share the cores; TensorFlow is not loaded yet."""
    os.environ.update(ONE_THREAD)


def use_network(widths):
    """Let the program build networks of these widths, {model: {layer: channels}}."""
    for model, layers in widths.items():
        CHANNELS[model].update(layers)


use_network(NARROW)


def all_threads():
    """The environment of a process that computes on all cores, as a person's does."""
    return {name: value for name, value in os.environ.items() if name not in ONE_THREAD}


def for_scripts(**environment):
    """The environment of a script that imports the program and the tests."""
    tests = Path(__file__).parent
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])} | environment


@contextlib.contextmanager
def full_width():
    """VGG as it is, while this lasts."""
    use_network(FULL)
    try:
        yield
    finally:
        use_network(NARROW)


@pytest.fixture
def full_network():
    with full_width():
        yield


@pytest.fixture(autouse=True)
def memory_within_bounds():
    """Let go of compiled losses before they fill a worker: each test has others, in other sizes."""
    yield
    # Only where there is something to let go of: looking through all that TensorFlow has made takes 0.3 s.
    if deepstyle.compiled.cache_info().currsize and psutil.Process().memory_info().rss > 1.4e9:
        deepstyle.compiled.cache_clear()
        gc.collect()


@pytest.fixture(scope="session")
def untrained():
    return random_weights(seed=0)


class Recorder(deepstyle.Watch):
    """A watch that keeps (size, count, loss) of each evaluation, and stops a run after so many of them."""

    def __init__(self, most=math.inf):
        self.most, self.seen, self.tiles = most, [], []

    def evaluated(self, size, count, evaluation):
        self.seen.append((size, count, evaluation.loss))

    def should_stop(self):
        return len(self.seen) >= self.most

    def smaller_tiles(self, tile):
        self.tiles.append(tile)


def evaluation_of(loss, gradient):
    """An evaluation with a single term."""
    return deepstyle.Evaluation(deepstyle.Losses(loss, 0.0, 0.0, loss), {"total variation": loss}, gradient)


def engine_for(pictures, settings, weights):
    return Engine(deepstyle.planned(pictures, settings), weights, settings.padding)


def paint(pictures, settings, weights, state=None, watch=None):
    """The iterations, one after another, in the memory that is free."""
    return deepstyle.paint(pictures, settings, engine_for(pictures, settings, weights), state, watch)


def held_by(pictures, settings):
    """What painting them takes beside what is computed."""
    full = deepstyle.stages_of(pictures, settings)[-1]
    return overhead_of(
        pictures.named(), full.size, deepstyle.saved_size(pictures, settings), full.style_sizes, settings
    )


def smooth_picture(seed, rows, columns):
    """(rows, columns, 3) uint8: random colours in patches, so that it has edges and areas."""
    colours = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), np.uint8)
    return resize(colours, (rows, columns), "bicubic")


@pytest.fixture
def picture_files(tmp_path):
    """Paths of a 48x64 content and a 50x40 style picture."""
    paths = []
    for name, seed, rows, columns in (("content.png", 1, 48, 64), ("style.png", 2, 50, 40)):
        Image.fromarray(smooth_picture(seed, rows, columns)).save(tmp_path / name)
        paths.append(str(tmp_path / name))
    return paths


def pixels(path):
    """A saved picture as an array."""
    return np.asarray(Image.open(path))


def run(inputs, prefix, *flags):
    """The exit status of the command, in this process; inputs: paths of a content and a style picture."""
    from deepstyle_app.command import main  # here, since most tests need no command

    return main([*inputs, str(prefix), *SMALL, *map(str, flags)])


def run_quietly(inputs, prefix, *flags):
    return run(inputs, prefix, "--quiet", *flags)


def describe(path, capsys):
    """What the command says of how a picture was made."""
    from deepstyle_app.command import main

    capsys.readouterr()
    assert main(["--describe", str(path)]) == 0
    return capsys.readouterr().out


STARTED_FOR = "DEEPSTYLE_STARTED_FOR"  # in the environment of a process and of all that it starts


def left_of(mark, group, seconds=20):
    """The command lines of those processes that were started for this, as STARTED_FOR says, and that do not end.

    group: the process that began them all. Ray's agents write titles over their environment, but stay in its group.
    """

    def there():
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                ours = process.pid != group.pid and os.getpgid(process.pid) == group.pid
                if ours or process.environ().get(STARTED_FOR) == str(mark):
                    yield " ".join(process.cmdline()).strip()

    deadline = time.monotonic() + seconds
    while (left := list(there())) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def wait_for(path, process):
    """Until the file is there, which a process under way is to write."""
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
