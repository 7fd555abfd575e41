"""What shapes the objective beyond one style: several, masks, sizes, layers, factors; against the float64 oracle."""

import math

import numpy as np
import oracle
import pytest
from conftest import smooth_picture

import deepstyle
from deepstyle import Pictures, Settings, Stage
from deepstyle_support.engine import Engine
from deepstyle_support.images import resize, to_input_space
from deepstyle_support.masks import mask_on_grid
from deepstyle_support.memory import Plan
from deepstyle_support.settings import STYLE_LAYERS, weights_of_styles
from deepstyle_support.vgg import CHANNELS, halo

SIZE = (37, 51)  # odd, so that pooling leaves rows and columns out
LAYERS = STYLE_LAYERS


def picture(seed, size=SIZE):
    return smooth_picture(seed, *size)


def soft_mask(seed, size=SIZE):
    """(H, W) uint8 with black, white and all between."""
    return np.uint8(np.clip(smooth_picture(seed, *size)[..., 0].astype(float) * 2 - 128, 0, 255))


def some_x():
    return to_input_space(picture(1)) + np.random.default_rng(3).normal(0, 20, (*SIZE, 3))


def on_grid(mask, layer):
    """The mean of the mask, 0 to 1, over the pixels behind each position of a layer: (h, w, 1)."""
    stride = 2 ** (int(layer[4]) - 1)
    rows, columns = mask.shape[0] // stride, mask.shape[1] // stride
    means = [
        [mask[i * stride : (i + 1) * stride, j * stride : (j + 1) * stride].mean() / 255 for j in range(columns)]
        for i in range(rows)
    ]
    return np.array(means)[..., None]


def expected_style_loss(f, style, network, layer, mask=None):
    """One layer's unweighted style loss for features f of the picture: {layer: (h, w, C)}."""
    f, f_style = f[layer], oracle.features(oracle.to_input_space(style), network, "ave")[layer]
    gram = oracle.gram(f)
    if mask is not None:
        weight = on_grid(mask, layer)
        gram = oracle.gram(f * np.sqrt(weight)) / weight.mean()
    target = oracle.gram(f_style) * (f.shape[0] * f.shape[1]) / (f_style.shape[0] * f_style.shape[1])
    return ((target - gram) ** 2).sum() / (4 * 3**2 * math.prod(SIZE) ** 2)


def assert_gradient_fits(objective, x, tolerance=2e-3):
    """The slope along the gradient is that of the objective's own loss."""
    _, gradient = objective(x)
    direction = gradient / np.linalg.norm(gradient)
    step = 0.5  # float32 needs a large one
    slope = (objective(x + step * direction)[0] - objective(x - step * direction)[0]) / (2 * step)
    assert slope == pytest.approx(np.linalg.norm(gradient), rel=tolerance)


@pytest.fixture(scope="module")
def found(untrained):
    """The oracle's features of some_x()."""
    return oracle.features(some_x(), untrained, "ave")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tile", ["off", "32"])
def test_several_styles_each_with_its_weight_and_mask(untrained, found, masked, tile):
    styles, masks = [picture(2), picture(4)], [soft_mask(5), soft_mask(6)]
    objective = deepstyle.Objective(
        picture(1), styles, style_masks=masks if masked else (), style_weight=(2.0, 0.5), weights=untrained, tile=tile
    )
    parts = objective.evaluate(some_x()).parts
    for number, (style, mask, weight) in enumerate(zip(styles, masks, (2.0, 0.5), strict=True), 1):
        for layer in LAYERS:
            expected = weight / 5 * expected_style_loss(found, style, untrained, layer, mask if masked else None)
            assert parts[f"style {number} {layer}"] == pytest.approx(expected, rel=1e-4)
    assert_gradient_fits(objective, some_x())


def test_tiles_change_nothing_where_there_are_masks(untrained):
    size = (230, 36)
    styles = {"style_masks": [soft_mask(5, size), soft_mask(6, size)], "content_mask": soft_mask(7, size)}
    whole, tiled = (
        deepstyle.Objective(picture(1, size), [picture(2), picture(4, size)], **styles, weights=untrained, tile=tile)
        for tile in ("off", "32")
    )
    x = to_input_space(picture(3, size))
    expected, got = whole.evaluate(x), tiled.evaluate(x)
    assert got.parts == pytest.approx(expected.parts, rel=1e-5)
    assert np.linalg.norm(got.gradient - expected.gradient) <= 2e-6 * np.linalg.norm(expected.gradient)


def test_one_weight_is_shared_out_among_the_styles():
    assert weights_of_styles(Settings(style_weight=3.0, style_scale=2.0), 3) == [2.0, 2.0, 2.0]
    assert weights_of_styles(Settings(style_weight=[1.0, 3.0]), 2) == [1.0, 3.0]
    with pytest.raises(deepstyle.UserError, match="--style_weight has 2 weights for 3 styles"):
        weights_of_styles(Settings(style_weight=[1.0, 3.0]), 3)


def test_a_style_of_weight_zero_is_not_computed(untrained):
    objective = deepstyle.Objective(picture(1), [picture(2), picture(4)], style_weight=(0, 1.0), weights=untrained)
    assert not any(name.startswith("style 1") for name in objective.evaluate(some_x()).parts)


def test_content_counts_where_its_mask_is_white(untrained, found):
    mask = soft_mask(7)
    objective = deepstyle.Objective(
        picture(1), picture(2), content_mask=mask, content_layer="conv4_2", weights=untrained
    )
    target = oracle.features(oracle.to_input_space(picture(1)), untrained, "ave")["conv4_2"]
    expected = 0.025 * ((found["conv4_2"] - target) ** 2 * on_grid(mask, "conv4_2")).sum()
    assert objective.evaluate(some_x()).parts["content conv4_2"] == pytest.approx(expected, rel=1e-4)
    assert_gradient_fits(objective, some_x())


def test_a_small_region_gets_the_style_as_strongly_as_a_large_one(untrained):
    """With a picture whose features are the same everywhere inside, the size of the mask makes no difference."""
    flat = np.full((96, 96, 3), 90, np.uint8)
    losses = []
    for side in (32, 64):
        mask = np.zeros((96, 96), np.uint8)
        mask[16 : 16 + side, 16 : 16 + side] = 255
        objective = deepstyle.Objective(
            flat, picture(2, (96, 96)), style_masks=[mask], style_layers="conv2_1", weights=untrained
        )
        losses.append(objective.evaluate(to_input_space(flat)).losses.style)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_masks_that_leave_nothing_are_refused(untrained):
    black = np.zeros((*SIZE, 3), np.uint8)
    with pytest.raises(deepstyle.UserError, match="the style mask is all black"):
        deepstyle.Objective(picture(1), picture(2), style_masks=[black], weights=untrained)
    with pytest.raises(deepstyle.UserError, match="the content mask is all black"):
        deepstyle.Objective(picture(1), picture(2), content_mask=black, weights=untrained)
    corner = np.zeros(SIZE, np.uint8)
    corner[-1] = 255  # a row that pooling leaves out
    with pytest.raises(deepstyle.UserError, match="the style mask is all black at conv2_1"):
        deepstyle.Objective(picture(1), picture(2), style_masks=[corner], weights=untrained)
    with pytest.raises(deepstyle.UserError, match="there are 2 style masks for 1 styles"):
        deepstyle.Objective(picture(1), picture(2), style_masks=[corner, corner], weights=untrained)


def test_a_mask_is_averaged_over_the_pixels_behind_each_position():
    mask = soft_mask(8)
    for stride in (1, 2, 16):
        layer = f"conv{round(math.log2(stride)) + 1}_1"
        np.testing.assert_allclose(mask_on_grid(mask, SIZE, stride), on_grid(mask, layer), rtol=1e-5)
    larger = np.random.default_rng(9).integers(0, 256, (3 * SIZE[0], 3 * SIZE[1]), np.uint8)
    means = larger.reshape(SIZE[0], 3, SIZE[1], 3, 1).mean((1, 3)) / 255
    np.testing.assert_allclose(mask_on_grid(larger, SIZE), means, rtol=1e-5)


def test_a_style_of_another_size_counts_as_if_it_were_as_large_as_the_picture(untrained, found):
    style = picture(2, (64, 33))
    parts = deepstyle.Objective(picture(1), style, weights=untrained).evaluate(some_x()).parts
    for layer in LAYERS:
        expected = expected_style_loss(found, style, untrained, layer) / 5
        assert parts[f"style {layer}"] == pytest.approx(expected, rel=1e-4)


def test_style_size_and_fit_decide_the_shape_that_a_style_is_shown_in():
    pictures = Pictures(np.zeros((400, 300, 3), np.uint8), (np.zeros((100, 300, 3), np.uint8),))
    for options, expected in (
        ({}, (200, 150)),
        ({"style_fit": "keep"}, (200, 600)),
        ({"style_size": 100}, (50, 37)),
        ({"style_size": 100, "style_fit": "keep"}, (50, 150)),
    ):
        # At half of --image_size, as --scales 2 begins, the style is shown at half as well.
        stage = Stage(pictures, Settings(image_size=400, **options), (200, 150), (400, 300), 1)
        assert stage.style_sizes == [expected]
    stage = Stage(pictures, Settings(image_size=200, style_size=31), (200, 300), (200, 300), 1)
    with pytest.raises(deepstyle.UserError, match="a style picture would have 31 x 46 pixels"):
        _ = stage.style_sizes


def test_the_objective_gets_the_styles_in_their_shapes(untrained):
    content, style = picture(1, (80, 120)), picture(2, (40, 80))
    (stage,) = deepstyle.stages_of(
        Pictures(content, (style,)), Settings(image_size=40, style_size=32, style_fit="keep")
    )
    shown = stage.shown()
    assert (shown.content.shape, shown.styles[0].shape) == ((40, 60, 3), (32, 64, 3))
    x = to_input_space(picture(3, (40, 60)))
    expected = deepstyle.Objective(resize(content, (40, 60)), resize(style, (32, 64)), weights=untrained).evaluate(x)
    found = deepstyle.Objective.at(stage, Engine(Plan(None, 10), untrained), deepstyle.Watch()).evaluate(x)
    assert found.parts == expected.parts


def test_several_layers_share_the_contents_weight(untrained, found):
    layers = ("conv2_2", "block4_conv2")
    objective = deepstyle.Objective(picture(1), picture(2), content_layer=layers, weights=untrained)
    target = oracle.features(oracle.to_input_space(picture(1)), untrained, "ave")
    parts = objective.evaluate(some_x()).parts
    for layer in ("conv2_2", "conv4_2"):
        expected = 0.025 / 2 * ((found[layer] - target[layer]) ** 2).sum()
        assert parts[f"content {layer}"] == pytest.approx(expected, rel=1e-4)


def test_style_layers_share_the_styles_weight_as_they_are_told(untrained, found):
    options = {"style_layers": ("conv1_2", "conv3_3"), "style_layer_weights": (3.0, 1.0), "style_weight": 2.0}
    parts = deepstyle.Objective(picture(1), picture(2), **options, weights=untrained).evaluate(some_x()).parts
    for layer, share in (("conv1_2", 0.75), ("conv3_3", 0.25)):
        expected = 2 * share * expected_style_loss(found, picture(2), untrained, layer)
        assert parts[f"style {layer}"] == pytest.approx(expected, rel=1e-4)
    assert sum(name.startswith("style") for name in parts) == 2


def test_content_loss_types_are_three_factors(untrained):
    parts = [
        deepstyle.Objective(picture(1), picture(2), content_loss_type=kind, weights=untrained)
        .evaluate(some_x())
        .parts["content conv5_2"]
        for kind in (0, 1, 2)
    ]
    size = CHANNELS["vgg16"]["conv5_2"] * math.prod(SIZE)
    assert parts[1] / parts[0] == pytest.approx(1 / (2 * math.sqrt(size)), rel=1e-6)
    assert parts[2] / parts[0] == pytest.approx(1 / size, rel=1e-6)


def test_vgg19_has_its_own_layers(untrained):
    weights, _ = deepstyle.load_weights("random", model="vgg19")
    assert len(weights) == 16
    objective = deepstyle.Objective(picture(1), picture(2), model="vgg19", content_layer="conv5_4", weights=weights)
    x = some_x()
    for name, (kernel, bias) in weights.items():
        if name.endswith("_1") and name != "conv1_1":
            x = oracle.pool(x, "ave")
        x = np.maximum(oracle.convolve(x, kernel, bias), 0)
    y = oracle.to_input_space(picture(1))
    for name, (kernel, bias) in weights.items():
        if name.endswith("_1") and name != "conv1_1":
            y = oracle.pool(y, "ave")
        y = np.maximum(oracle.convolve(y, kernel, bias), 0)
    expected = 0.025 * ((x - y) ** 2).sum()
    assert objective.evaluate(some_x()).parts["content conv5_4"] == pytest.approx(expected, rel=1e-4)
    with pytest.raises(deepstyle.UserError, match="--content_layer is 'conv5_4'"):
        Settings(content_layer="conv5_4")
    assert halo(["conv5_4"], "vgg19") > halo(["conv5_3"], "vgg16")
