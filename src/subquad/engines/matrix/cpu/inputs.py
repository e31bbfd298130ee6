"""What both compiled chunked forms of the CPU share: their arguments, and how their work is split.

Work is split into units: a sequence, a key head, and a part of the heads that share it.

M tokens of all sequences   R sequences, of the batch or packed   H heads   Hk key heads
G = H / Hk heads that share a key   K key size   V value size   C <= CHUNK tokens of a chunk
"""

# mypy: ignore-errors
from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from subquad.backend.cpu.compile import SLICE, array, jit, over_channels, rows, sequence_bounds
from subquad.backend.cpu.product import aligned
from subquad.engines.matrix.kind import is_per_key

CHUNK = 64  # tokens between starting states that are kept for the backward pass
ZERO, ONE = np.float32(0.0), np.float32(1.0)


class Inputs(NamedTuple):
    """The arguments as all passes read them, made by `prepare`. q, k and v are flat memory and the
    distance between the tokens in it."""

    q: np.ndarray  # [M,Hk*K]
    q_stride: int
    k: np.ndarray  # [M,Hk*K]
    k_stride: int
    v: np.ndarray  # [M,H*V]
    v_stride: int
    log_decay: np.ndarray  # [M,H]; empty for none, and for decays a key channel:
    gates: np.ndarray  # [M,H*K], flat like q; empty for none
    gates_stride: int  # 0 where they are the same for all tokens
    beta: np.ndarray  # [M,H]; empty for none
    scale: np.float32  # of the read
    bounds: np.ndarray  # [R+1] where the rows' tokens begin
    chunks: np.ndarray  # [R+1] where the rows' chunks begin
    Hk: int
    G: int
    K: int
    V: int
    parts: int  # of the heads that share a key


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
) -> Inputs:
    """The operator's arguments as the kernels read them; nothing evenly spaced is copied."""
    B, T, Hk, K = q.shape
    H, V = v.shape[2:]
    bounds = sequence_bounds(B, T, cu_seqlens)
    chunks = np.zeros_like(bounds)
    chunks[1:] = np.cumsum(-(-np.diff(bounds) // CHUNK))
    none = np.empty((0, 0), np.float32)
    wide = log_decay is not None and is_per_key(log_decay)
    gates, gates_stride = rows(log_decay.flatten(-2)) if wide else (none.reshape(-1), 0)
    units, threads = (bounds.size - 1) * Hk, torch.get_num_threads()
    return Inputs(
        *rows(q.flatten(-2)),
        *rows(k.flatten(-2)),
        *rows(v.flatten(-2)),
        none if log_decay is None or wide else array(log_decay).reshape(-1, H),
        gates,
        gates_stride,
        none if beta is None else array(beta).reshape(-1, H),
        np.float32(scale),
        bounds,
        chunks,
        Hk,
        H // Hk,
        K,
        V,
        1 if units >= 2 * threads else min(H // Hk, threads),
    )


def over_units(kernel, x: Inputs, *args) -> None:
    """`kernel(x, *args, first, last)` for all units of work, on torch's number of threads."""
    units = (x.bounds.size - 1) * x.Hk * x.parts
    work = x.bounds[-1] * x.Hk * x.G * x.V * x.K
    over_channels(kernel, units * SLICE, work, x, *args)


@jit
def unit_heads(x, unit):
    """(sequence, key head, part, its first head, the head after its last) of a unit of work.

    Sequences are next to each other: packed ones differ in length, heads do not.
    """
    R = x.bounds.size - 1
    row, shared = unit % R, unit // R
    head, part = shared // x.parts, shared % x.parts
    first = head * x.G
    return row, head, part, first + part * x.G // x.parts, first + (part + 1) * x.G // x.parts


@jit
def load(flat, stride, first, column, size, factor, out):
    """out [tokens,channels] = factor * the `size` channels from `column` on, zeros beyond."""
    count, width = size
    for t in range(count):
        begin = (first + t) * stride + column
        source, row = flat[begin : begin + width], out[t]
        for j in range(width):
            row[j] = factor * source[j]
        row[width:] = ZERO
    out[count:] = ZERO


@jit
def store(x, count, first, column, width, factor, out):
    """out[first:first+count, column:column+width] = factor * x."""
    for t in range(count):
        source, row = x[t], out[first + t]
        for j in range(width):
            row[column + j] = factor * source[j]


@jit
def enter(state, padded_state):
    """Copy a state [K,V] into the corner of a padded one, zeros around it.

    The rest is written too: a NaN of the sequence before has spread into it, 0 * NaN being NaN.
    Number by number: to copy slices numba compiles what it would say if they did not fit.
    """
    K, V = state.shape
    padded_state[:] = ZERO
    for i in range(K):
        source, row = state[i], padded_state[i]
        for j in range(V):
            row[j] = source[j]


@jit
def leave(padded_state, state):
    """Copy a state [K,V] out of the corner of a padded one."""
    for i in range(state.shape[0]):
        source, row = padded_state[i], state[i]
        for j in range(row.size):
            row[j] = source[j]


@jit
def memory(count, rows, columns):
    """Room for that many matrices, each from the begin of a cache line on: [count,rows*columns]."""
    return aligned(count * rows * columns).reshape((count, rows * columns))
