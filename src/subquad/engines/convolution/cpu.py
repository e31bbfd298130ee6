"""The causal depthwise short convolution on the CPU: float32, SiLU fused in, one pass each way.

    M tokens of all sequences   S sequences   D channels   W taps

A token reads its own input and the W-1 before it; the first W-1 tokens of a sequence read the rest
from its state. The backward pass recomputes what it needs from the inputs and saves nothing else.
"""

# mypy: ignore-errors
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from subquad.backend.cpu.compile import (
    address,
    array,
    as_array,
    at,
    jit,
    over_channels,
    rows,
    sequence_bounds,
    sigmoid,
)
from subquad.backend.cpu.tape import Tape, integers, kernel

BLOCK = 256  # channels a step: the W + 2 rows in play stay in the first-level cache
FLUSH = 128  # tokens summed into float32 partial sums before these join the total


@jit
def _source(x, stride, state, s, W, low, p, first, last):
    """Channels first:last of the input at position p, which may lie before the sequence."""
    if p >= low:
        return x[p * stride + first : p * stride + last]
    return state[s, p - low + W - 1, first:last]


@jit
def _forward(x, stride, weight, bias, state, bounds, silu, y, start, stop):
    """y [M,D] from x (flat rows), weight [W,D], bias [D], state [S,W-1,D]; channels start:stop."""
    W = weight.shape[0]
    for first in range(start, stop, BLOCK):
        last = min(first + BLOCK, stop)
        for s in range(bounds.size - 1):
            low = bounds[s]
            for t in range(low, bounds[s + 1]):
                out = y[t, first:last]
                out[:] = bias[first:last]
                for w in range(W):
                    source = _source(x, stride, state, s, W, low, t - W + 1 + w, first, last)
                    tap = weight[w, first:last]
                    for j in range(out.size):
                        out[j] += tap[j] * source[j]
                if silu:
                    for j in range(out.size):
                        out[j] *= sigmoid(out[j])


@jit
def _pre_activation_gradient(x, stride, weight, bias, state, s, low, t, first, last, d):
    """Turn d, the gradient of SiLU's output at token t, into that of its input."""
    W = weight.shape[0]
    z = bias[first:last].copy()
    for w in range(W):
        source = _source(x, stride, state, s, W, low, t - W + 1 + w, first, last)
        tap = weight[w, first:last]
        for j in range(d.size):
            z[j] += tap[j] * source[j]
    for j in range(d.size):
        g = sigmoid(z[j])
        d[j] *= g * (np.float32(1.0) + z[j] * (np.float32(1.0) - g))


@jit
def _backward(
    x,
    stride,
    weight,
    bias,
    state,
    bounds,
    silu,  # as in the forward pass
    dy,
    dy_stride,
    dx,
    dweight,
    dbias,
    dstate,
    start,
    stop,
):
    """Gradients of x, weight, bias and state (all given as zeros) from that of y."""
    W = weight.shape[0]
    for first in range(start, stop, BLOCK):
        last = min(first + BLOCK, stop)
        part = np.zeros((W + 1, last - first), np.float32)  # of weight's taps, then of bias
        since_flush = 0
        for s in range(bounds.size - 1):
            low = bounds[s]
            for t in range(low, bounds[s + 1]):
                d = dy[t * dy_stride + first : t * dy_stride + last].copy()
                if silu:
                    _pre_activation_gradient(
                        x, stride, weight, bias, state, s, low, t, first, last, d
                    )
                for w in range(W):
                    p = t - W + 1 + w
                    source = _source(x, stride, state, s, W, low, p, first, last)
                    past = p - low + W - 1
                    target = dx[p, first:last] if p >= low else dstate[s, past, first:last]
                    tap = weight[w, first:last]
                    total = part[w]
                    for j in range(d.size):
                        target[j] += tap[j] * d[j]
                        total[j] += source[j] * d[j]
                for j in range(d.size):
                    part[W, j] += d[j]
                since_flush += 1
                if since_flush == FLUSH or t == bounds[-1] - 1:
                    dweight[:, first:last] += part[:W]
                    dbias[first:last] += part[W]
                    part[:] = np.float32(0.0)
                    since_flush = 0


@jit
def _step(x, weight, bias, state, y, new_state, S, D, W, silu, start, stop):  # addresses, sizes
    """One token of each sequence: x, y [S,D], weight [D,W], bias [D] or 0, states [S,W-1,D]."""
    inputs, outputs, taps, offset = at(x, (S, D)), at(y, (S, D)), at(weight, (D, W)), at(bias, (D,))
    past, old, new = W - 1, at(state, (S, W - 1, D)), at(new_state, (S, W - 1, D))
    for s in range(S):
        out, now = outputs[s, start:stop], inputs[s, start:stop]
        if W == 4:  # nearly every model: a width that the compiler knows, it can vectorise
            four, a, b, c = at(weight, (D * 4,)), old[s, 0], old[s, 1], old[s, 2]
            for j in range(start, stop):
                before = four[4 * j] * a[j] + four[4 * j + 1] * b[j]
                out[j - start] = before + four[4 * j + 2] * c[j] + four[4 * j + 3] * now[j - start]
        else:
            for j in range(out.size):
                out[j] = taps[start + j, past] * now[j]
            for w in range(past):
                for j in range(out.size):
                    out[j] += taps[start + j, w] * old[s, w, start + j]
        if bias != 0:
            for j in range(out.size):
                out[j] += offset[start + j]
        if silu:
            for j in range(out.size):
                out[j] *= sigmoid(out[j])
        for w in range(past - 1):
            new[s, w, start:stop] = old[s, w + 1, start:stop]
        if past > 0:
            new[s, past - 1, start:stop] = now


def _offset(bias: Tensor | None, D: int) -> np.ndarray:
    return np.zeros(D, np.float32) if bias is None else array(bias)


def _prepare(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, cu_seqlens: Tensor | None
):
    B, T, D = x.shape
    bounds = sequence_bounds(B, T, cu_seqlens)
    return *rows(x), array(weight.t()), _offset(bias, D), array(state), bounds


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> Tensor:
    """y [B,T,D] of x [B,T,D], weight [D,W], bias [D], state [S,W-1,D], all float32."""
    y = x.new_empty(x.shape, dtype=torch.float32)
    inputs = _prepare(x, weight, bias, state, cu_seqlens)
    over_channels(_forward, x.shape[2], x.numel(), *inputs, silu, as_array(y.view(-1, x.shape[2])))
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x [B,T,D], weight [D,W], bias [D] and state [S,W-1,D] from that of y."""
    D = x.shape[2]
    dx, dtaps = x.new_zeros(x.shape), x.new_zeros(weight.shape[1], D)
    dbias, dstate = x.new_zeros(D), x.new_zeros(state.shape)
    inputs = _prepare(x, weight, bias, state, cu_seqlens)
    outputs = (as_array(g) for g in (dx.view(-1, D), dtaps, dbias, dstate))
    over_channels(_backward, D, x.numel(), *inputs, silu, *rows(dy), *outputs)
    return dx, dtaps.t().contiguous(), dbias, dstate


def step(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, silu: bool
) -> tuple[Tensor, Tensor]:
    """One token of each sequence, for decoding: y like x and the next state; no gradients.

    x [S,1,D] or packed [1,S,D]; weight [D,W]; bias [D]; state [S,W-1,D].
    """
    y, new_state = x.new_empty(x.shape), x.new_empty(state.shape)
    D, W = weight.shape
    x, weight, state = x.contiguous(), weight.contiguous(), state.contiguous()
    bias = None if bias is None else bias.contiguous()
    tensors = (x, weight, bias, state, y, new_state)
    sizes = (state.shape[0], D, W)
    over_channels(_step, D, x.numel(), *map(address, tensors), *sizes, silu)
    return y, new_state


@kernel
def _unit(arguments, unit):
    x, weight, bias, state, y, new_state, S, D, W, silu = integers(arguments, 10)
    start = unit * BLOCK
    stop = min(start + BLOCK, D)
    _step(x, weight, bias, state, y, new_state, S, D, W, silu != 0, start, stop)


def record(
    tape: Tape,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    silu: bool,
    y: Tensor,
    new_state: Tensor,
) -> None:
    """`step` of contiguous tensors, into y and new_state."""
    D, W = weight.shape
    tensors = (x, weight, bias, state, y, new_state)
    tape.step(_unit, -(-D // BLOCK), *tensors, state.shape[0], D, W, int(silu))
