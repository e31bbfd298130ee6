"""The layer norm of one token on a tape: float32, each row read from cache."""

# mypy: ignore-errors
from __future__ import annotations

import numpy as np
from torch import Tensor

from subquad.backend.cpu.compile import at
from subquad.backend.cpu.tape import Tape, integers, kernel, real


@kernel
def _unit(arguments, unit):
    x, weight, bias, y, M, D, width, eps = integers(arguments, 8)
    rows, out = at(x, (M, D)), at(y, (M, D))
    weights, biases = at(weight, (width,)), at(bias, (width,))
    for r in range(M):
        x_r, y_r = rows[r], out[r]
        total = np.float32(0.0)
        for j in range(D):
            total += x_r[j]
        mean = total / np.float32(D)
        squares = np.float32(0.0)
        for j in range(D):
            y_r[j] = x_r[j] - mean
            squares += y_r[j] * y_r[j]
        factor = np.float32(1.0 / np.sqrt(squares / np.float32(D) + real(eps)))
        first = r * D % width
        for j in range(D):
            y_r[j] *= factor
        if weight != 0:
            for j in range(D):
                y_r[j] *= weights[first + j]
        if bias != 0:
            for j in range(D):
                y_r[j] += biases[first + j]


def record(
    tape: Tape,
    x: Tensor,
    size: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    y: Tensor,
) -> None:
    """`layer_norm` of contiguous tensors, into y."""
    tape.step(_unit, 1, x, weight, bias, y, x.numel() // size, size, x.shape[-1], float(eps))
