"""A projection of one token on the CPU: a matrix times a vector, float32, bound by memory.

Eight rows at once, because one core then reads eight streams and gets more of the memory's speed
than from one.   N rows   K columns
"""

# mypy: ignore-errors
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from subquad.backend.cpu.compile import address, at, jit
from subquad.backend.cpu.pages import enlarge_pages
from subquad.backend.cpu.tape import Tape, integers, kernel
from subquad.backend.cpu.team import share, team

MOST_ROWS = 128  # of a unit: in longer runs one core reads faster, but the last one is waited for


@jit
def _rows(x, w, bias, y, first, last):
    """y[r] = w[r] . x + bias[r] for first <= r < last; bias may be empty."""
    K = x.size
    whole = first + (last - first) // 8 * 8
    for r in range(first, whole, 8):
        a = b = c = d = e = f = g = h = np.float32(0.0)
        for k in range(K):
            x_k = x[k]
            a += w[r, k] * x_k
            b += w[r + 1, k] * x_k
            c += w[r + 2, k] * x_k
            d += w[r + 3, k] * x_k
            e += w[r + 4, k] * x_k
            f += w[r + 5, k] * x_k
            g += w[r + 6, k] * x_k
            h += w[r + 7, k] * x_k
        y[r], y[r + 1], y[r + 2], y[r + 3] = a, b, c, d
        y[r + 4], y[r + 5], y[r + 6], y[r + 7] = e, f, g, h
    for r in range(whole, last):
        a = np.float32(0.0)
        for k in range(K):
            a += w[r, k] * x[k]
        y[r] = a
    if bias.size > 0:
        for r in range(first, last):
            y[r] += bias[r]


@kernel
def _unit(arguments, unit):
    x, w, bias, y, N, K, rows = integers(arguments, 7)
    first = unit * rows
    offset = at(bias, (N if bias != 0 else 0,))
    _rows(at(x, (K,)), at(w, (N, K)), offset, at(y, (N,)), first, min(first + rows, N))


def record(tape: Tape, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """y [N] = weight [N,K] x [K] + bias [N]."""
    N, K = weight.shape
    rows = _unit_rows(N)
    tape.step(_unit, -(-N // rows), x, weight, bias, y, N, K, rows)


def _unit_rows(N: int) -> int:
    """Rows of a unit: about four units for each thread, and eight streams in each."""
    rows = N // (4 * torch.get_num_threads())
    return min(max(rows // 8 * 8, 8), MOST_ROWS)


@jit
def _now(board, helpers, unit, x, w, bias, y, N, K, rows):
    arguments = np.array([x, w, bias, y, N, K, rows])
    share(board, helpers, unit, arguments.ctypes.data, -(-N // rows))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] of one row, weight [N,K], bias [N] -> [..., N]; no gradients."""
    N, K = weight.shape
    x, weight = x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty(*x.shape[:-1], N)
    enlarge_pages((weight,))
    _now(*team().ready(), _unit, *map(address, (x, weight, bias, y)), N, K, _unit_rows(N))
    return y
