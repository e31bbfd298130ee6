"""What stands between projections and recurrences on a tape: gates, skips, sums of one token.

Each works on flat float32 vectors and is too short for a call of its own.
"""

# mypy: ignore-errors
from __future__ import annotations

import numpy as np
from torch import Tensor

from subquad.kernels.cpu import at, exp, jit, sigmoid
from subquad.kernels.tape import Tape, integers, kernel, real

BLOCK = 256  # numbers of a unit


@jit
def _softplus(x):
    """log(1 + e^x) in float32; beyond 20 it is x to rounding, and e^x might overflow."""
    return x if x > np.float32(20.0) else np.log1p(exp(x))


@kernel
def _add(arguments, unit):
    x, z, y, n = integers(arguments, 4)
    left, right, out = at(x, (n,)), at(z, (n,)), at(y, (n,))
    for i in range(n):
        out[i] = left[i] + right[i]


@kernel
def _silu_gate(arguments, unit):
    x, gate, y, n = integers(arguments, 4)
    value, g, out = at(x, (n,)), at(gate, (n,)), at(y, (n,))
    for i in range(n):
        out[i] = value[i] * (g[i] * sigmoid(g[i]))


@kernel
def _sigmoid(arguments, unit):
    x, y, n, scale = integers(arguments, 4)
    value, out, factor = at(x, (n,)), at(y, (n,)), np.float32(real(scale))
    for i in range(n):
        out[i] = factor * sigmoid(value[i])


@kernel
def _softplus_unit(arguments, unit):
    x, bias, y, n, slope, scale = integers(arguments, 6)
    value, offset, out = at(x, (n,)), at(bias, (n,)), at(y, (n,))
    sign, factor = np.float32(real(slope)), np.float32(real(scale))
    for i in range(unit * BLOCK, min(n, (unit + 1) * BLOCK)):
        z = value[i] + offset[i] if bias != 0 else value[i]
        out[i] = factor * _softplus(sign * z)


@kernel
def _rates(arguments, unit):
    log_rate, dt, y, n = integers(arguments, 4)
    logs, steps, out = at(log_rate, (n,)), at(dt, (n,)), at(y, (n,))
    for i in range(unit * BLOCK, min(n, (unit + 1) * BLOCK)):
        rate = -exp(logs[i])
        out[i] = rate * steps[i] if dt != 0 else rate


@kernel
def _scaled(arguments, unit):
    x, scale, base, y, n, H = integers(arguments, 6)
    D = n // H
    value, factor, start, out = at(x, (H, D)), at(scale, (H,)), at(base, (H, D)), at(y, (H, D))
    for h in range(H):
        for j in range(D):
            product = factor[h] * value[h, j]
            out[h, j] = start[h, j] + product if base != 0 else product


def add(tape: Tape, x: Tensor, z: Tensor, y: Tensor) -> None:
    """y = x + z."""
    tape.step(_add, 1, x, z, y, y.numel())


def silu_gate(tape: Tape, x: Tensor, gate: Tensor, y: Tensor) -> None:
    """y = x * silu(gate)."""
    tape.step(_silu_gate, 1, x, gate, y, y.numel())


def sigmoids(tape: Tape, x: Tensor, scale: float, y: Tensor) -> None:
    """y = scale * sigmoid(x)."""
    tape.step(_sigmoid, 1, x, y, y.numel(), float(scale))


def softplus(
    tape: Tape, x: Tensor, bias: Tensor | None, slope: float, scale: float, y: Tensor
) -> None:
    """y = scale * softplus(slope * (x + bias))."""
    units = -(-y.numel() // BLOCK)
    tape.step(_softplus_unit, units, x, bias, y, y.numel(), float(slope), float(scale))


def rates(tape: Tape, log_rate: Tensor, dt: Tensor | None, y: Tensor) -> None:
    """y = -exp(log_rate) * dt."""
    tape.step(_rates, -(-y.numel() // BLOCK), log_rate, dt, y, y.numel())


def scaled(tape: Tape, x: Tensor, scale: Tensor, base: Tensor | None, y: Tensor) -> None:
    """y = base + scale * x for x, base and y [..., H, D], scale [..., H]; base None is none."""
    tape.step(_scaled, 1, x, scale, base, y, y.numel(), scale.numel())
