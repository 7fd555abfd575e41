"""--precision mixed: convolutions whose factors are rounded, for as long as rounding does not stand in the way."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import Recorder, describe, evaluation_of, paint, pixels, run, smooth_picture

import deepstyle
from deepstyle import Pictures, Settings, State
from deepstyle_support import convolution, device, engine, lbfgs
from deepstyle_support.backend import as_array, import_keras
from deepstyle_support.convolution import FULL, Way, convolve, kernel_on_device, rounded_kernel
from deepstyle_support.engine import Engine
from deepstyle_support.images import to_input_space
from deepstyle_support.memory import Plan

CONTENT, STYLE = smooth_picture(1, 40, 48), smooth_picture(2, 40, 48)
PICTURES = Pictures(CONTENT, (STYLE,))


@pytest.fixture
def has_unit(monkeypatch):
    """As on a device that multiplies bfloat16 fastest; it is right on any, and only slow without."""
    monkeypatch.setattr(engine, "fastest_factors", lambda: "bfloat16")


@pytest.fixture
def has_none(monkeypatch):
    monkeypatch.setattr(engine, "fastest_factors", lambda: FULL)


def in_bfloat16(x):
    """x rounded to the nearest number with 8 bits, ties to even; (...) float64."""
    mantissa, exponent = np.frexp(np.asarray(x, np.float64))
    return np.ldexp(np.rint(mantissa * 256) / 256, exponent)


def convolved(x, kernel, mode):
    """The convolution of x, (H, W, in), by its definition, in float64; mode: of np.pad."""
    rows, columns, _ = x.shape
    around = np.pad(np.float64(x), [(1, 1), (1, 1), (0, 0)], mode)
    return sum(around[i : i + rows, j : j + columns] @ kernel[i, j] for i in range(3) for j in range(3))


@pytest.mark.parametrize("way", [Way(True), Way(False), Way(True, True), Way(False, True)])
@pytest.mark.parametrize(("padding", "mode"), [("zeros", "constant"), ("edge", "edge")])
def test_only_the_factors_and_the_sum_of_a_convolution_are_rounded(monkeypatch, padding, mode, way):
    monkeypatch.setattr(convolution, "way_of", lambda factors: way)
    random = np.random.default_rng(0)
    x, kernel = random.normal(0, 1, (9, 7, 40)), random.normal(0, 1, (3, 3, 40, 5)).astype(np.float32)
    tensor = import_keras().ops.convert_to_tensor(np.float32(x))[None]
    found = as_array(convolve(tensor, rounded_kernel(kernel_on_device(kernel, padding), "bfloat16"))[0])
    assert found.dtype == np.float32
    expected = convolved(in_bfloat16(np.float32(x)), in_bfloat16(kernel), mode)
    inner = slice(1, -1), slice(1, -1)
    # The inner ones are rounded once: were products added up in 8 bits, they would be off by several times that.
    assert np.abs(found - expected)[inner].max() <= np.abs(expected).max() / 2**8
    assert np.abs(found - expected).max() <= np.abs(expected).max() / 2**7  # those at the border twice
    exactly = convolved(x, kernel, mode)
    assert np.abs(found - exactly).max() > np.abs(exactly).max() / 2**12  # it is rounded indeed


@pytest.mark.parametrize(
    ("padding", "tile"),
    [("zeros", "off"), ("zeros", "32"), ("edge", "off"), pytest.param("edge", "32", marks=pytest.mark.endurance)],
)
def test_loss_and_gradient_are_near_those_in_full(untrained, has_unit, tile, padding):
    x = to_input_space(CONTENT) + np.random.default_rng(3).normal(0, 20, CONTENT.shape)
    in_full, mixed = (
        deepstyle.Objective(CONTENT, STYLE, weights=untrained, tile=tile, padding=padding, precision=precision)(x)
        for precision in ("full", "mixed")
    )
    assert mixed[0] != in_full[0]
    assert mixed[0] == pytest.approx(in_full[0], rel=0.01)
    assert np.linalg.norm(mixed[1] - in_full[1]) < 0.1 * np.linalg.norm(in_full[1])


def test_gram_matrices_are_not_rounded(untrained):
    from deepstyle_support.tiles import tiles_of

    terms = tuple(deepstyle.terms_of(PICTURES, Settings(), CONTENT.shape[:2], 0.025))
    tiled = deepstyle.TiledLoss(terms, {}, CONTENT.shape[:2], "ave", factors="bfloat16")
    networks = engine.Networks(untrained, "zeros")
    x = import_keras().ops.convert_to_tensor(to_input_space(CONTENT))
    (tile,) = tiles_of(CONTENT.shape[:2], 100, 1)
    layers = Settings().style_layers
    features = tiled.interior_features(networks, tile, x, layers)
    for place, gram in tiled.grams(networks, tile, x, tiled.places(deepstyle.STYLE)).items():
        flat = features[place.layer].reshape(-1, gram.shape[0]).astype(np.float64)
        np.testing.assert_allclose(gram, flat.T @ flat, rtol=1e-5, atol=1e-5 * np.abs(gram).max())


class Switches(Recorder):
    """It notes after how many evaluations it went on in full."""

    def __init__(self, most=10**9):
        super().__init__(most)
        self.switched = []

    def goes_on_in_full(self, size):
        self.switched.append(len(self.seen))


def painted(untrained, state=None, most=10**9, **options):
    """The iterations, and who watched them."""
    given = {"image_size": 40, "num_iter": 5, "optimizer": "device", "precision": "mixed", "tile": "off", **options}
    watch = Switches(most)
    return list(paint(PICTURES, Settings(**given), untrained, state, watch)), watch


def stopped_after(untrained, evaluations, **options):
    """The state of a run that was stopped there, as it is written and read again."""
    *_, last = painted(untrained, most=evaluations, **options)[0]
    arrays = lbfgs.to_arrays(last.state.curvature())
    return dataclasses.replace(last.state, curvature=lambda: lbfgs.from_arrays(arrays))


def loss_in_full(untrained, x):
    return deepstyle.Objective(CONTENT, STYLE, weights=untrained).evaluate(np.float64(x)).loss


@pytest.mark.parametrize("optimizer", ["device", "scipy"])
def test_a_run_ends_in_full_so_that_its_last_loss_is_the_true_one(untrained, has_unit, optimizer):
    iterations, watch = painted(untrained, optimizer=optimizer)
    (switch,) = watch.switched
    assert 80 <= switch < 90  # at the first point that is accepted after four fifths of the evaluations
    assert [iteration.state.in_full for iteration in iterations] == [False, False, False, True, True]
    true = [loss_in_full(untrained, iteration.state.x) for iteration in iterations]
    assert iterations[-1].loss == pytest.approx(true[-1], rel=1e-5)
    assert iterations[0].loss != pytest.approx(true[0], rel=1e-5)  # rounded, and so seen to be
    assert np.all(np.diff(true) < 0)


def test_the_last_fifth_begins_at_a_whole_evaluation():
    for iterations in range(1, 100):  # of 3, for one, 0.8 * 3 * 20 is 48.00000000000001
        *_, full = deepstyle.stages_of(PICTURES, Settings(image_size=40, num_iter=iterations))
        assert full.full_from == 16 * iterations


def test_a_coarse_size_is_rounded_to_its_end(untrained, has_unit):
    iterations, watch = painted(untrained, image_size=64, scales=2, coarse_iter=2, num_iter=2)
    assert [iteration.state.in_full for iteration in iterations] == [False, False, False, True]
    assert len(watch.switched) == 1


def test_an_end_by_improvement_comes_in_full(untrained, has_unit):
    minimum = {"num_iter": 50, "min_improvement": 20.0}
    iterations, _ = painted(untrained, **minimum)
    assert len(iterations) < 10
    # In the last but one its two losses were computed in two ways: the end is judged by the last.
    assert [iteration.state.in_full for iteration in iterations[-3:]] == [False, True, True]
    assert iterations[-1].loss == pytest.approx(loss_in_full(untrained, iterations[-1].state.x), rel=1e-5)
    for number in (-3, -2):
        state = stopped_after(untrained, iterations[number].state.evaluations, **minimum)
        again, _ = painted(untrained, state, **minimum)
        assert [iteration.loss for iteration in again] == [iteration.loss for iteration in iterations[number + 1 :]]


def test_the_switch_ends_no_run_though_the_loss_in_full_is_higher():
    losses = [deepstyle.Losses(total, 0.0, 0.0, total) for total in (4.0, 3.0, 2.0, 1.0, 1.1)]  # the last in full
    state = State(np.zeros((32, 32, 3)), tuple(losses), rounded=4)
    assert not deepstyle.has_enough(state, Settings())
    assert not deepstyle.has_enough(state, Settings(min_improvement=1.0))
    assert deepstyle.has_enough(dataclasses.replace(state, rounded=0), Settings(min_improvement=1.0))


def test_even_a_single_iteration_ends_in_full(untrained, has_unit):
    (only,), watch = painted(untrained, num_iter=1)
    assert len(watch.switched) == 1
    assert only.loss == pytest.approx(loss_in_full(untrained, only.state.x), rel=1e-5)


class Rough:
    """sum a x^2, whose gradient, as long as it is rounded, has the wrong sign from the 10th evaluation on."""

    size, rounds, full_from = (4, 4), True, np.inf

    def __init__(self):
        self.calls, self.in_full, self.switches = 0, False, []

    def go_on_in_full(self):
        self.in_full = True
        self.switches.append(self.calls)

    def evaluate(self, x):
        self.calls += 1
        scale = np.arange(1, 49, dtype=np.float32).reshape(4, 4, 3) ** 2
        x = as_array(x)
        gradient = 2 * scale * x * (-1 if self.calls >= 10 and not self.in_full else 1)
        loss = float(np.sum(scale * np.float64(x) ** 2))
        return evaluation_of(
            loss, gradient if x.dtype == np.float64 else import_keras().ops.convert_to_tensor(gradient)
        )


@pytest.mark.parametrize("optimizer", ["device", "scipy"])
def test_where_rounding_stands_in_the_way_it_goes_on_in_full(optimizer):
    function = Rough()
    points = list(deepstyle.minimise(function, State(np.full((4, 4, 3), 50.0)), optimizer))
    (switch,) = function.switches
    assert switch < 60  # a line search that failed, or two, and no more
    assert points[-1].evaluation.loss < 1e-3
    assert points[-1].evaluation.in_full


@pytest.mark.parametrize("after", [-1, 0, 2, *(pytest.param(n, marks=pytest.mark.endurance) for n in (-30, 1, 8))])
def test_a_run_that_goes_on_knows_in_which_precision_it_was(untrained, has_unit, after):
    unbroken, watch = painted(untrained)
    state = stopped_after(untrained, watch.switched[0] + after)
    second, again = painted(untrained, state)
    assert state.in_full == (not again.switched) == (after > 0)
    assert second[-1].number == 5
    by_number = {iteration.number: iteration for iteration in unbroken}
    for iteration in second:
        np.testing.assert_array_equal(iteration.state.x, by_number[iteration.number].state.x)
        assert iteration.loss == by_number[iteration.number].loss


# ------------------------------------------------------------------------------------------- the command

FLAGS = "--optimizer", "device", "--precision", "mixed"


def test_the_command_says_what_is_rounded_and_until_when(picture_files, tmp_path, has_unit, capsys):
    assert run(picture_files, tmp_path / "a", *FLAGS) == 0
    first, _, _, *lines = capsys.readouterr().out.splitlines()
    assert first.endswith(" with tensorflow, convolutions in bfloat16")
    assert [line.split(":")[0] for line in lines] == [
        "iteration 1/2",
        "from here on convolutions in float32",
        "iteration 2/2",
    ]


@pytest.mark.parametrize(("flags", "said"), [("mixed", "tensorflow, convolutions in float32"),
                                             ("auto", "tensorflow"), ("full", "tensorflow")])  # fmt: skip
def test_a_device_without_such_a_unit_computes_in_full(picture_files, tmp_path, has_none, capsys, flags, said):
    assert run(picture_files, tmp_path / "a", "--precision", flags) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith(f" with {said}")
    assert run(picture_files, tmp_path / "b") == 0
    np.testing.assert_array_equal(pixels(tmp_path / "a_at_iteration_2.png"), pixels(tmp_path / "b_at_iteration_2.png"))
    assert "--precision" not in describe(tmp_path / "a_at_iteration_2.png", capsys)


@pytest.mark.parametrize("precision", ["mixed", "auto"])
def test_a_pictures_text_has_the_flag_that_makes_it_again(picture_files, tmp_path, has_unit, capsys, precision):
    assert run(picture_files, tmp_path / "a", "--optimizer", "device", "--precision", precision) == 0
    said = describe(tmp_path / "a_at_iteration_2.png", capsys)
    assert "this makes it again" in said
    assert "--precision mixed" in said
    assert run(picture_files, tmp_path / "b", *FLAGS) == 0
    np.testing.assert_array_equal(pixels(tmp_path / "a_at_iteration_2.png"), pixels(tmp_path / "b_at_iteration_2.png"))


def test_resume_to_another_end_is_not_called_exact(picture_files, tmp_path, has_unit, capsys):
    assert run(picture_files, tmp_path / "a", *FLAGS, "--num_iter", 2) == 0
    capsys.readouterr()
    assert run(picture_files, tmp_path / "a", *FLAGS, "--num_iter", 3, "--resume") == 0
    said = capsys.readouterr().out
    assert "bfloat16" not in said  # it was in full already, and stays so
    assert "from here on" not in said
    assert "comes close to it" in describe(tmp_path / "a_at_iteration_3.png", capsys)


@pytest.mark.parametrize(
    ("units", "factors"),
    [(("avx2", "avx512f"), FULL), (("avx512f", "avx512_bf16"), "bfloat16"), (("amx_bf16",), "bfloat16"), (None, FULL)],
)
def test_the_processors_units_decide_on_a_cpu(monkeypatch, units, factors):
    monkeypatch.setattr(device, "arithmetic_units", lambda: units)
    assert device.fastest_factors.__wrapped__() == factors


def test_with_jax_a_processors_unit_is_no_use(monkeypatch):
    jax = SimpleNamespace(backend=SimpleNamespace(backend=lambda: "jax"))
    monkeypatch.setattr(device, "import_keras", lambda: jax)
    monkeypatch.setattr(device, "arithmetic_units", lambda: ("avx512_bf16",))
    assert not device.cpu_multiplies_bfloat16()


def test_the_first_convolutions_of_two_blocks_are_never_rounded(untrained):
    networks = engine.Networks(untrained, "zeros")
    kinds = {name: str(kernel.forward.dtype) for name, (kernel, _) in networks["bfloat16"].items()}
    assert "float32" in kinds.pop("conv1_1")
    assert "float32" in kinds.pop("conv2_1")
    assert all("bfloat16" in kind for kind in kinds.values())


@pytest.mark.parametrize("precision", ["full", "mixed"])
def test_a_picture_has_no_loss_against_itself(untrained, has_unit, precision):
    # What it is compared with comes from the network that is rounded alike: else half of a late loss is rounding.
    objective = deepstyle.Objective(CONTENT, CONTENT, weights=untrained, precision=precision)
    losses = objective.evaluate(to_input_space(CONTENT)).losses
    assert losses.content == 0
    assert losses.style < 1e-9 * deepstyle.Objective(CONTENT, STYLE, weights=untrained)(to_input_space(CONTENT))[0]


def test_an_engine_rounds_nothing_unless_it_is_asked_to(untrained, has_unit):
    made = Engine(Plan(None, 10), untrained)
    assert [made.factors(precision) for precision in ("full", "mixed", "auto")] == [FULL, "bfloat16", "bfloat16"]
    objective = deepstyle.Objective(CONTENT, STYLE, weights=untrained, precision="mixed")
    objective(to_input_space(CONTENT))
    assert objective.engine.cache.get("the network", dict).keys() == {FULL, "bfloat16"}
    objective = deepstyle.Objective(CONTENT, STYLE, weights=untrained)
    objective(to_input_space(CONTENT))
    assert objective.engine.cache.get("the network", dict).keys() == {FULL}
