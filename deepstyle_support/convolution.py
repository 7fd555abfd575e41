"""The network's convolution on Keras's backends: quick on CPUs, and continued beyond the picture's border or not."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .backend import add_to_rows, import_keras

Tensor = Any  # one of the backend's


FULL = "float32"  # the type of the factors of convolutions that are not rounded


class Kernel(NamedTuple):
    """A kernel as `convolve` needs it: itself for the gradient, and flipped in space with its channels swapped.

    With `sides` the picture is continued by the values at its border, and not by zeros. All have the type that the
    factors of a convolution are rounded to, float32 or bfloat16.
    """

    forward: Tensor  # (3, 3, in, out)
    flipped: Tensor  # (3, 3, out, in)
    sides: tuple[Tensor, ...] = ()  # from `sides_of`; none if there are zeros beyond the border
    flipped_sides: tuple[Tensor, ...] = ()


def kernel_on_device(kernel: np.ndarray, padding: str) -> Kernel:
    """The tensors of a kernel, (3, 3, in, out); padding: "zeros" or "edge"."""
    to_tensor = import_keras().ops.convert_to_tensor
    flipped = np.ascontiguousarray(kernel[::-1, ::-1].swapaxes(2, 3))
    sides = (sides_of(kernel, 0, 2), sides_of(flipped, 2, 0)) if padding == "edge" else ()
    return Kernel(to_tensor(kernel), to_tensor(flipped), *sides)


def rounded(kernel: Kernel, factors: str) -> Kernel:
    """The kernel with its numbers rounded to this type."""
    cast = import_keras().ops.cast
    return Kernel(
        *(tuple(cast(t, factors) for t in one) if isinstance(one, tuple) else cast(one, factors) for one in kernel)
    )


def sides_of(kernel: np.ndarray, first: int, last: int) -> tuple[Tensor, ...]:
    """What of a kernel (3, 3, in, out) lies outside at a picture's border, if `first` and `last` are its outer lines.

    For the first row, the last row, the first column and the last it is (3 in, out), for the four corners (4, in, out).
    """
    inputs, outputs = kernel.shape[2:]
    to_tensor, ends = import_keras().ops.convert_to_tensor, [first, last]
    lines = [kernel[end].reshape(3 * inputs, outputs) for end in ends]
    lines += [kernel[:, end].reshape(3 * inputs, outputs) for end in ends]
    corners = kernel[np.ix_(ends, ends)].reshape(4, inputs, outputs)
    return tuple(map(to_tensor, [*lines, corners]))


def convolve(x: Tensor, kernel: Kernel) -> Tensor:
    """The convolution of x, (1, H, W, in), with stride 1; H and W are 2 or more -> (1, H, W, out).

    A convolution is a transposed convolution with the kernel flipped in space and its channels swapped, and its
    gradient is one with the kernel itself. Both are written so because TensorFlow's forward convolution takes a slow
    path on CPUs for weights that are not constants of the graph: measured at 400 x 533, an evaluation takes 0.7 of the
    time this way.

    x is rounded to the kernel's type, in its gradient what comes from above. The products are added up in float32, and
    their sum, which is of that type again, becomes float32.
    """
    ops = import_keras().ops
    factors = import_keras().backend.standardize_dtype(kernel.forward.dtype)
    transposed = functools.partial(ops.conv_transpose, strides=1, padding="same", data_format="channels_last")

    @ops.custom_gradient
    def convolution(x: Tensor) -> tuple[Tensor, Callable]:
        def gradient(*args: Tensor, upstream: Tensor = None) -> Tensor:
            upstream = ops.cast(args[0] if upstream is None else upstream, factors)
            product = continued(transposed(upstream, kernel.forward), upstream, kernel.flipped_sides)
            return ops.cast(product, FULL)

        x = ops.cast(x, factors)
        return ops.cast(continued(transposed(x, kernel.flipped), x, kernel.sides), FULL), gradient

    return convolution(x)


def continued(y: Tensor, x: Tensor, sides: tuple[Tensor, ...]) -> Tensor:
    """y, the convolution of x with zeros around it, as it is with x's border values around it instead.

    x: (1, H, W, in), y: (1, H, W, out). Only y's border differs, by what the kernel's sides find outside: each border
    line once more beside itself, and each corner beyond the corner. The gradient is the same with the flipped kernel.
    So nothing of the picture's size is padded or cut: measured on two cores, an evaluation takes 1.07 of the
    processor's time at 200 x 300 and 1.02 at 400 x 600.
    """
    if not sides:
        return y
    ops = import_keras().ops
    _, rows, columns, _ = x.shape
    at = np.arange(rows * columns, dtype=np.int32).reshape(rows, columns)
    lines = at[0], at[-1], at[:, 0], at[:, -1]
    flat, result = (ops.reshape(f, (rows * columns, f.shape[-1])) for f in (x, y))
    for line, side in zip(lines, sides, strict=False):
        values = ops.pad(ops.take(flat, line, axis=0), [(1, 1), (0, 0)])
        values = ops.concatenate([values[shift : shift + len(line)] for shift in range(3)], axis=1)
        result = add_to_rows(result, line, ops.matmul(values, side))
    corners = at[[0, 0, -1, -1], [0, -1, 0, -1]]
    result = add_to_rows(result, corners, ops.matmul(ops.take(flat, corners, axis=0)[:, None], sides[-1])[:, 0])
    return ops.reshape(result, y.shape)
