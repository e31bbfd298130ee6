"""What lies between projections and recurrences on a tape: gates, skips, sums of one token.

Every operation works on flat float32 vectors of one length. Whatever is strided or broadcast is
laid out flat by `copy` first: it is one token, so a copy is a few hundred numbers in the nearest
cache, and there is one loop for each operation instead of one for each layout.
"""

# mypy: ignore-errors
from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from subquad.backend.cpu.compile import at, exp, jit, sigmoid
from subquad.backend.cpu.tape import Tape, integers, kernel, real

BLOCK = 4096  # numbers of a unit: a microsecond, less than another thread is worth
AXES = 4  # of a strided copy

UNARY = ("affine", "exp", "sigmoid", "silu", "softplus", "elu", "relu", "gelu", "tanh", "abs",
         "log", "log1p")  # fmt: skip
AFFINE, EXP, SIGMOID, SILU, SOFTPLUS, ELU, RELU, GELU, TANH, ABS, LOG, LOG1P = range(12)
BINARY = ("add", "sub", "mul", "div", "max")
ADD, SUB, MUL, DIV, MAX = range(5)
ROWWISE = ("sum", "softmax")
SUM, SOFTMAX = range(2)

HALF_ROOT = np.float32(0.5**0.5)


@jit
def _softplus(x):
    """log(1 + e^x) in float32: max(x, 0) + log1p(e), e = e^-|x|; of that 2 atanh(e / (2 + e)).

    The argument is at most 1/3, where eight terms of atanh's series are exact to 3e-9; unlike a
    call of log1p, LLVM vectorises them.
    """
    e = exp(-abs(x))
    s = e / (np.float32(2.0) + e)
    z = s * s
    p = np.float32(1 / 15) * z + np.float32(1 / 13)
    p = p * z + np.float32(1 / 11)
    p = p * z + np.float32(1 / 9)
    p = p * z + np.float32(1 / 7)
    p = p * z + np.float32(1 / 5)
    p = p * z + np.float32(1 / 3)
    p = p * z + np.float32(1.0)
    return np.float32(2.0) * s * p + (x if not x < np.float32(0.0) else np.float32(0.0))


@jit
def _exp(x):
    """e^x down to 0 and up to infinity: the square of e^(x/2), which `exp` has."""
    root = exp(np.float32(0.5) * x)
    return root * root


# A loop of its own for each operation, and no choice within: only so does LLVM vectorise them.


@jit
def _exps(a, y):
    for i in range(y.size):
        y[i] = _exp(a[i])


@jit
def _sigmoids(a, y):
    for i in range(y.size):
        y[i] = sigmoid(a[i])


@jit
def _silus(a, y):
    for i in range(y.size):
        y[i] = a[i] * sigmoid(a[i])


@jit
def _softpluses(a, y):
    for i in range(y.size):
        y[i] = _softplus(a[i])


@jit
def _elus(a, y):
    for i in range(y.size):
        y[i] = a[i] if a[i] > np.float32(0.0) else np.float32(math.expm1(a[i]))


@jit
def _relus(a, y):
    for i in range(y.size):
        y[i] = np.float32(0.0) if a[i] < np.float32(0.0) else a[i]


@jit
def _gelus(a, y):
    for i in range(y.size):
        y[i] = np.float32(0.5) * a[i] * np.float32(1.0 + math.erf(a[i] * HALF_ROOT))


@jit
def _tanhs(a, y):
    for i in range(y.size):
        y[i] = np.float32(math.tanh(a[i]))


@jit
def _abs(a, y):
    for i in range(y.size):
        y[i] = abs(a[i])


@jit
def _logs(a, y):
    for i in range(y.size):
        y[i] = np.float32(np.log(a[i]))


@jit
def _log1ps(a, y):
    for i in range(y.size):
        y[i] = np.float32(np.log1p(a[i]))


@jit
def _affine(a, y, slope, offset):
    for i in range(y.size):
        y[i] = slope * a[i] + offset


@kernel
def _unary(arguments, unit):
    operation, x, y, n, slope, offset = integers(arguments, 6)
    begin = unit * BLOCK
    size = min(n - begin, BLOCK)
    a, out = at(x + 4 * begin, (size,)), at(y + 4 * begin, (size,))
    if operation == AFFINE:
        _affine(a, out, np.float32(real(slope)), np.float32(real(offset)))
    elif operation == EXP:
        _exps(a, out)
    elif operation == SIGMOID:
        _sigmoids(a, out)
    elif operation == SILU:
        _silus(a, out)
    elif operation == SOFTPLUS:
        _softpluses(a, out)
    elif operation == ELU:
        _elus(a, out)
    elif operation == RELU:
        _relus(a, out)
    elif operation == GELU:
        _gelus(a, out)
    elif operation == TANH:
        _tanhs(a, out)
    elif operation == ABS:
        _abs(a, out)
    elif operation == LOG:
        _logs(a, out)
    elif operation == LOG1P:
        _log1ps(a, out)


@kernel
def _binary(arguments, unit):
    operation, x, z, y, n = integers(arguments, 5)
    begin = unit * BLOCK
    size = min(n - begin, BLOCK)
    a, b = at(x + 4 * begin, (size,)), at(z + 4 * begin, (size,))
    out = at(y + 4 * begin, (size,))
    if operation == ADD:
        for i in range(size):
            out[i] = a[i] + b[i]
    elif operation == SUB:
        for i in range(size):
            out[i] = a[i] - b[i]
    elif operation == MUL:
        for i in range(size):
            out[i] = a[i] * b[i]
    elif operation == DIV:
        for i in range(size):
            out[i] = a[i] / b[i]
    elif operation == MAX:
        for i in range(size):
            out[i] = a[i] if a[i] > b[i] or a[i] != a[i] else b[i]  # NaN from either side


@kernel
def _rowwise(arguments, unit):
    """Of the rows of x [M,D]: their sums [M], or their softmax [M,D]."""
    operation, x, y, M, D = integers(arguments, 5)
    rows = at(x, (M, D))
    if operation == SUM:
        sums = at(y, (M,))
        for r in range(M):
            total = np.float32(0.0)
            for j in range(D):
                total += rows[r, j]
            sums[r] = total
    elif operation == SOFTMAX:
        out = at(y, (M, D))
        for r in range(M):
            largest = rows[r, 0]
            for j in range(1, D):
                largest = rows[r, j] if rows[r, j] > largest else largest
            total = np.float32(0.0)
            for j in range(D):
                out[r, j] = exp(rows[r, j] - largest)
                total += out[r, j]
            for j in range(D):
                out[r, j] /= total


@kernel
def _copy(arguments, unit):
    x, y, a, b, c, d, xa, xb, xc, xd, ya, yb, yc, yd = integers(arguments, 2 + 3 * AXES)
    source = at(x, (1 + (a - 1) * xa + (b - 1) * xb + (c - 1) * xc + (d - 1) * xd,))
    target = at(y, (1 + (a - 1) * ya + (b - 1) * yb + (c - 1) * yc + (d - 1) * yd,))
    for i in range(a):
        for j in range(b):
            for k in range(c):
                read, written = i * xa + j * xb + k * xc, i * ya + j * yb + k * yc
                if xd == 1 and yd == 1:
                    for m in range(d):
                        target[written + m] = source[read + m]
                elif xd == 0 and yd == 1:  # one number for all
                    for m in range(d):
                        target[written + m] = source[read]
                else:
                    for m in range(d):
                        target[written + m * yd] = source[read + m * xd]


def unary(
    tape: Tape, operation: str, x: Tensor, y: Tensor, slope: float = 1.0, offset: float = 0.0
) -> None:
    """y = operation(x), both contiguous; "affine" is slope * x + offset."""
    units = -(-y.numel() // BLOCK)
    number = UNARY.index(operation)
    tape.step(_unary, units, number, x, y, y.numel(), float(slope), float(offset))


def binary(tape: Tape, operation: str, x: Tensor, z: Tensor, y: Tensor) -> None:
    """y = x operation z, all contiguous and of one size."""
    units = -(-y.numel() // BLOCK)
    tape.step(_binary, units, BINARY.index(operation), x, z, y, y.numel())


def rowwise(tape: Tape, operation: str, x: Tensor, y: Tensor) -> None:
    """y = operation(x) along x's last axis, both contiguous."""
    D = x.shape[-1]
    tape.step(_rowwise, 1, ROWWISE.index(operation), x, y, x.numel() // D, D)


def copy(tape: Tape, x: Tensor, y: Tensor) -> bool:
    """y = x, of one shape and any strides; False, and nothing, if they have too many axes."""
    if y.numel() == 0:
        return True
    axes = _join_axes([axis for axis in zip(y.shape, x.stride(), y.stride()) if axis[0] > 1])
    if len(axes) > AXES:
        return False
    axes = [(1, 0, 0)] * (AXES - len(axes)) + axes
    sizes, read, written = zip(*axes)
    tape.step(_copy, 1, x, y, *sizes, *read, *written)
    return True


def _join_axes(axes: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Axes (size, stride, stride) with those joined that lie one behind the other in both."""
    joined: list[tuple[int, int, int]] = []
    for size, read, written in axes:
        if joined and joined[-1][1:] == (size * read, size * written):
            size *= joined.pop()[0]
        joined.append((size, read, written))
    return joined
