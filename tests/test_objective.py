"""Loss and gradient against the float64 oracle."""

import functools
import subprocess
import sys
import weakref
from typing import Any, cast

import numpy as np
import oracle
import pytest
from conftest import ONE_THREAD, for_scripts, smooth_picture

import deepstyle
from deepstyle_support import backend, convolution
from deepstyle_support import engine as engines
from deepstyle_support.backend import as_array, differentiable, import_keras
from deepstyle_support.cache import Cache
from deepstyle_support.convolution import Way, convolve, kernel_on_device
from deepstyle_support.engine import Engine, on_device
from deepstyle_support.images import to_input_space
from deepstyle_support.memory import Plan
from deepstyle_support.settings import STYLE_LAYERS

WEIGHTS = {"content_weight": 0.025, "style_weight": 1.0, "total_variation_weight": 1e-5}
ALONE = [{name: WEIGHTS[name] * (name == only) for name in WEIGHTS} for only in WEIGHTS]


def pictures(rows, columns):
    """content and style, and a start that is neither: (H, W, 3)."""
    content, style = smooth_picture(1, rows, columns), smooth_picture(2, rows, columns)
    noise = np.random.default_rng(3).normal(0, 20, content.shape)
    return content, style, to_input_space(content) + noise


def oracle_loss(content, style, network, settings, pool_type="ave", content_layer="conv5_2", padding="zeros"):
    """The function x -> loss of the oracle."""
    targets = oracle.targets(content, style, network, pool_type, padding)

    def loss(x):
        parts = oracle.losses(x, targets, network, pool_type=pool_type, padding=padding, content_layer=content_layer)
        names = ("content_weight", "style_weight", "total_variation_weight")
        return sum(settings[name] * part for name, part in zip(names, parts, strict=True))

    return loss


@pytest.mark.parametrize("settings", [WEIGHTS, *ALONE], ids=["all", "content", "style", "variation"])
@pytest.mark.parametrize(("pool_type", "padding"), [("ave", "zeros"), ("max", "zeros"), ("ave", "edge")])
@pytest.mark.parametrize("size", [(32, 48), (37, 51)], ids=["even", "odd"])
def test_loss_and_gradient_are_those_of_the_formulas(untrained, size, pool_type, padding, settings):
    content, style, x = pictures(*size)
    options = {"pool_type": pool_type, "padding": padding, "weights": untrained, **settings}
    objective = deepstyle.Objective(content, style, **options)
    exact = oracle_loss(content, style, untrained, settings, pool_type, padding=padding)
    loss, gradient = objective(x)
    assert loss == pytest.approx(exact(x), rel=1e-4)
    assert gradient.shape == x.shape
    assert gradient.dtype == np.float64
    for direction in (gradient / np.linalg.norm(gradient), np.random.default_rng(4).normal(0, 0.02, x.shape)):
        step = 1e-3
        slope = (exact(x + step * direction) - exact(x - step * direction)) / (2 * step)
        size_of_slope = np.linalg.norm(gradient) * np.linalg.norm(direction)
        assert np.vdot(gradient, direction) == pytest.approx(slope, rel=1e-3, abs=1e-5 * size_of_slope)


@pytest.mark.parametrize("layer", ["conv1_2", "conv4_2", "block4_conv2", "conv5_3"])
def test_any_conv_layer_can_hold_the_content(untrained, layer):
    content, style, x = pictures(33, 40)
    objective = deepstyle.Objective(content, style, weights=untrained, content_layer=layer)
    paper = {"block4_conv2": "conv4_2"}.get(layer, layer)
    expected = oracle_loss(content, style, untrained, WEIGHTS, content_layer=paper)(x)
    assert objective(x)[0] == pytest.approx(expected, rel=1e-4)


def test_style_scale_multiplies_the_style_weight(untrained):
    content, style, x = pictures(32, 32)
    once = deepstyle.Objective(content, style, weights=untrained).evaluate(x)
    scaled = deepstyle.Objective(content, style, weights=untrained, style_scale=2.5).evaluate(x)
    assert scaled.losses.style == pytest.approx(2.5 * once.losses.style, rel=1e-6)
    assert scaled.losses.content == once.losses.content


def test_parts_add_up_to_the_loss(untrained):
    content, style, x = pictures(32, 32)
    evaluation = deepstyle.Objective(content, style, weights=untrained).evaluate(x)
    layers = [f"style {name}" for name in STYLE_LAYERS]
    assert list(evaluation.parts) == ["content conv5_2", *layers, "total variation"]
    assert evaluation.loss == evaluation.losses.total == sum(evaluation.parts.values())
    assert evaluation.losses.content == evaluation.parts["content conv5_2"]
    assert evaluation.losses.style == sum(evaluation.parts[name] for name in layers)
    assert evaluation.losses.variation == evaluation.parts["total variation"]
    assert min(evaluation.parts.values()) > 0


def test_content_picture_has_no_content_loss(untrained):
    content, style, _ = pictures(32, 32)
    evaluation = deepstyle.Objective(content, style, weights=untrained).evaluate(to_input_space(content))
    assert evaluation.losses.content == pytest.approx(0, abs=1e-6 * evaluation.losses.style)


def test_the_same_x_has_the_same_gradient_bit_for_bit():
    # As large as this, and on all cores, since TensorFlow reorders sums only where much memory is at stake.
    script = """
import conftest, deepstyle
from test_objective import pictures
with conftest.full_width():
    content, style, x = pictures(256, 384)
    objective = deepstyle.Objective(content, style, weights="random")
    print(len({objective(x)[1].tobytes() for _ in range(8)}))
"""
    environment = {name: value for name, value in for_scripts().items() if name not in ONE_THREAD}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("1\n", "")


def test_targets_are_computed_once_and_no_layer_below_the_need_is_built(untrained, monkeypatch):
    content, style, x = pictures(32, 32)
    asked = []
    features = deepstyle.features

    def spy(x, network, layers, pool_type):
        asked.append(set(layers))
        found = dict(features(x, network, layers, pool_type))
        assert set(found) == set(layers)
        return iter(found.items())

    monkeypatch.setattr(deepstyle, "features", spy)
    deepstyle.compiled.cache_clear()  # what an objective like this one has compiled
    objective = deepstyle.Objective(content, style, weights=untrained)
    for _ in range(3):
        objective(x)
    # One each for the targets, and one tracing of the loss that three evaluations share.
    assert asked == [{"conv5_2"}, set(STYLE_LAYERS), {"conv5_2", *STYLE_LAYERS}]
    network = on_device(untrained, "zeros")
    shallow = {name: network[name] for name in ("conv1_1", "conv1_2", "conv2_1")}
    shallow["conv2_2"] = (cast(Any, None), None)  # not to be computed
    assert set(dict(features(to_input_space(content), shallow, ["conv2_1"], "ave"))) == {"conv2_1"}


def test_what_is_no_picture_is_refused(untrained):
    content, style, _ = pictures(32, 32)
    with pytest.raises(
        deepstyle.UserError, match=r"the style picture's shape is \(32, 32\); it must be an array of uint8"
    ):
        deepstyle.Objective(content, style[..., 0], weights=untrained)


@pytest.mark.parametrize("way", [Way(True), Way(False), Way(True, True), Way(False, True)])
@pytest.mark.parametrize("size", [(2, 2), (5, 3)])
def test_a_convolution_continues_the_picture_by_its_edge_and_so_does_its_gradient(monkeypatch, size, way):
    monkeypatch.setattr(convolution, "way_of", lambda factors: way)
    draw = np.random.default_rng(0).normal
    x, kernel = np.float32(draw(size=(1, *size, 4))), np.float32(draw(size=(3, 3, 4, 6)))
    upstream = np.float32(draw(size=(*size, 6)))
    tensors = kernel_on_device(kernel, "edge")
    expected = oracle.convolve(x[0].astype(np.float64), kernel, 0, "edge")
    to_tensor = import_keras().ops.convert_to_tensor
    np.testing.assert_allclose(as_array(convolve(to_tensor(x), tensors)[0]), expected, atol=1e-5)

    def summed(x):
        return {"sum": import_keras().ops.sum(convolve(x, tensors)[0] * to_tensor(upstream))}

    _, gradient = differentiable(summed)(x)
    units = np.eye(x.size).reshape(-1, *x.shape[1:])  # it is linear, so the slopes are the values at the units
    slopes = [(oracle.convolve(unit, kernel, 0, "edge") * upstream).sum() for unit in units]
    np.testing.assert_allclose(as_array(gradient).ravel(), slopes, atol=1e-5)


def test_convolutions_are_traced_as_they_are_computed_at_once(untrained, monkeypatch):
    ways, way_of = [], convolution.way_of

    def noted(factors):
        ways.append(way_of(factors))
        return ways[-1]

    monkeypatch.setattr(convolution, "way_of", noted)
    content, style, x = pictures(35, 37)  # a size that no other test has compiled
    deepstyle.Objective(content, style, weights=untrained)(x)
    assert {*ways} == {Way(transposed=True)}


def test_a_flat_picture_is_flat_to_its_border_with_edge_padding_only(untrained):
    flat = np.full((40, 48, 3), 90, np.uint8)
    for padding in ("zeros", "edge"):
        network = on_device(untrained, padding)
        found = dict(deepstyle.features(to_input_space(flat), network, ["conv3_1"], "ave"))
        f = np.asarray(found["conv3_1"])
        assert np.allclose(f, f[5, 5], rtol=1e-3, atol=1e-3 * f.max()) == (padding == "edge")


def test_only_the_things_that_were_asked_for_last_are_kept():
    made: list[str] = []
    cache = Cache(size=2)

    def make(key):
        made.append(key)
        return key.upper()

    for key in "abacbab":
        assert cache.get(key, functools.partial(make, key)) == key.upper()
    assert made == ["a", "b", "c", "b", "a"]


def at_first_stage(photo, style, weights, cache):
    """The objective of a photo of 32 rows, with an engine that has this cache; the style is shown as it is."""
    settings = deepstyle.Settings(image_size=32, style_size=32, style_fit="keep")
    (stage,) = deepstyle.stages_of(deepstyle.Pictures(photo, (style,)), settings)
    return deepstyle.Objective.at(stage, Engine(Plan(None, 10), weights, cache=cache), deepstyle.Watch())


def test_engines_with_one_cache_make_network_and_style_ready_once(untrained, monkeypatch):
    photos, style, cache, asked = (
        [smooth_picture(seed, 32, 48) for seed in (1, 3)],
        smooth_picture(2, 32, 48),
        Cache(),
        [],
    )
    features = deepstyle.features
    monkeypatch.setattr(deepstyle, "features", lambda *given: asked.append({*given[2]}) or features(*given))
    first, second = (at_first_stage(photo, style, untrained, cache) for photo in photos)
    assert asked == [{"conv5_2"}, {*STYLE_LAYERS}, {"conv5_2"}]
    for name, target in first.tiled.style.items():
        np.testing.assert_array_equal(second.tiled.style[name], target)
    networks = [objective.engine.cache.get("the network", lambda: None) for objective in (first, second)]
    assert networks[0] is networks[1] is not None


def test_a_whole_pictures_targets_go_to_the_device_once_and_are_gone_when_it_goes_on_in_tiles(untrained, monkeypatch):
    content, style, x = pictures(64, 48)
    objective = deepstyle.Objective(content, style, weights=untrained, content_mask=content)
    x = import_keras().ops.convert_to_tensor(x, "float32")
    first = objective.evaluate(x)
    sent: list[np.ndarray] = []
    to_tensors = backend.to_tensors

    def spy(structure):
        sent.extend(one for one in import_keras().tree.flatten(structure) if isinstance(one, np.ndarray))
        return to_tensors(structure)

    monkeypatch.setattr(backend, "to_tensors", spy)
    monkeypatch.setattr(engines, "to_tensors", spy)
    second = objective.evaluate(x)
    assert (sent, second.parts) == ([], first.parts)
    networks = objective.engine.cache.get("the network", lambda: None)
    tensors = weakref.ref(networks.targets[2].content["conv5_2"])
    objective.tile = 32
    assert objective.evaluate(x).parts == pytest.approx(first.parts, rel=1e-5)
    assert tensors() is None


def test_a_style_in_other_tiles_is_not_taken_for_the_same(untrained):
    wide, photos = smooth_picture(2, 32, 200), [smooth_picture(1, 32, columns) for columns in (32, 64)]
    cache = Cache()
    _, shared = (at_first_stage(photo, wide, untrained, cache) for photo in photos)
    alone = deepstyle.Objective(photos[1], wide, weights=untrained)
    for name, target in alone.tiled.style.items():
        np.testing.assert_array_equal(shared.tiled.style[name], target)
