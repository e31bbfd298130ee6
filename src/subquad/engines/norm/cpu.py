"""The RMS norm on the CPU, with its gate before or after it: float32, inputs read from cache.

In PyTorch the norm is six operations and its gate two more. For one token each of them costs more
to call than to compute; for many each walks over all of them.

M tokens   G groups of a token   D numbers of a group, normalised together
"""

# mypy: ignore-errors
from __future__ import annotations

import numpy as np
from torch import Tensor

from subquad.backend.cpu.compile import (
    SLICE,
    address,
    at,
    evenly_spaced,
    jit,
    over_channels,
    sigmoid,
)
from subquad.backend.cpu.tape import Tape, integers, kernel, real

# Partial sums of squares: shorter than one long float32 sum, and vectors to the compiler.
LANES = 16


@jit
def _mean_square(x):
    partial = np.zeros(LANES, np.float32)
    whole = x.size // LANES * LANES
    for i in range(0, whole, LANES):
        for j in range(LANES):
            partial[j] += x[i + j] * x[i + j]
    total = partial.sum()
    for i in range(whole, x.size):
        total += x[i] * x[i]
    return total / np.float32(x.size)


@jit
def _norm(
    x, stride, gate, gate_stride, weight, weights, y,  # addresses, distances between tokens
    M, G, D, gate_first, eps, scale, start, stop,
):  # fmt: skip
    """y [M,G,D] for rows start/SLICE to stop/SLICE of its M * G; gate and weight may be 0."""
    flat_x = at(x, ((M - 1) * stride + G * D,))
    flat_gate = at(gate, ((M - 1) * gate_stride + G * D,))
    flat_weight, out = at(weight, (weights,)), at(y, (M * G, D))
    for r in range(start // SLICE, stop // SLICE):
        t, first = r // G, r % G * D
        x_r, y_r = flat_x[t * stride + first : t * stride + first + D], out[r]
        g = flat_gate[t * gate_stride + first : t * gate_stride + first + D]
        if gate != 0 and gate_first:
            for j in range(D):
                y_r[j] = x_r[j] * g[j] * sigmoid(g[j])
            x_r = y_r
        factor = np.float32(scale / np.sqrt(_mean_square(x_r) + eps))
        for j in range(D):
            y_r[j] = x_r[j] * factor
        if weight != 0:
            w = flat_weight[first : first + D] if weights > D else flat_weight
            for j in range(D):
                y_r[j] *= w[j]
        if gate != 0 and not gate_first:
            for j in range(D):
                y_r[j] *= g[j] * sigmoid(g[j])


def norm(
    x: Tensor,
    size: int,
    weight: Tensor | None,
    gate: Tensor | None,
    gate_first: bool,
    eps: float,
    scale: float,
) -> Tensor:
    """scale * x / sqrt(mean(x^2) + eps) * weight, gated, over every `size` of the last axis.

    x, gate [..., G * size]; weight [size] or [G * size]. No gradients.
    """
    y = x.new_empty(x.shape)
    numbers, width = x.numel(), x.shape[-1]
    x, stride = evenly_spaced(x)
    gate_stride = 0
    if gate is not None:
        gate, gate_stride = evenly_spaced(gate)
    if weight is not None:
        weight = weight.contiguous()
    over_channels(
        _norm,
        numbers // size * SLICE,  # split by rows: what the splitter takes for a line of channels
        numbers,
        address(x),
        stride,
        address(gate),
        gate_stride,
        address(weight),
        0 if weight is None else weight.shape[0],
        address(y),
        numbers // width,
        width // size,
        size,
        gate_first,
        float(eps),
        float(scale),
    )
    return y


@kernel
def _unit(arguments, unit):
    x, gate, weight, weights, y, M, G, D, gate_first, eps, scale = integers(arguments, 11)
    _norm(
        x, G * D, gate, G * D, weight, weights, y,
        M, G, D, gate_first != 0, real(eps), real(scale), 0, M * G * SLICE,
    )  # fmt: skip


def record(
    tape: Tape,
    x: Tensor,
    size: int,
    weight: Tensor | None,
    gate: Tensor | None,
    gate_first: bool,
    eps: float,
    scale: float,
    y: Tensor,
) -> None:
    """`norm` of contiguous tensors, into y."""
    G = x.shape[-1] // size
    weights = 0 if weight is None else weight.shape[0]
    sizes = (x.numel() // x.shape[-1], G, size, int(gate_first))
    tape.step(_unit, 1, x, gate, weight, weights, y, *sizes, float(eps), float(scale))
