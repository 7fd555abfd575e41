"""The trained network on real pictures: what only it can show."""

import numpy as np
import pytest
from conftest import IMAGES, full_width, paint

import deepstyle
from deepstyle_support.images import resize, to_input_space

pytestmark = [pytest.mark.usefixtures("full_network"), pytest.mark.xdist_group("trained")]


@pytest.fixture(scope="module")
def trained():
    with full_width():
        weights, _ = deepstyle.load_weights()
    return weights


def test_the_weights_are_those_of_vgg16(trained):
    probes = {
        ("conv1_1", 0, (0, 0, 0, 0)): 0.42947057,
        ("conv1_1", 1, (25,)): 0.7446502,
        ("conv1_2", 0, (2, 2, 63, 63)): 0.016082443,
        ("conv2_1", 1, (1,)): 0.06440781,
        ("conv5_1", 0, (1, 0, 63, 269)): -0.011236359,
        ("conv5_2", 1, (510,)): 0.23517226,
        ("conv5_3", 0, (0, 2, 0, 400)): -0.008714244,
    }
    for (layer, kind, index), value in probes.items():
        assert trained[layer][kind][index] == np.float32(value)
    assert sum(tensor.size for layer in trained.values() for tensor in layer) == 14_714_688


def test_style_loss_falls_twentyfold_in_three_iterations(trained):
    content, style = (deepstyle.read_picture(str(IMAGES / name))[0] for name in ("rocket.jpg", "composition_viii.jpg"))
    settings = deepstyle.Settings(image_size=128, num_iter=3)
    size = deepstyle.picture_sizes(content.shape, settings)[-1]
    small = resize(content, size)
    before = deepstyle.Objective(small, resize(style, size), weights=trained).evaluate(to_input_space(small))
    *_, last = paint(deepstyle.Pictures(content, (style,)), settings, trained)
    assert last.number == 3
    assert last.losses.style < before.losses.style / 20
    # A picture, not noise: it still has the photo's bright ground and dark sky.
    assert np.corrcoef(last.picture.ravel(), small.ravel())[0, 1] > 0.3
