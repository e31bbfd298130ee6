"""The chunked form of the matrix recurrence on the CPU: float32, the state in cache while it walks.

Serves no decay and decays a head, no erase and the delta rule; `forms.py` says the same in PyTorch
for all of them, and writes the formulas down. Two things differ. Chunks are met one after another,
so nothing of a chunk ever leaves the second-level cache. And since the state S at a chunk's start
is then known, the delta rule solves for what its tokens write alone,

    (I + strict(K K^T . decay) diag(beta)) X = V - (K . decay) S

and not for U and W, which are what is left of that without S. With Y = beta X (V without erase):

    O = tril(Q K^T . decay) Y + (Q . decay) S        S <- decay . S + (K . decay)^T Y

M tokens of all sequences   R rows: the batch's, or packed sequences   H heads   Hk key heads
G = H / Hk heads that share a key   K key size   V value size   C <= CHUNK tokens of a chunk

Work is split into units: a row, a key head, and a part of the heads that share it. Matrices of a
chunk are padded with zeros, in tokens and in channels, to what products want: a zero key writes
nothing, a zero log decay keeps the state.
"""

# mypy: ignore-errors
from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from subquad.kernels.cpu import SLICE, array, exp, jit, over_channels, rows, sequence_bounds
from subquad.kernels.product_cpu import (
    LOWER,
    ROWS,
    WHOLE,
    add_product,
    aligned,
    block,
    lower_product,
    padded,
    transpose,
)

CHUNK = 64
ZERO, ONE = np.float32(0.0), np.float32(1.0)


class Inputs(NamedTuple):
    """The arguments as both passes read them, made by `prepare`. q, k and v are flat memory and the
    distance between the tokens in it."""

    q: np.ndarray  # [M,Hk*K]
    q_stride: int
    k: np.ndarray  # [M,Hk*K]
    k_stride: int
    v: np.ndarray  # [M,H*V]
    v_stride: int
    log_decay: np.ndarray  # [M,H]; empty for none
    beta: np.ndarray  # [M,H]; empty for none
    scale: np.float32  # of the read
    bounds: np.ndarray  # [R+1] where the rows' tokens begin
    chunks: np.ndarray  # [R+1] where the rows' chunks begin
    Hk: int
    G: int
    K: int
    V: int
    parts: int  # of the heads that share a key


class Chunk(NamedTuple):
    """A chunk as all heads that share a key see it; m tokens, padded."""

    first: int  # token
    count: int  # of tokens that are not padding
    key: np.ndarray  # [m,K]
    keys: np.ndarray  # [K,m]
    queries: np.ndarray  # [K,m], scaled
    pairs: np.ndarray  # [m,m], the lower triangle of Q K^T
    overlap: np.ndarray  # [m,m], that of K K^T, only for the delta rule


class Head(NamedTuple):
    """What a head writes in a chunk, and how it forgets."""

    weights: np.ndarray  # [m,m], the decay from s to t; its last row: to the chunk's end
    start: np.ndarray  # [m], the decay from the chunk's start
    beta: np.ndarray  # [m], only for the delta rule, as are
    lower: np.ndarray  # [m,m], minus what is below the diagonal of the system that was solved
    seen: np.ndarray  # [m,V], K S
    values: np.ndarray  # [m,V], V without erase, X
    written: np.ndarray  # [m,V], Y


@jit
def unit_heads(x, unit):
    """(row, key head, part, its first head, the head after its last) of a unit of work.

    Rows are next to each other: packed sequences differ in length, heads do not.
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
def load_column(x, first, count, head, out):
    """out [tokens] = numbers a head and token, zeros after `count`."""
    out[:] = ZERO
    for t in range(count):
        out[t] = x[first + t, head]


@jit
def weigh(g, weights, start):
    """weights[t,s] = exp(g_{s+1} + ... + g_t), 0 for s > t; start[t] = exp(g_0 + ... + g_t).

    Every segment is summed by itself: see decay.py.
    """
    total = ZERO
    for t in range(g.size):
        total += g[t]
        start[t] = exp(total)
        row, before = weights[t], weights[t - 1]
        for s in range(t):
            row[s] = before[s] + g[t]
        row[t:] = ZERO
    for t in range(g.size):
        row = weights[t]
        for s in range(t + 1):
            row[s] = exp(row[s])


@jit
def multiply_rows(x, factors, out):
    """out[t] = factors[t] * x[t]."""
    for t in range(x.shape[0]):
        source, row, factor = x[t], out[t], factors[t]
        for j in range(source.size):
            row[j] = factor * source[j]


@jit
def multiply(x, y, out):
    """out = x * y, [m,m]."""
    for t in range(x.shape[0]):
        left, right, row = x[t], y[t], out[t]
        for s in range(row.size):
            row[s] = left[s] * right[s]


@jit
def solve(values, seen, start, overlap, weights, beta, lower):
    """values [m,V], v_t, become X: what the delta rule writes, before beta. `lower` is scratch.

    seen [m,V] = K S; overlap [m,m] = K K^T. Forward substitution, ROWS rows at a time.
    """
    m = values.shape[0]
    for t in range(m):
        row, held, factor = values[t], seen[t], start[t]
        for j in range(row.size):
            row[j] -= factor * held[j]
        source, weight, out = overlap[t], weights[t], lower[t]
        for s in range(t):
            out[s] = -source[s] * weight[s] * beta[s]
        out[t:] = ZERO
    for i in range(0, m, ROWS):
        if i > 0:
            add_product(lower[i : i + ROWS, :i], values[:i], values[i : i + ROWS], WHOLE)
        for t in range(i + 1, i + ROWS):
            row = values[t]
            for s in range(i, t):
                other, factor = values[s], lower[t, s]
                for j in range(row.size):
                    row[j] += factor * other[j]


@jit
def enter(state, padded_state):
    """Copy a state [K,V] into the corner of a padded one, whose rest is and stays zeros."""
    K, V = state.shape
    for i in range(K):
        padded_state[i, :V] = state[i]


@jit
def memory(count, rows, columns):
    """Room for that many matrices, each from the begin of a cache line on: [count,rows*columns]."""
    return aligned(count * rows * columns).reshape((count, rows * columns))


@jit
def read_chunk(x, row, head, n, squares, highs):
    """Chunk n of all, one of that row, for a key head. Uses squares 0, 1 and highs 0 to 2."""
    first = x.bounds[row] + (n - x.chunks[row]) * CHUNK
    count = min(CHUNK, x.bounds[row + 1] - first)
    m, K = padded(count), padded(x.K)
    key, keys, queries = block(highs[0], m, K), block(highs[1], K, m), block(highs[2], K, m)
    pairs, overlap = block(squares[0], m, m), block(squares[1], m, m)
    column, size = head * x.K, (count, x.K)
    load(x.q, x.q_stride, first, column, size, x.scale, key)
    transpose(key, queries)
    load(x.k, x.k_stride, first, column, size, ONE, key)
    transpose(key, keys)
    lower_product(queries.T, keys, pairs)
    if x.beta.size > 0:
        lower_product(key, keys, overlap)
    return Chunk(first, count, key, keys, queries, pairs, overlap)


@jit
def read_head(x, chunk, h, S, squares, broads, columns):
    """What head h writes after a state S. Uses squares 2, 3, broads 0 to 2 and columns 0 to 2."""
    m, V, erases = chunk.key.shape[0], S.shape[1], x.beta.size > 0
    g, beta, start = columns[0, :m], columns[1, :m], columns[2, :m]
    weights, lower = block(squares[2], m, m), block(squares[3], m, m)
    values, seen = block(broads[0], m, V), block(broads[1], m, V)
    written = block(broads[2], m, V) if erases else values
    load(x.v, x.v_stride, chunk.first, h * x.V, (chunk.count, x.V), ONE, values)
    if x.log_decay.size > 0:
        load_column(x.log_decay, chunk.first, chunk.count, h, g)
    weigh(g, weights, start)
    if erases:
        load_column(x.beta, chunk.first, chunk.count, h, beta)
        seen[:] = ZERO
        add_product(chunk.key, S, seen, WHOLE)
        solve(values, seen, start, chunk.overlap, weights, beta, lower)
        multiply_rows(values, beta, written)
    return Head(weights, start, beta, lower, seen, values, written)


@jit
def read_out(chunk, head, S, scores, out):
    """out [m,V]: what a head's tokens read from the state and from each other."""
    out[:] = ZERO
    add_product(chunk.queries.T, S, out, WHOLE)
    multiply_rows(out, head.start, out)
    multiply(chunk.pairs, head.weights, scores)
    add_product(scores, head.written, out, LOWER)


@jit
def _forward(x, initial, o, final, starts, begin, stop):
    """o [M,H*V], final [R,H,K,V] and, if not empty, starts [chunks,H,K,V] from initial [R,H,K,V].

    For units begin/SLICE to stop/SLICE.
    """
    K, V = padded(x.K), padded(x.V)
    squares, highs, broads = memory(5, CHUNK, CHUNK), memory(3, CHUNK, K), memory(4, CHUNK, V)
    columns, states = np.zeros((3, CHUNK), np.float32), memory(x.G, K, V)
    for unit in range(begin // SLICE, stop // SLICE):
        row, key_head, _, h0, h1 = unit_heads(x, unit)
        for h in range(h0, h1):
            enter(initial[row, h], block(states[h - h0], K, V))
        for n in range(x.chunks[row], x.chunks[row + 1]):
            chunk = read_chunk(x, row, key_head, n, squares, highs)
            m = chunk.key.shape[0]
            scores, out = block(squares[4], m, m), block(broads[3], m, V)
            for h in range(h0, h1):
                S = block(states[h - h0], K, V)
                if starts.size > 0:
                    starts[n, h] = S[: x.K, : x.V]
                head = read_head(x, chunk, h, S, squares, broads, columns)
                read_out(chunk, head, S, scores, out)
                for t in range(chunk.count):
                    o[chunk.first + t, h * x.V : (h + 1) * x.V] = out[t, : x.V]
                multiply_rows(head.written, head.weights[m - 1], head.written)
                S *= head.start[m - 1]
                add_product(chunk.keys, head.written, S, WHOLE)
        for h in range(h0, h1):
            final[row, h] = block(states[h - h0], K, V)[: x.K, : x.V]


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None,
) -> Inputs:
    """The arguments of `forward` as the kernels read them; nothing evenly spaced is copied."""
    B, T, Hk, K = q.shape
    H, V = v.shape[2:]
    bounds = sequence_bounds(B, T, cu_seqlens)
    chunks = np.zeros_like(bounds)
    chunks[1:] = np.cumsum(-(-np.diff(bounds) // CHUNK))
    none = np.empty((0, 0), np.float32)
    units, threads = (bounds.size - 1) * Hk, torch.get_num_threads()
    return Inputs(
        *rows(q.flatten(-2)),
        *rows(k.flatten(-2)),
        *rows(v.flatten(-2)),
        none if log_decay is None else array(log_decay).reshape(-1, H),
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


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    state: Tensor,
    cu_seqlens: Tensor | None,
    kept: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """o [B,T,H,V], the final state [R,H,K,V] and the states at the chunks' starts [kept,H,K,V].

    q, k [B,T,Hk,K]; v [B,T,H,V]; log_decay, beta [B,T,H]; state [R,H,K,V]; all float32. `backward`
    needs the states at the starts; `kept` is how many chunks there can be, or 0 to keep none.
    """
    x = prepare(q, k, v, log_decay, beta, scale, cu_seqlens)
    o, final = torch.empty(v.shape), torch.empty(state.shape)
    starts = torch.empty(kept, *state.shape[1:])
    flat = o.view(-1, x.Hk * x.G * x.V)
    over_units(_forward, x, array(state), flat.numpy(), final.numpy(), starts.numpy())
    return o, final, starts
