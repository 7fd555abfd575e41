"""L-BFGS on the device: against the two-loop recursion in float64, on hard functions, and resumed to the bit."""

import dataclasses
import itertools
import math
import os
import signal

import numpy as np
import pytest
from conftest import SMALL, Recorder, describe, evaluation_of, paint, pixels, smooth_picture
from scipy import optimize

import deepstyle
from deepstyle import Pictures, Settings, State
from deepstyle_app.command import main
from deepstyle_support import lbfgs, rounding
from deepstyle_support.backend import as_array, import_keras
from deepstyle_support.lbfgs import Curvature, Point, combination, device_lbfgs, dot_products


def tensor(x):
    return import_keras().ops.convert_to_tensor(np.float32(x))


class OnDevice:
    """A function of arrays, x -> (loss, gradient), in the place of the objective; it counts its evaluations."""

    size, rounds, full_from = (10, 10), False, math.inf

    def __init__(self, function):
        self.function, self.calls = function, 0

    def evaluate(self, x):
        self.calls += 1
        loss, gradient = self.function(as_array(x).astype(np.float64))
        return evaluation_of(float(loss), tensor(gradient))


def rosenbrock(x):
    return optimize.rosen(x.ravel()), optimize.rosen_der(x.ravel()).reshape(x.shape)


def quadratic(condition, shape=(10, 10, 3)):
    scale = np.geomspace(1 / condition, 1, math.prod(shape)).reshape(shape)
    return lambda x: (float(np.sum(scale * x**2) / 2), scale * x)


def least_after(function, start, evaluations, history=10):
    """The last loss, when so many evaluations are done or the optimiser has ended."""
    on_device, loss = OnDevice(function), math.nan
    for _, evaluation, _ in device_lbfgs(on_device.evaluate, start, history):
        loss = evaluation.loss
        if on_device.calls >= evaluations:
            break
    return loss


def two_loops(gradient, steps, changes):
    """Algorithm 7.4 of Nocedal & Wright, in float64."""
    q, alphas = gradient.copy(), []
    for s, y in zip(reversed(steps), reversed(changes), strict=True):
        alphas.append(np.sum(s * q) / np.sum(s * y))
        q -= alphas[-1] * y
    q *= np.sum(steps[-1] * changes[-1]) / np.sum(changes[-1] ** 2)
    for s, y, alpha in zip(steps, changes, reversed(alphas), strict=True):
        q += (alpha - np.sum(y * q) / np.sum(s * y)) * s
    return q


def test_the_direction_is_that_of_the_two_loop_recursion():
    random, (_, slope) = np.random.default_rng(0), (None, quadratic(30.0))
    points = [random.normal(size=(10, 10, 3)) for _ in range(8)]
    gradients = [slope(x)[1] for x in points]
    curvature = Curvature()
    for history in (3, 5):
        curvature = Curvature()
        for before, here in itertools.pairwise(zip(points, gradients, strict=True)):
            curvature = curvature.after(Point(*map(tensor, before)), Point(*map(tensor, here)), history)
        assert len(curvature.steps) == len(curvature.changes) == history
        steps = [b - a for a, b in itertools.pairwise(points)][-history:]
        changes = [b - a for a, b in itertools.pairwise(gradients)][-history:]
        direction = as_array(curvature.direction(tensor(gradients[-1]), history))
        expected = -two_loops(gradients[-1], steps, changes)
        np.testing.assert_allclose(direction, expected, atol=2e-5 * np.abs(expected).max())


def test_nothing_is_learnt_where_the_loss_is_not_convex():
    a, b, gradient = (np.random.default_rng(n).normal(size=(4, 4, 3)) for n in range(3))
    known = Curvature().after(Point(tensor(a), tensor(a)), Point(tensor(b), tensor(b)), 5)
    here = Point(tensor(a), tensor(gradient))
    # The gradient falls along the step, so that s.y is negative.
    same = known.after(Point(tensor(b), tensor(gradient + (a - b))), here, 5)
    assert same.steps == known.steps
    assert same.by_gradient[0, 0] == pytest.approx(np.sum((b - a) * gradient), rel=1e-5)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_dot_products_of_millions_of_terms_lose_nothing(monkeypatch, on_cpu):
    monkeypatch.setattr(lbfgs, "on_cpu", lambda: on_cpu)
    # Added one after another in float32, ones stop at 2^24.
    random = np.random.default_rng(0)
    many = random.uniform(0.5, 1.5, (2400, 2400, 3)).astype(np.float32)
    exact = np.sum(many.astype(np.float64) ** 2)
    assert many.size > 2**24
    (found,) = dot_products((tensor(many),), tensor(many))
    assert found == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_sum_of_vectors_in_more_slots_is_the_same(monkeypatch, on_cpu):
    monkeypatch.setattr(lbfgs, "on_cpu", lambda: on_cpu)
    vectors = [np.random.default_rng(n).normal(size=(4, 5, 3)) for n in range(3)]
    expected = 2 * vectors[0] - vectors[1] + 0.5 * vectors[2]
    for slots in (0, 3, 7):
        found = as_array(combination([*map(tensor, vectors)], (2, -1, 0.5), slots))
        np.testing.assert_allclose(found, expected, atol=1e-6)
        products = dot_products([*map(tensor, vectors)], tensor(vectors[0]), slots)
        np.testing.assert_allclose(products, [np.sum(v * vectors[0]) for v in vectors], atol=1e-5)


@pytest.mark.parametrize(
    ("function", "start"),
    [
        (rosenbrock, np.linspace(-2, 2, 300).reshape(10, 10, 3)),
        (quadratic(1e6), 50 * np.random.default_rng(0).normal(size=(10, 10, 3))),
    ],
    ids=["rosenbrock", "condition 1e6"],
)
def test_it_is_as_good_as_scipys(function, start):
    def of_flat(flat):
        loss, gradient = function(flat.reshape(start.shape))
        return loss, gradient.ravel()

    options = {"maxfun": 200, "maxiter": 200, "ftol": 0, "gtol": 0}
    scipys = optimize.minimize(of_flat, start.ravel(), jac=True, method="L-BFGS-B", options=options)
    assert least_after(function, start, 200) < 1.1 * scipys.fun


def test_it_reaches_the_minimum_and_ends():
    assert least_after(quadratic(100.0), 50 * np.ones((10, 10, 3)), 2000) < 1e-9
    assert least_after(rosenbrock, np.zeros((2, 2, 3)), 2000) < 1e-6


def test_a_gradient_with_noise_ends_where_noise_begins():
    random = np.random.default_rng(0)

    def noisy(x):
        loss, gradient = quadratic(10.0)(x)
        return np.float32(1e3 + loss), gradient + 1e-4 * random.normal(size=x.shape)

    assert least_after(noisy, np.ones((10, 10, 3)), 3000) < 1e3 + 1e-2


def test_a_start_at_the_minimum_is_the_result():
    function = OnDevice(quadratic(10.0, (2, 2, 3)))
    points = list(deepstyle.minimise(function, State(np.zeros((2, 2, 3))), "device"))
    assert len(points) == 2  # the start, and as the only result the start again
    assert function.calls == 1


def test_what_is_no_number_on_the_way_is_stepped_back_from():
    def holed(x):
        return (math.nan, x) if np.abs(x).max() > 40 else quadratic(100.0)(x)

    assert least_after(holed, 30 * np.ones((10, 10, 3)), 400) < 1e-6


def test_a_gradient_whose_square_is_beyond_float32_is_an_error_and_no_end():
    with pytest.raises(deepstyle.UserError, match="too large for L-BFGS in float32; lower the weights"):
        least_after(lambda x: (1e25, np.full(x.shape, 1e20)), np.ones((10, 10, 3)), 10)


def test_the_first_step_changes_no_pixel_by_more_than_twenty_levels():
    asked = []

    def steep(x):
        asked.append(x)
        return quadratic(1.0)(1000 * x)

    points = device_lbfgs(OnDevice(steep).evaluate, np.ones((10, 10, 3)), 5)
    next(points), next(points)
    assert np.abs(asked[1] - asked[0]).max() == pytest.approx(lbfgs.FIRST_STEP)


def painted(untrained, state=None, most=math.inf, **options):
    """All iterations, from a state maybe, stopped after so many evaluations; and the curvature at the end."""
    pictures = Pictures(smooth_picture(1, 40, 48), (smooth_picture(2, 40, 32),))
    settings = Settings(image_size=40, **{"optimizer": "device", "num_iter": 3, **options})
    iterations = list(paint(pictures, settings, untrained, state, Recorder(most)))
    return iterations, iterations[-1].state.curvature()


@pytest.mark.parametrize("tile", ["off", "32"])
def test_whole_and_in_tiles_it_is_as_good_as_scipys(untrained, tile):
    (device,), _ = painted(untrained, num_iter=1, tile=tile)
    (scipys,), _ = painted(untrained, num_iter=1, tile=tile, optimizer="scipy")
    assert device.loss < 1.05 * scipys.loss
    assert device.state.x.dtype == np.float32


@pytest.mark.parametrize("stop_at", [20, 27, 40])
def test_a_run_that_goes_on_is_as_if_it_had_never_been_stopped(untrained, stop_at):
    unbroken, _ = painted(untrained)
    first, curvature = painted(untrained, most=stop_at)
    assert curvature.steps
    state = first[-1].state
    arrays = lbfgs.to_arrays(curvature)  # as they are written, and read again
    second, _ = painted(untrained, dataclasses.replace(state, curvature=lambda: lbfgs.from_arrays(arrays)))
    assert [i.number for i in second][-1] == 3
    by_number = {i.number: i for i in unbroken}
    for iteration in second:
        np.testing.assert_array_equal(iteration.state.x, by_number[iteration.number].state.x)
        assert iteration.state.evaluations == by_number[iteration.number].state.evaluations
        assert iteration.loss == by_number[iteration.number].loss


def test_a_run_that_goes_on_with_fewer_corrections_keeps_the_newest(untrained):
    first, before = painted(untrained, num_iter=1)
    _, curvature = painted(untrained, first[-1].state, num_iter=2, history=4)
    assert (len(before.steps), len(curvature.steps)) == (10, 4)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "makes it again"),
        (["--history", "4"], "comes close to it"),
        (["--tile", "32"], "comes close to it"),
        (["--optimizer", "scipy"], "comes close to it"),
    ],
    ids=" ".join,
)
def test_a_run_that_goes_on_in_another_way_is_not_called_exact(picture_files, tmp_path, capsys, flags, said):
    size = ["--image_size", "64", "--tile", "off"]
    assert run_small(picture_files, tmp_path / "out", *size, "--num_iter", "1") == 0
    assert "this makes it again" in describe(tmp_path / "out" / "result_image_at_iteration_1.png", capsys)
    assert run_small(picture_files, tmp_path / "out", *size, "--num_iter", "2", "--resume", *flags) == 0
    assert f"this {said}" in describe(tmp_path / "out" / "result_image_at_iteration_2.png", capsys)


@pytest.mark.parametrize("name", ["CPU cores", "processor", "packages", "environment"])
def test_what_rounds_otherwise_is_another_way_and_the_description_says_so(
    picture_files, tmp_path, capsys, monkeypatch, name
):
    assert run_small(picture_files, tmp_path / "out", "--image_size", "32", "--num_iter", "1") == 0
    other = rounding.computed_with("tensorflow", deepstyle.__version__) | {name: "another"}
    first = tmp_path / "out" / "result_image_at_iteration_1.png"
    capsys.readouterr()
    assert main(["--describe", str(first)]) == 0
    assert "this makes it again" in capsys.readouterr().out
    for module in ("recipe", "run"):
        monkeypatch.setattr(f"deepstyle_app.{module}.computed_with", lambda backend, version: other)
    assert main(["--describe", str(first)]) == 0
    said = capsys.readouterr().out
    assert f"comes close to it, not bit for bit, since it was computed otherwise ({name}: " in said
    assert "; now another)" in said
    assert run_small(picture_files, tmp_path / "out", "--image_size", "32", "--num_iter", "2", "--resume") == 0
    capsys.readouterr()
    assert main(["--describe", str(first.with_name("result_image_at_iteration_2.png"))]) == 0
    assert "comes close to it, not bit for bit, since the run was stopped" in capsys.readouterr().out


def run_small(picture_files, folder, *flags):
    return main([*picture_files, f"{folder}/", *SMALL, "--optimizer", "device", *flags])


def pixels_of(folder, number):
    return pixels(folder / f"result_image_at_iteration_{number}.png")


@pytest.mark.parametrize("scales", ["1", "2"])
def test_the_command_goes_on_to_the_bit_and_says_so(picture_files, tmp_path, capsys, scales):
    flags = ["--image_size", "64", "--scales", scales, "--coarse_iter", "1", "--tile", "off"]
    for end in ("1", "2", "3"):
        assert run_small(picture_files, tmp_path / "parts", *flags, "--num_iter", end, "--resume") == 0
    assert run_small(picture_files, tmp_path / "once", *flags, "--num_iter", "3") == 0
    for number in (1, 2, 3):
        np.testing.assert_array_equal(pixels_of(tmp_path / "parts", number), pixels_of(tmp_path / "once", number))
    capsys.readouterr()
    main(["--describe", str(tmp_path / "parts" / "result_image_at_iteration_3.png")])
    said = capsys.readouterr().out
    assert "makes it again" in said
    assert "--optimizer device" in said


def test_the_command_stopped_within_an_iteration_goes_on_to_the_bit_and_says_so(
    picture_files, tmp_path, capsys, monkeypatch
):
    flags = ["--image_size", "64", "--tile", "off", "--num_iter", "3"]
    assert run_small(picture_files, tmp_path / "once", *flags) == 0
    evaluate, calls = deepstyle.Objective.evaluate, []

    def stop(self, x):
        calls.append(x)
        if len(calls) == 27:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, x)

    with monkeypatch.context() as stopped:
        stopped.setattr(deepstyle.Objective, "evaluate", stop)
        assert run_small(picture_files, tmp_path / "parts", *flags) == 143
    # What comes of a part of an iteration is no picture that the command makes again.
    assert "this comes close to it" in describe(tmp_path / "parts" / "result_image_at_iteration_2.png", capsys)
    assert run_small(picture_files, tmp_path / "parts", *flags, "--resume") == 0
    for number in (1, 2, 3):
        np.testing.assert_array_equal(pixels_of(tmp_path / "parts", number), pixels_of(tmp_path / "once", number))
        path = tmp_path / "parts" / f"result_image_at_iteration_{number}.png"
        assert "this makes it again" in describe(path, capsys)


def test_after_a_kill_the_last_state_is_gone_on_with_and_not_called_exact(picture_files, tmp_path, capsys, monkeypatch):
    from deepstyle_app.files import Outputs

    with monkeypatch.context() as killed:
        killed.setattr(Outputs, "finish", lambda self: [])  # what a kill leaves out
        assert run_small(picture_files, tmp_path / "out", "--num_iter", "1") == 0
    assert run_small(picture_files, tmp_path / "out", "--num_iter", "2", "--resume") == 0
    capsys.readouterr()
    main(["--describe", str(tmp_path / "out" / "result_image_at_iteration_2.png")])
    assert "comes close to it" in capsys.readouterr().out


def test_what_was_learnt_in_another_way_is_gone_on_with(picture_files, tmp_path):
    for folder in ("once", "parts"):
        assert run_small(picture_files, tmp_path / folder, "--num_iter", "1") == 0
    path = tmp_path / "parts" / "result_image_state.npz"
    with np.load(path) as state:
        contents = dict(state) | {"way": ""}  # as workers leave it, or a run that was out of memory once
    np.savez(path, **contents)
    for folder in ("once", "parts"):
        assert run_small(picture_files, tmp_path / folder, "--num_iter", "2", "--resume") == 0
    np.testing.assert_array_equal(pixels_of(tmp_path / "once", 2), pixels_of(tmp_path / "parts", 2))


def test_of_gigabytes_nothing_is_kept_and_that_is_said(picture_files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lbfgs, "MAX_KEPT", 1000)
    assert run_small(picture_files, tmp_path / "out", "--num_iter", "1") == 0
    said = capsys.readouterr().out
    assert said.index("is not kept") < said.index("iteration 1/1")
    with np.load(tmp_path / "out" / "result_image_state.npz") as state:
        assert "step_0" not in state


def test_a_state_whose_curvature_is_damaged_is_one_line(picture_files, tmp_path, capsys):
    assert run_small(picture_files, tmp_path / "out", "--num_iter", "1") == 0
    path = tmp_path / "out" / "result_image_state.npz"
    with np.load(path) as state:
        contents = {name: state[name] for name in state if name != "step_0"}
    np.savez(path, **contents)
    assert run_small(picture_files, tmp_path / "out", "--num_iter", "2", "--resume") == 2
    assert "is damaged" in capsys.readouterr().err
