"""What several test files share: an untrained network, small pictures, and files of them."""

import gc
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

import deepstyle
from deepstyle_support.pictures import resize
from deepstyle_support.weights import random_weights

IMAGES = Path(__file__).parent.parent / "images"
SMALL = ["--weights", "random", "--image_size", "32", "--num_iter", "2"]


@pytest.fixture(autouse=True)
def memory_within_bounds():
    """Let go of compiled losses before they fill a worker: each test has others, in other sizes."""
    yield
    if psutil.Process().memory_info().rss > 1.4e9:
        deepstyle.compiled.cache_clear()
        gc.collect()


@pytest.fixture(scope="session")
def untrained():
    return random_weights(seed=0)


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
