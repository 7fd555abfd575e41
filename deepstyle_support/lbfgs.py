"""L-BFGS: SciPy's, and one where the network computes: its vectors are the backend's float32 tensors, and stay there.

The latter is algorithms 7.4 and 7.5 of Nocedal & Wright, Numerical Optimization, 2nd ed. 2006. The two-loop recursion
is done on coefficients, as in Chen, Wang & Zhou, "Large-scale L-BFGS using MapReduce", 2014: all that it computes are
sums of vectors that are at hand, so from their dot products it knows what each will be multiplied by, and one sum of
vectors is the result. Nothing as large as the picture is written in between.

"Vector" is whatever the optimiser minimises over: (H, W, 3).
"""

import dataclasses
import functools
import math
import sys
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from .backend import as_array, compile_once, done_before, import_keras, on_cpu
from .callbacks import Closed, as_generator
from .limits import usable_cores
from .messages import UserError

Tensor = Any  # one of the backend's
Evaluate = Callable[[Tensor], Any]  # gives what has a `loss`, a float, and a `gradient`, a tensor
MIN_DECREASE, MIN_FLATTENING = 1e-3, 0.9  # of Wolfe's conditions, as in SciPy's L-BFGS-B
FIRST_LEVELS = 5.0  # grey levels, root mean square, that SciPy's first step changes pixels by, within a factor of 1.5
FIRST_STEP = 20.0  # grey levels that the first step changes a pixel by at most; nothing is known of the curvature yet
MAX_TRIALS = 20  # evaluations of a line search, as in SciPy's
MAX_KEPT = 2e9  # bytes of the curvature that are written at the end of a run


class Point(NamedTuple):
    """Where the optimiser is, and the gradient there."""

    x: Tensor
    gradient: Tensor


@dataclasses.dataclass(frozen=True)
class Curvature:
    """What L-BFGS has learnt of the loss up to a point: its last n steps s, and the changes y of the gradient there.

    The arrays hold dot products, first those of all s, then those of all y.
    """

    steps: tuple[Tensor, ...] = ()  # s, the oldest first
    changes: tuple[Tensor, ...] = ()  # y
    by_changes: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((2, 0, 0)))  # [k, i, j] for i <= j
    by_gradient: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((2, 0)))  # that at the point

    def direction(self, gradient: Tensor, history: int) -> Tensor:
        """Where to go from the point, with this gradient: -H g."""
        coefficients = inverse_times_gradient(self.by_changes, self.by_gradient)
        return combination((gradient, *self.steps, *self.changes), -coefficients, 1 + 2 * history)

    def after(self, before: Point, here: Point, history: int) -> "Curvature":
        """What is known after a step from one point to another; `history` pairs are kept at most.

        Unless the loss is convex along the step nothing can be learnt from it.
        """
        n = len(self.steps)
        step, change = (combination((new, old), (1, -1)) for new, old in zip(here, before, strict=True))
        steps, changes = (*self.steps, step), (*self.changes, change)
        by_gradient = dot_products((*steps, *changes), here.gradient, 2 * history + 2).reshape(2, n + 1)
        own = dot_products((step, change), change)
        if not own[0] > np.finfo(np.float32).eps * own[1] > 0:
            return dataclasses.replace(self, by_gradient=by_gradient[:, :n])
        by_changes = np.zeros((2, n + 1, n + 1))
        by_changes[:, :n, :n] = self.by_changes
        # The new change is the difference of two gradients, and so are its products.
        by_changes[:, :n, n] = by_gradient[:, :n] - self.by_gradient
        by_changes[:, n, n] = own
        return Curvature(steps, changes, by_changes, by_gradient).newest(history)

    def seen_from(self, gradient: Tensor, history: int) -> "Curvature":
        """The same with the products of this gradient: at the same point it may have been computed otherwise."""
        if not self.steps:
            return self
        products = dot_products((*self.steps, *self.changes), gradient, 2 * history + 2)
        return dataclasses.replace(self, by_gradient=products.reshape(2, -1))

    def newest(self, most: int) -> "Curvature":
        """What the last steps say, of which there are to be so many at most."""
        kept = slice(max(0, len(self.steps) - most), None)
        return Curvature(
            self.steps[kept], self.changes[kept], self.by_changes[:, kept, kept], self.by_gradient[:, kept]
        )


def curvature_bytes(size: tuple[int, int], history: int) -> int:
    """What is kept of the curvature when a run ends, for a picture of (rows, columns): all, or nothing of gigabytes."""
    needed = 2 * history * 3 * 4 * math.prod(size)
    return needed if needed <= MAX_KEPT else 0


def to_arrays(curvature: Curvature) -> dict[str, np.ndarray]:
    """The curvature as named arrays, to be written to a file; on a CPU they are no copies."""
    to_array = np.asarray if on_cpu() else as_array
    pairs = {f"step_{i}": to_array(step) for i, step in enumerate(curvature.steps)}
    pairs |= {f"change_{i}": to_array(change) for i, change in enumerate(curvature.changes)}
    return pairs | {"by_changes": curvature.by_changes, "by_gradient": curvature.by_gradient}


def from_arrays(arrays: Mapping[str, np.ndarray]) -> Curvature:
    """The curvature that `to_arrays` has given; each vector is looked up only when its turn has come."""
    to_tensor, by_gradient = import_keras().ops.convert_to_tensor, arrays["by_gradient"]
    steps, changes = (
        tuple(to_tensor(arrays[f"{kind}_{i}"], "float32") for i in range(by_gradient.shape[1]))
        for kind in ("step", "change")
    )
    return Curvature(steps, changes, arrays["by_changes"], by_gradient)


def inverse_times_gradient(by_changes: np.ndarray, by_gradient: np.ndarray) -> np.ndarray:
    """The two-loop recursion on dot products: what to multiply g, all s and all y with, to add them up to H g."""
    (s_y, y_y), (s_g, y_g) = by_changes, by_gradient
    n = len(s_g)
    of_steps, of_changes, alpha = np.zeros(n), np.zeros(n), np.zeros(n)
    for i in reversed(range(n)):
        # Only changes behind the i-th have been added to g.
        alpha[i] = (s_g[i] + s_y[i, i:] @ of_changes[i:]) / s_y[i, i]
        of_changes[i] = -alpha[i]
    scale = s_y[-1, -1] / y_y[-1, -1] if n else 1.0
    of_changes *= scale
    for i in range(n):
        # All changes have been added, and the steps before the i-th.
        y_changes = np.concatenate([y_y[:i, i], y_y[i, i:]]) @ of_changes
        beta = (scale * y_g[i] + y_changes + s_y[:i, i] @ of_steps[:i]) / s_y[i, i]
        of_steps[i] = alpha[i] - beta
    return np.array([scale, *of_steps, *of_changes])


def device_lbfgs(
    evaluate: Evaluate,
    start: Tensor,
    history: int,
    learnt: Callable[[], Curvature | None] = lambda: None,
    restarts: Callable[[], bool] = lambda: True,
) -> Generator[tuple[Tensor, Any, Curvature], None, None]:
    """Every point that L-BFGS accepts, the start first, and what is known there; `evaluate` may raise what ends it.

    start: (H, W, 3), where learnt() may be known already. When a line search finds nothing better, as noise in
    float32 can make it, it ends, or if it `restarts()`, all that was learnt is forgotten, and it goes on from where it
    is. Then it ends by itself only when two line searches in a row have found nothing.
    """
    x, fruitless = import_keras().ops.convert_to_tensor(start, "float32"), 0
    del start  # as large as the picture
    evaluation = evaluate(x)
    curvature = (learnt() or Curvature()).newest(history).seen_from(evaluation.gradient, history)
    while fruitless < 2:
        yield x, dataclasses.replace(evaluation, gradient=None), curvature
        direction = curvature.direction(evaluation.gradient, history)
        found = line_search(evaluate, x, evaluation, direction, known=bool(curvature.steps))
        del direction  # it is as large as the picture
        if found:
            here = Point(found[0], found[1].gradient)
            curvature = curvature.after(Point(x, evaluation.gradient), here, history)
            (x, evaluation), fruitless = found, 0
        elif restarts():
            curvature, fruitless = Curvature(), fruitless + 1
        else:
            return


def scipy_lbfgs(
    evaluate: Evaluate,
    start: np.ndarray,
    history: int,
    learnt: object = None,
    restarts: Callable[[], bool] = lambda: True,
) -> Generator[tuple[np.ndarray, Any, None], None, None]:
    """Every point that SciPy's L-BFGS-B accepts, the start first; `evaluate` may raise whatever ends it.

    It works on the host in float64, and neither gives away the curvature that it has found, nor can be given one. Its
    first step has the length 1, so it is told x in units in which that is some grey levels a pixel, and not 0.002.
    Where it forgets what it has learnt, it goes as far as its gradient is long: so it is told a loss whose gradient has
    the length 1 at the start, and is shorter later.

    L-BFGS-B (Byrd, Lu, Nocedal & Zhu 1995) with `history` corrections runs once for the whole job, so that what it has
    learnt of the curvature survives from one iteration to the next, and with its own convergence tests off. When it
    gives up on a line search, as noise in float32 can make it, it ends, or if it `restarts()`, it is started again from
    where it is. Then it ends by itself only when that has brought nothing twice in a row.
    """
    from scipy import optimize

    unit = power_of_two(FIRST_LEVELS * math.sqrt(start.size))

    def optimise(hand_over: Callable, closed: threading.Event) -> None:
        loss = FlatLoss(evaluate, start.shape, unit, hand_over, closed)

        def solve(flat: np.ndarray) -> tuple[np.ndarray, float]:
            options = {"ftol": 0, "gtol": 0, "maxiter": sys.maxsize, "maxfun": sys.maxsize, "maxcor": history}

            def callback(intermediate_result: optimize.OptimizeResult) -> None:
                loss.accept(intermediate_result.fun)

            result = optimize.minimize(
                loss.at, flat, jac=loss.gradient_at, method="L-BFGS-B", callback=callback, options=options
            )
            # Not all of it: it refers to the corrections, which would stay while the next run makes its own.
            return result.x, result.fun

        (flat, least), fruitless = solve(np.asarray(start, np.float64).ravel() / unit), 0
        while restarts() and fruitless < 2:
            before = least
            flat, least = solve(flat)
            fruitless = 0 if least < before else fruitless + 1

    return as_generator(optimise)


def power_of_two(number: float) -> float:
    """The nearest: what is multiplied by it, and divided again, is to the bit what it was."""
    return 2.0 ** round(math.log2(number))


class FlatLoss:
    """The loss as SciPy asks for it, of (H * W * 3,) float64 in a unit; it hands over what is accepted."""

    def __init__(
        self, evaluate: Evaluate, shape: tuple[int, ...], unit: float, hand_over: Callable, closed: threading.Event
    ):
        self.evaluate, self.shape, self.unit, self.hand_over, self.closed = evaluate, shape, unit, hand_over, closed
        self.x: Any = None  # (H, W, 3) in grey levels, of the latest evaluation
        self.latest: Any = None  # evaluation
        self.accepted: Any = None  # the latest point, and its evaluation without the gradient
        self.shift = 0.0  # by which SciPy is told less than the loss
        self.scale = 1.0  # by which it is multiplied then

    def at(self, flat: np.ndarray) -> float:
        if self.closed.is_set():
            raise Closed
        self.x = self.unit * flat.reshape(self.shape)
        self.latest = self.evaluate(self.x)
        if self.accepted is None:
            steepness = self.unit * float(np.linalg.norm(self.latest.gradient))
            self.scale = 1 / power_of_two(steepness) if steepness else 1.0
            self.accept(self.told)
        elif self.latest.in_full != self.accepted[1].in_full:
            # In the other precision all losses are others: what a step brings is seen where both are of the same.
            x, before = self.accepted
            again = self.evaluate(x)
            self.shift = again.loss - before.loss
            self.accepted = x, dataclasses.replace(again, gradient=None)
        return self.told

    @property
    def told(self) -> float:
        """What SciPy is told of the latest evaluation's loss."""
        return self.scale * (self.latest.loss - self.shift)

    def gradient_at(self, flat: np.ndarray) -> np.ndarray:
        # SciPy asks for it where it has just asked for the loss. Given both at once, it keeps one more copy of x.
        gradient = (self.scale * self.unit) * self.latest.gradient.ravel()
        self.latest = dataclasses.replace(self.latest, gradient=None)  # as large as the picture
        return gradient

    def accept(self, told: float) -> None:
        """The line search stops at the point that it accepts, so the latest evaluation is that point's."""
        assert told == self.told
        # Without the gradient, which is as large as the picture.
        self.accepted = self.x, dataclasses.replace(self.latest, gradient=None)
        self.hand_over((*self.accepted, None))


def line_search(
    evaluate: Evaluate, x: Tensor, evaluation: Any, direction: Tensor, known: bool
) -> tuple[Tensor, Any] | None:
    """A point on the way from x, with its evaluation, that fulfils Wolfe's conditions; None if none is found.

    known: whether the direction says how far to go. What is too short is doubled, and then the middle is tried of what
    is too short and what is too long: between the two there always is a point that fulfils the weak conditions (Lewis &
    Overton, "Nonsmooth optimization via quasi-Newton methods", 2013, algorithm 2.6). Raises UserError, status 1, if the
    gradient's square is beyond float32.
    """
    (slope,) = dot_products((evaluation.gradient,), direction)
    if not math.isfinite(slope):
        raise UserError("the gradient is too large for L-BFGS in float32; lower the weights", status=1)
    length = 1.0 if known else FIRST_STEP / (largest(direction) or 1.0)
    short, long = 0.0, math.inf
    for _ in range(MAX_TRIALS if slope < 0 else 0):
        trial = combination((x, direction), (1, length))
        there = evaluate(trial)
        (slope_there,) = dot_products((there.gradient,), direction)
        if not there.loss <= evaluation.loss + MIN_DECREASE * length * slope:  # or it is no number
            long = length
        elif slope_there < MIN_FLATTENING * slope:
            short = length
        else:
            return trial, there
        length = (short + long) / 2 if long < math.inf else 2 * length
    return None


@functools.cache
def threads() -> ThreadPoolExecutor:
    """For NumPy's work on all cores."""
    return ThreadPoolExecutor(usable_cores())


def dot_products(vectors: Sequence[Tensor], other: Tensor, slots: int = 0) -> np.ndarray:
    """Those of each vector with another one, (n,) float64. They are compiled once for up to so many slots.

    What float32 adds up is a row of a picture at most: so much that the error of a product of 50 million terms is that
    of some thousands.
    """
    if on_cpu():
        other = np.asarray(other)
        # NumPy looks at the same memory, and takes less than half of TensorFlow's time and an eighth of XLA's.
        by_row = threads().map(lambda vector: np.einsum("ijk,ijk->i", vector, other), map(np.asarray, vectors))
        return np.array([*by_row]).sum(1, np.float64)
    if uses_torch():
        products = products_by_row_with_torch(vectors, other)
    else:
        products = compile_once(products_by_row)(padded(vectors, slots), other)
    return import_keras().ops.convert_to_numpy(products)[: len(vectors)].sum(1, np.float64)


def products_by_row(vectors: tuple[Tensor, ...], other: Tensor) -> Tensor:
    """(n, H): the sums of the rows' products, whose total is the dot product."""
    ops = import_keras().ops
    return ops.stack([ops.sum(vector * other, axis=(1, 2)) for vector in vectors])


def products_by_row_with_torch(vectors: Sequence[Tensor], other: Tensor) -> Tensor:
    """The same by products of matrices, so that PyTorch, which compiles nothing, stores no products in between."""
    import torch

    rows = len(other)
    column = other.reshape(rows, -1, 1)
    return torch.stack([torch.bmm(vector.reshape(rows, 1, -1), column)[:, 0, 0] for vector in vectors])


def combination(vectors: Sequence[Tensor], coefficients: Sequence[float] | np.ndarray, slots: int = 0) -> Tensor:
    """The sum of the vectors, each times its coefficient; compiled once for up to so many slots."""
    if uses_torch():
        return weighted_sum_with_torch(vectors, coefficients)
    vectors = padded(vectors, slots)
    filled = np.zeros(len(vectors), np.float32)
    filled[: len(coefficients)] = coefficients
    return compile_once(weighted_sum)(vectors, import_keras().ops.convert_to_tensor(filled))


def weighted_sum(vectors: tuple[Tensor, ...], coefficients: Tensor) -> Tensor:
    total = coefficients[0] * vectors[0]
    for number, vector in enumerate(vectors[1:], 1):
        with done_before(total):  # else TensorFlow makes all the products at once, each as large as the picture
            product = coefficients[number] * vector
        total = total + product
    return total


def weighted_sum_with_torch(vectors: Sequence[Tensor], coefficients: Sequence[float] | np.ndarray) -> Tensor:
    """The same without storing products: a kernel for each vector, which multiplies and adds in place."""
    total = vectors[0] * float(coefficients[0])
    for vector, coefficient in zip(vectors[1:], coefficients[1:], strict=True):
        total.add_(vector, alpha=float(coefficient))
    return total


def uses_torch() -> bool:
    return import_keras().backend.backend() == "torch"


def padded(vectors: Sequence[Tensor], slots: int) -> tuple[Tensor, ...]:
    """The vectors, and in slots that are left the first of them again."""
    return (*vectors, *[vectors[0]] * (slots - len(vectors)))


def largest(vector: Tensor) -> float:
    """The greatest absolute value."""
    ops = import_keras().ops
    return float(ops.max(ops.abs(vector)))
