"""L-BFGS run once, seen through a generator; the rules for stopping."""

import functools
import itertools
import math
import os
import signal
import threading
import time

import numpy as np
import pytest
from conftest import Recorder, evaluation_of, paint, smooth_picture
from scipy import optimize

import deepstyle
from deepstyle import Pictures, Settings, State, UserError, minimise, stages_of
from deepstyle_support.engine import Engine
from deepstyle_support.images import MEAN_BGR, enlarge, resize
from deepstyle_support.lbfgs import scipy_lbfgs
from deepstyle_support.memory import Plan


class Rosenbrock:
    """A hard function in the place of the objective; it remembers every point it was asked for."""

    size, rounds, full_from = (4, 4), False, math.inf

    def __init__(self):
        self.asked = []

    def evaluate(self, x):
        self.asked.append(np.array(x))
        flat = np.ravel(x)
        loss = optimize.rosen(flat)
        return evaluation_of(loss, optimize.rosen_der(flat).reshape(x.shape))


START = np.linspace(-2, 2, 48).reshape(4, 4, 3)
UNIT = 32  # of x as SciPy is told it, a power of two near 5 * sqrt(48): a step of length 1 is 5 grey levels a pixel
STEEPNESS = 2**19  # by which the loss is divided, so that its gradient there has about the length 1


def minimised(function, start=START, watch=None, **options):
    return minimise(function, State(start), watch=watch, **options)


def accepted_points(function, count):
    """The start and the first `count` accepted points."""
    generator = minimised(function)
    points = [next(generator) for _ in range(count + 1)]
    generator.close()
    return points


def test_points_are_those_of_one_uninterrupted_lbfgs():
    function, accepted, evaluations = Rosenbrock(), [], []

    def callback(intermediate_result):
        accepted.append(UNIT * intermediate_result.x)
        evaluations.append(len(function.asked))

    def rosen(flat):
        function.evaluate(UNIT * flat)
        return optimize.rosen(UNIT * flat) / STEEPNESS, UNIT * optimize.rosen_der(UNIT * flat) / STEEPNESS

    def solve(**tests):
        options = {"maxfun": 100_000, "maxiter": 100_000, **tests}
        optimize.minimize(rosen, START.ravel() / UNIT, jac=True, method="L-BFGS-B", callback=callback, options=options)

    solve()
    where_scipy_would_end = len(function.asked)
    function.asked.clear(), accepted.clear(), evaluations.clear()
    solve(ftol=0, gtol=0)
    count = len(function.asked) // 20 - 1
    assert 20 * count > where_scipy_would_end
    expected = [next(x for x, n in zip(accepted, evaluations, strict=True) if n >= 20 * (i + 1)) for i in range(count)]

    points = accepted_points(Rosenbrock(), count)
    np.testing.assert_array_equal(points[0].x, START)
    for point, x in zip(points[1:], expected, strict=True):
        np.testing.assert_array_equal(point.x.ravel(), x)


def test_a_gradient_that_somebody_keeps_stays_as_it_was():
    kept = []

    def evaluate(x):
        kept.append((x.copy(), evaluation_of(float(np.square(x).sum()), 2 * x)))
        return kept[-1][1]

    list(itertools.islice(scipy_lbfgs(evaluate, START, 5), 3))
    assert len(kept) > 2
    for x, evaluation in kept:
        np.testing.assert_array_equal(evaluation.gradient, 2 * x)


def test_scipys_first_step_moves_a_pixel_by_some_grey_levels():
    """And not by 0.002, from which it would take five evaluations to find out how far to go."""

    def steep(x):
        asked.append(x)
        return evaluation_of(1e9 * float(np.square(x).sum()), 2e9 * x)

    for pixels in (1, 100, 1000):
        asked: list = []
        points = scipy_lbfgs(steep, np.full((pixels, 4, 3), 100.0), 5)
        next(points), next(points)
        assert 3.5 < math.sqrt(np.square(asked[1] - asked[0]).mean()) < 7.1


def test_scipy_is_told_a_gradient_of_length_one_at_the_start(monkeypatch):
    """Where it forgets what it has learnt it goes as far as the gradient is long: in grey levels, not in billions."""
    told = []

    def plane(steepness, x):
        return evaluation_of(steepness, steepness * x)

    def look(fun, start, jac, **options):
        found = fun(start)
        told.append(np.linalg.norm(jac(start)))
        return optimize.OptimizeResult(x=start, fun=found)

    monkeypatch.setattr(optimize, "minimize", look)
    for steepness in (1e-9, 1.0, 1e12):
        evaluate = functools.partial(plane, steepness)
        assert len(list(scipy_lbfgs(evaluate, np.full((20, 20, 3), 100.0), 5))) == 1
    assert all(0.7 < length < 1.5 for length in told)
    assert len(told) == 9  # each is started again twice


def test_an_iteration_is_twenty_evaluations():
    function, counts = Rosenbrock(), []
    for _, number in zip(minimised(function), range(6), strict=False):
        counts.append(len(function.asked))
        assert 0 <= counts[-1] - max(1, 20 * number) <= 5  # the line search under way is finished


def test_what_comes_with_a_point_belongs_to_it():
    for point in accepted_points(Rosenbrock(), 8):
        assert point.evaluation.loss == optimize.rosen(point.x.ravel())


def test_the_watch_sees_every_evaluation():
    watch = Recorder()
    generator = minimised(Rosenbrock(), START, watch)
    next(generator)
    next(generator)
    generator.close()
    assert [(size, count) for size, count, _ in watch.seen] == [((4, 4), n + 1) for n in range(len(watch.seen))]
    assert watch.seen[0][2] == optimize.rosen(START.ravel())


class Parabola:
    """sum x^2, whose gradient has the wrong sign at the calls in `wrong`: line searches fail there."""

    size, rounds, full_from = (4, 4), False, math.inf

    def __init__(self, wrong=()):
        self.calls, self.wrong = 0, wrong

    def evaluate(self, x):
        self.calls += 1
        sign = -1 if self.calls in self.wrong else 1
        scale = np.arange(1, x.size + 1).reshape(x.shape) ** 2
        loss = float(np.sum(scale * x**2))
        return evaluation_of(loss, sign * 2 * scale * x)


def test_a_failed_line_search_starts_the_optimiser_again():
    # Told at the start to go uphill, SciPy gives up without one step.
    function = Parabola(wrong={1})

    def parabola(flat):
        evaluation = function.evaluate(flat)
        return evaluation.loss, evaluation.gradient

    alone = optimize.minimize(parabola, START.ravel() + 3, jac=True, method="L-BFGS-B")
    assert not alone.success
    points = list(minimised(Parabola(wrong={1}), START + 3))
    assert points[-1].evaluation.loss < 1e-9 * points[0].evaluation.loss


def test_a_run_that_cannot_improve_ends_by_itself():
    function = Parabola()
    points = list(minimised(function, np.zeros((2, 2, 3))))
    assert len(points) == 2  # the start, and as the only result the start again
    assert function.calls == 3  # the first run and two fruitless ones


def test_closing_the_generator_ends_the_run():
    function = Rosenbrock()
    generator = minimised(function)
    next(generator)
    before = len(function.asked)
    generator.close()
    assert len(function.asked) <= before + 1
    assert "deepstyle-optimiser" not in [thread.name for thread in threading.enumerate()]


def test_ctrl_c_while_the_next_point_is_waited_for_ends_the_run_within_one_evaluation():
    class Interrupting(Rosenbrock):
        def evaluate(self, x):
            if len(self.asked) == 5:
                time.sleep(1)  # until the other thread waits
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(2)  # time enough for the other thread, even on a busy machine
            return super().evaluate(x)

    function = Interrupting()
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores SIGINT
    try:
        with pytest.raises(KeyboardInterrupt):
            list(minimised(function))
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert len(function.asked) <= 7
    assert "deepstyle-optimiser" not in [thread.name for thread in threading.enumerate()]


def test_stop_hands_over_the_accepted_point_at_the_next_evaluation():
    function = Rosenbrock()
    points = list(minimised(function, watch=Recorder(27)))
    assert len(function.asked) == 27
    assert len(points) == 3  # the start, after 20 evaluations, and what the other seven brought
    assert points[2].evaluation.loss < points[1].evaluation.loss
    assert points[2].evaluation.loss == optimize.rosen(points[2].x.ravel())


def test_stop_before_the_first_evaluation_still_gives_the_start():
    points = list(minimised(Rosenbrock(), watch=Recorder(0)))
    np.testing.assert_array_equal(points[-1].x, START)


def test_what_was_accepted_before_an_evaluation_failed_is_not_lost():
    class Failing(Rosenbrock):
        def evaluate(self, x):
            if len(self.asked) == 30:
                raise deepstyle.UserError("on purpose")
            return super().evaluate(x)

    losses = []
    with pytest.raises(deepstyle.UserError, match="on purpose"):
        for point in minimised(Failing()):
            losses.append(point.evaluation.loss)
    assert len(losses) == 3
    assert losses[2] < losses[1] < losses[0]


def test_an_error_in_the_objective_reaches_the_caller():
    class Broken(Rosenbrock):
        def evaluate(self, x):
            raise ZeroDivisionError("on purpose")

    with pytest.raises(ZeroDivisionError, match="on purpose"):
        list(minimised(Broken()))


def small_run(untrained, **options):
    pictures = Pictures(smooth_picture(1, 32, 40), (smooth_picture(2, 40, 32),))
    return list(paint(pictures, Settings(image_size=32, **options), untrained))


def test_iterations_asked_for_are_run_and_their_numbers_agree(untrained):
    iterations = small_run(untrained, num_iter=3)
    assert [i.number for i in iterations] == [1, 2, 3]
    for before, after in itertools.pairwise(iterations):
        assert after.loss < before.loss
        assert after.improvement == pytest.approx(100 * (before.loss - after.loss) / before.loss)
    for i in iterations:
        assert i.loss == i.losses.total == i.losses.content + i.losses.style + i.losses.variation
        assert i.picture.shape == (32, 40, 3)
        assert i.picture.dtype == np.uint8
        assert i.seconds > 0
        assert 0 < i.improvement < 100


def test_min_improvement_stops_a_run_but_never_after_the_first_iteration(untrained):
    assert len(small_run(untrained, num_iter=4, min_improvement=99.999)) == 2
    start = deepstyle.Losses(100.0, 0.0, 0.0, 100.0)
    for losses, least, is_enough in [
        ((100, 105), 50, False),
        ((100, 100, 50.1), 50, True),
        ((100, 100, 50), 50, False),
        ((100, 100, 100), 0, False),
    ]:
        state = deepstyle.State(np.zeros((32, 32, 3)), tuple(start._replace(total=total) for total in losses))
        assert deepstyle.has_enough(state, Settings(min_improvement=least)) == is_enough


def test_seed_decides_the_noise(untrained):
    a, b, c = (small_run(untrained, num_iter=1, init_image="noise", seed=seed)[0].picture for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert np.any(a != c)


def larger_pictures():
    return Pictures(smooth_picture(1, 64, 80), (smooth_picture(2, 40, 32),))


def watched_run(untrained, stop_at=math.inf, num_iter=1, **options):
    """The iterations, and (size, count, loss) of every evaluation; it is stopped after `stop_at` of them."""
    watch, settings = Recorder(stop_at), Settings(image_size=64, num_iter=num_iter, **options)
    return list(paint(larger_pictures(), settings, untrained, watch=watch)), watch.seen


def test_coarse_sizes_have_their_own_iterations(untrained):
    (*_, iteration), seen = watched_run(untrained, scales=2, num_iter=3, coarse_iter=2)
    (coarse, first), (fine, second) = (
        (size, [count for _, count, _ in group]) for size, group in itertools.groupby(seen, lambda one: one[0])
    )
    assert (coarse, fine) == ((32, 40), (64, 80))
    for counts, iterations in ((first, 2), (second, 3)):
        assert counts == list(range(1, len(counts) + 1))
        assert 20 * iterations <= len(counts) <= 20 * iterations + 5
    assert iteration.number == 3
    assert iteration.picture.shape == (64, 80, 3)


def test_coarse_iter_is_one_number_for_all_coarse_sizes_or_one_for_each():
    sizes = [(32, 40), (64, 80), (128, 160)]
    for given, expected in ((4, [4, 4, 10]), ((20, 5), [20, 5, 10])):
        stages = stages_of(larger_pictures(), Settings(image_size=128, scales=3, coarse_iter=given))
        assert [(stage.size, stage.iterations) for stage in stages] == list(zip(sizes, expected, strict=True))
        assert [stage.is_full for stage in stages] == [False, False, True]
    (stage,) = stages_of(larger_pictures(), Settings(image_size=32))
    assert (stage.size, stage.iterations, stage.is_full) == (sizes[0], 10, True)
    said = r"--coarse_iter has 3 numbers \(3 2 1\); with --scales 3 there are 2 coarse sizes"
    with pytest.raises(deepstyle.UserError, match=said):
        Settings(scales=3, coarse_iter=(3, 2, 1))
    with pytest.raises(deepstyle.UserError, match="--coarse_iter is 0; it must be 1 or more"):
        Settings(scales=2, coarse_iter=0)


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_at_half_the_rows_the_content_counts_4_times_as_much_in_the_mean(untrained, kind):
    pictures = larger_pictures()
    stage, _ = stages_of(pictures, Settings(image_size=64, scales=2, content_loss_type=kind))
    x = smooth_picture(3, 32, 40) - MEAN_BGR
    coarse = deepstyle.Objective.at(stage, Engine(Plan(None, 10), untrained), deepstyle.Watch()).evaluate(x).parts
    alone = deepstyle.Objective(
        resize(pictures.content, (32, 40)),
        resize(pictures.styles[0], (32, 40)),
        weights=untrained,
        content_loss_type=kind,
    )
    # A fourth of the positions; but the factor of type 1 holds the root of their number, and that of type 2 the number.
    as_the_sum_in_full_size = {0: 4, 1: 2, 2: 1}[kind]
    for name, value in alone.evaluate(x).parts.items():
        times = 4 * as_the_sum_in_full_size if name.startswith("content") else 1
        assert coarse[name] == pytest.approx(times * value, rel=1e-5)


def test_an_absurd_content_weight_ends_a_coarse_size_as_it_does_the_full_one(untrained):
    for scales in (1, 2):
        with pytest.raises(deepstyle.UserError, match="the content conv5_2 loss is no longer finite; lower its weight"):
            watched_run(untrained, scales=scales, content_weight=1e308, init_image="noise")


def test_each_size_starts_from_the_coarser_result(untrained):
    (_, plain), (_, scaled) = (watched_run(untrained, scales=scales) for scales in (1, 2))
    assert plain[0][0] == (64, 80)
    start = next(loss for size, _, loss in scaled if size == (64, 80))
    assert start < 0.7 * plain[0][2]


def test_the_photos_detail_is_carried_over_to_a_finer_size():
    painted = smooth_picture(3, 32, 40).astype(np.float32)
    for start in ("content", "recolored", "gray"):
        coarse, fine = stages_of(larger_pictures(), Settings(image_size=64, scales=2, init_image=start))
        assert np.abs(enlarge(coarse.start(), (64, 80)) - fine.start()).max() > 1
        np.testing.assert_allclose(fine.carried_over(coarse.start(), coarse), fine.start(), atol=1e-4)
        # What was painted comes on top, as bicubic enlarging has it.
        added = fine.carried_over(coarse.start() + painted, coarse) - fine.start()
        np.testing.assert_allclose(added, enlarge(painted, (64, 80)), atol=1e-3)
    coarse, fine = stages_of(larger_pictures(), Settings(image_size=64, scales=2, init_image="noise"))
    np.testing.assert_array_equal(fine.carried_over(painted, coarse), enlarge(painted, (64, 80)))


def test_stop_at_a_coarse_size_gives_what_there_is_enlarged(untrained):
    (iteration,), seen = watched_run(untrained, stop_at=5, scales=2)
    assert iteration.is_coarse
    assert iteration.picture.shape == (64, 80, 3)
    assert iteration.own_size.shape == (32, 40, 3)
    assert iteration.state.size == (32, 40)
    assert (iteration.state.partial, iteration.state.evaluations) == (True, 5)
    assert [size for size, *_ in seen] == [(32, 40)] * 5


def test_however_often_a_run_is_stopped_its_evaluations_are_done(untrained):
    settings, state, numbers, evaluations = Settings(image_size=64, num_iter=2, scales=2, coarse_iter=1), None, [], []
    for _ in range(30):
        for iteration in paint(larger_pictures(), settings, untrained, state, Recorder(9)):
            state = iteration.state
            numbers.append((iteration.is_coarse, iteration.number))
            evaluations.append(state.evaluations)
        if not iteration.is_coarse and state.iteration == 2:
            break
    assert sorted(set(numbers)) == [(False, 1), (False, 2), (True, 1)]
    assert numbers == sorted(numbers, key=lambda number: (not number[0], number[1]))
    assert 40 <= evaluations[-1] <= 45
    (*_, unbroken), _ = watched_run(untrained, scales=2, num_iter=2, coarse_iter=1)
    assert iteration.loss < 2 * unbroken.loss  # what is known of the curvature is lost at each stop


def test_a_resumed_run_does_not_begin_coarse_again(untrained):
    (*_, iteration), _ = watched_run(untrained, scales=2)
    watch, settings = Recorder(), Settings(image_size=64, num_iter=2, scales=2)
    (resumed,) = paint(larger_pictures(), settings, untrained, iteration.state, watch)
    assert resumed.number == 2
    assert {size for size, *_ in watch.seen} == {(64, 80)}


def test_history_is_the_number_of_corrections(monkeypatch):
    options = []
    minimize = optimize.minimize
    monkeypatch.setattr(optimize, "minimize", lambda *a, **k: options.append(k["options"]) or minimize(*a, **k))
    next(minimised(Rosenbrock(), history=7))
    assert options[0]["maxcor"] == 7


def test_stylize_takes_the_commands_flags_and_defaults(monkeypatch):
    got = []
    monkeypatch.setattr(deepstyle, "paint", lambda *arguments: got.append(arguments) or iter(()))
    content, style = smooth_picture(1, 32, 40), smooth_picture(2, 40, 32)
    list(deepstyle.stylize(content, style, weights="random", num_iter=2, content_layer="block4_conv2"))
    assert got[0][1] == Settings(weights="random", num_iter=2, content_layer="conv4_2")
    with pytest.raises(deepstyle.UserError, match="pool_type"):
        deepstyle.stylize(content, style, pool_type="sum")


@pytest.fixture
def two_stages():
    pictures = Pictures(smooth_picture(1, 64, 64), (smooth_picture(2, 64, 64),))
    return pictures, Settings(image_size=64, num_iter=1, scales=2, coarse_iter=1, weights="random")


def test_a_state_of_a_finished_stage_goes_on_with_the_next_and_prepares_nothing_of_its_own(
    two_stages, untrained, monkeypatch
):
    pictures, settings = two_stages
    first, second = paint(pictures, settings, untrained)
    prepared, at = [], deepstyle.Objective.at
    monkeypatch.setattr(
        deepstyle.Objective, "at", lambda stage, *given: prepared.append(stage.size) or at(stage, *given)
    )
    (again,) = paint(pictures, settings, untrained, first.state)
    assert prepared == [(64, 64)]
    np.testing.assert_array_equal(again.picture, second.picture)


def test_a_state_of_no_stages_size_is_refused(two_stages, untrained):
    pictures, settings = two_stages
    state = deepstyle.State(np.zeros((48, 48, 3)))
    with pytest.raises(UserError, match="the state is of 48 x 48 pixels, and no stage of this painting is"):
        next(paint(pictures, settings, untrained, state))
