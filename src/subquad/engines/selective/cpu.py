"""The selective scan on the CPU: float32, one pass over the tokens each way, no [T,D,N] in memory.

M tokens of all sequences   S sequences   D channels   N state numbers a channel   K checkpoints

The forward pass keeps a block of channels' states in the nearest caches while it walks over the
tokens, and saves them every CHUNK tokens. The backward pass walks over the chunks in reverse:
each is recomputed from its checkpoint, then swept backwards.
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
    exp,
    jit,
    over_channels,
    rows,
    sequence_bounds,
)
from subquad.backend.cpu.tape import Tape, integers, kernel

BLOCK = 256  # channels a step: fewer, and the compiled loops are too short; measured with N = 16
CHUNK = 32  # tokens between checkpoints
SILENT = np.float32(1e-30)  # a decoded state this small is zero: denormal numbers are slow


@jit
def _advance(x, dt, A, B, write, before, decay, after):
    """One token: after = exp(dt A) before + dt x B, for a block of channels; arrays [N,w], [w]."""
    for j in range(x.size):
        write[j] = dt[j] * x[j]
    for n in range(A.shape[0]):
        rate, old, kept, new, b = A[n], before[n], decay[n], after[n], B[n]
        for j in range(x.size):
            kept[j] = exp(dt[j] * rate[j])
            new[j] = kept[j] * old[j] + write[j] * b


@jit
def _forward(
    x, x_stride, dt, dt_stride, A, B, C, D, state, bounds,  # the inputs
    y, last_state, checkpoints, start, stop,  # what it fills, for channels start:stop
):  # fmt: skip
    """y [M,D], last_state [S,D,N], checkpoints [K,N,D] or [0,N,D] if none are wanted."""
    N = A.shape[0]
    write = np.empty(BLOCK, np.float32)
    for first in range(start, stop, BLOCK):
        last = min(first + BLOCK, stop)
        w = last - first
        rates = A[:, first:last].copy()
        before, after = np.empty((N, w), np.float32), np.empty((N, w), np.float32)
        decay = np.empty((N, w), np.float32)
        k = 0
        for s in range(bounds.size - 1):
            after[:] = state[s, first:last].T
            for t in range(bounds[s], bounds[s + 1]):
                if checkpoints.shape[0] > 0 and (t - bounds[s]) % CHUNK == 0:
                    checkpoints[k, :, first:last] = after
                    k += 1
                x_t = x[t * x_stride + first : t * x_stride + last]
                dt_t = dt[t * dt_stride + first : t * dt_stride + last]
                before, after = after, before  # in place, the compiler could not vectorise
                _advance(x_t, dt_t, rates, B[t], write, before, decay, after)
                out = y[t, first:last]
                for j in range(w):
                    out[j] = D[first + j] * x_t[j]
                for n in range(N):
                    row, c = after[n], C[t, n]
                    for j in range(w):
                        out[j] += c * row[j]
            last_state[s, first:last] = after.T


@jit
def _retreat(x, dt, A, B, C, dy, before, decay, after, g, dx, ddt, dA, dB, dC):
    """One token of the backward pass; g [N,w] is the gradient of `after`, then of `before`."""
    for j in range(x.size):
        dx[j] = np.float32(0.0)  # for now the gradient of dt x: sum_n g_n B_n
        ddt[j] = np.float32(0.0)
    for n in range(A.shape[0]):
        rate, old, kept, new, grad, total = A[n], before[n], decay[n], after[n], g[n], dA[n]
        b, c = B[n], C[n]
        sum_b, sum_c = np.float32(0.0), np.float32(0.0)
        for j in range(x.size):
            g_j = grad[j] + c * dy[j]
            sum_c += dy[j] * new[j]
            sum_b += g_j * dt[j] * x[j]
            grad[j] = kept[j] * g_j
            exponent = grad[j] * old[j]
            total[j] += exponent * dt[j]
            ddt[j] += exponent * rate[j]
            dx[j] += g_j * b
        dB[n] += sum_b
        dC[n] += sum_c


@jit
def _backward(
    x, x_stride, dt, dt_stride, A, B, C, D, bounds, checkpoints, dy, dy_stride,  # the inputs
    dx, ddt, dA, dD, dstate, start, stop,  # what it fills, for channels start:stop
):  # fmt: skip
    """Fills dx, ddt [M,D], dA [N,D], dD [D] and turns dstate [S,D,N] from the last state's gradient
    into the first's; returns these channels' share of dB and dC [M,N]."""
    N, M = A.shape[0], bounds[-1]
    dB, dC = np.zeros((M, N), np.float32), np.zeros((M, N), np.float32)
    write = np.empty(BLOCK, np.float32)
    for first in range(start, stop, BLOCK):
        last = min(first + BLOCK, stop)
        w = last - first
        rates = A[:, first:last].copy()
        h, decay = np.empty((CHUNK + 1, N, w), np.float32), np.empty((CHUNK, N, w), np.float32)
        g, part_dA = np.empty((N, w), np.float32), np.empty((N, w), np.float32)
        part_dD = np.empty(w, np.float32)
        k = 0
        for s in range(bounds.size - 1):
            chunks = (bounds[s + 1] - bounds[s] + CHUNK - 1) // CHUNK
            g[:] = dstate[s, first:last].T
            for chunk in range(chunks - 1, -1, -1):
                low = bounds[s] + chunk * CHUNK
                high = min(low + CHUNK, bounds[s + 1])
                h[0] = checkpoints[k + chunk, :, first:last]
                for t in range(low, high):
                    i = t - low
                    x_t = x[t * x_stride + first : t * x_stride + last]
                    dt_t = dt[t * dt_stride + first : t * dt_stride + last]
                    _advance(x_t, dt_t, rates, B[t], write, h[i], decay[i], h[i + 1])
                part_dA[:] = np.float32(0.0)
                part_dD[:] = np.float32(0.0)
                for t in range(high - 1, low - 1, -1):
                    i = t - low
                    x_t = x[t * x_stride + first : t * x_stride + last]
                    dt_t = dt[t * dt_stride + first : t * dt_stride + last]
                    dy_t = dy[t * dy_stride + first : t * dy_stride + last]
                    dx_t, ddt_t = dx[t, first:last], ddt[t, first:last]
                    _retreat(
                        x_t, dt_t, rates, B[t], C[t], dy_t, h[i], decay[i], h[i + 1], g,
                        dx_t, ddt_t, part_dA, dB[t], dC[t],
                    )  # fmt: skip
                    for j in range(w):
                        ddt_t[j] += dx_t[j] * x_t[j]
                        dx_t[j] = dx_t[j] * dt_t[j] + D[first + j] * dy_t[j]
                        part_dD[j] += dy_t[j] * x_t[j]
                dA[:, first:last] += part_dA  # in parts: long float32 sums lose digits
                dD[first:last] += part_dD
            k += chunks
            dstate[s, first:last] = g.T
    return dB, dC


@jit
def _step(
    x, dt, A, B, C, D, state, y, new_state,  # addresses
    S, channels, N, start, stop,
):  # fmt: skip
    """One token of each sequence: x, dt, y [S,D], A [D,N], B, C [S,N], D [D], states [S,D,N]."""
    inputs, steps, outputs = at(x, (S, channels)), at(dt, (S, channels)), at(y, (S, channels))
    rates, skip, writers, readers = (
        at(A, (channels, N)),
        at(D, (channels,)),
        at(B, (S, N)),
        at(C, (S, N)),
    )
    old, new = at(state, (S, channels, N)), at(new_state, (S, channels, N))
    for s in range(S):
        for d in range(start, stop):
            total = skip[d] * inputs[s, d]
            write = steps[s, d] * inputs[s, d]
            for n in range(N):
                h = exp(steps[s, d] * rates[d, n]) * old[s, d, n] + write * writers[s, n]
                h = np.float32(0.0) if abs(h) < SILENT else h
                new[s, d, n] = h
                total += readers[s, n] * h
            outputs[s, d] = total


def checkpoint_shape(x: Tensor, A: Tensor, sequences: int) -> tuple[int, ...]:
    """[K,N,D]; K bounds the number of chunks, however these tokens are packed in sequences."""
    tokens = x.shape[0] * x.shape[1]
    return tokens // CHUNK + sequences, A.shape[1], A.shape[0]


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [Bt,T,D], the last state [S,D,N] and, if `save`, the checkpoints to go back from."""
    channels, N = A.shape
    y, last_state = x.new_empty(x.shape), x.new_empty(state.shape)
    K = checkpoint_shape(x, A, state.shape[0])[0] if save else 0
    checkpoints = x.new_empty(K, N, channels)
    over_channels(
        _forward, channels, x.numel() * N,
        *rows(x), *rows(dt), array(A.t()), array(B.reshape(-1, N)), array(C.reshape(-1, N)),
        array(D), array(state), sequence_bounds(x.shape[0], x.shape[1], cu_seqlens),
        as_array(y.view(-1, channels)), as_array(last_state), as_array(checkpoints),
    )  # fmt: skip
    return y, last_state, checkpoints


def backward(
    dy: Tensor,
    dlast: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    checkpoints: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of x, dt, A, B, C, D and the first state from those of y and the last state."""
    channels, N = A.shape
    dx, ddt = x.new_empty(x.shape), x.new_empty(dt.shape)
    dA, dD, dstate = x.new_zeros(N, channels), x.new_zeros(channels), dlast.clone()
    shares = over_channels(
        _backward, channels, x.numel() * N,
        *rows(x), *rows(dt), array(A.t()), array(B.reshape(-1, N)), array(C.reshape(-1, N)),
        array(D), sequence_bounds(x.shape[0], x.shape[1], cu_seqlens), array(checkpoints),
        *rows(dy), as_array(dx.view(-1, channels)), as_array(ddt.view(-1, channels)),
        as_array(dA), as_array(dD), as_array(dstate),
    )  # fmt: skip
    dB = torch.from_numpy(sum(share[0] for share in shares)).view(B.shape)
    dC = torch.from_numpy(sum(share[1] for share in shares)).view(C.shape)
    return dx, ddt, dA.t().contiguous(), dB, dC, dD, dstate


def step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of each sequence, for decoding: y like x and the next state; no gradients.

    x, dt [S,1,D]; A [D,N]; B, C [S,1,N]; D [D]; state [S,D,N].
    """
    y, new_state = x.new_empty(x.shape), x.new_empty(state.shape)
    tensors = [t.contiguous() for t in (x, dt, A, B, C, D, state)]
    tensors += (y, new_state)
    over_channels(_step, A.shape[0], state.numel(), *map(address, tensors), *state.shape)
    return y, new_state


@kernel
def _unit(arguments, unit):
    x, dt, A, B, C, D, state, y, new_state, S, channels, N = integers(arguments, 12)
    start = unit * BLOCK
    stop = min(start + BLOCK, channels)
    _step(x, dt, A, B, C, D, state, y, new_state, S, channels, N, start, stop)


def record(
    tape: Tape,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor,
    y: Tensor,
    new_state: Tensor,
) -> None:
    """`step` of contiguous tensors, into y and new_state."""
    units = -(-A.shape[0] // BLOCK)
    tape.step(_unit, units, x, dt, A, B, C, D, state, y, new_state, *state.shape)
