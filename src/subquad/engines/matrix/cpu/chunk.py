"""One chunk of the matrix recurrence, for one head, in compiled code on the CPU.

No decay and decays a head, no erase and the delta rule; `forms.py` says the same in PyTorch for all
of them, and writes the formulas down. Since the state S at the chunk's start is known here, the
delta rule solves for what its tokens write alone,

    (I + strict(K K^T . decay) diag(beta)) X = V - (K . decay) S

and not for U and W, which are what is left of that without S. With Y = beta X (V without erase):

    O = tril(Q K^T . decay) Y + (Q . decay) S        S <- decay . S + (K . decay)^T Y

Letters as in chunked_inputs_cpu.py. Matrices of a chunk are padded with zeros, in tokens and in
channels, to what products want: a zero key writes nothing, a zero log decay keeps the state.
"""

# mypy: ignore-errors
from __future__ import annotations

from typing import NamedTuple

import numpy as np

from subquad.backend.cpu.compile import exp, jit
from subquad.backend.cpu.product import (
    LOWER,
    ROWS,
    WHOLE,
    add_product,
    block,
    lower_product,
    padded,
)
from subquad.backend.cpu.vectors import transpose
from subquad.engines.matrix.cpu.inputs import CHUNK, ONE, ZERO, load


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

    seen [m,V] = K S; overlap [m,m] = K K^T.
    """
    for t in range(values.shape[0]):
        row, held, factor = values[t], seen[t], start[t]
        for j in range(row.size):
            row[j] -= factor * held[j]
        source, weight, out = overlap[t], weights[t], lower[t]
        for s in range(t):
            out[s] = -source[s] * weight[s] * beta[s]
        out[t:] = ZERO
    substitute(values, lower)


@jit
def substitute(values, lower):
    """values [m,V] become the X of (I - lower) X = values, ROWS rows at a time."""
    for i in range(0, values.shape[0], ROWS):
        if i > 0:
            add_product(lower[i : i + ROWS, :i], values[:i], values[i : i + ROWS], WHOLE)
        for t in range(i + 1, i + ROWS):
            row = values[t]
            for s in range(i, t):
                other, factor = values[s], lower[t, s]
                for j in range(row.size):
                    row[j] += factor * other[j]


@jit
def read_chunk(x, row, head, n, squares, highs):
    """Chunk n of all, one of that sequence, for a key head. Uses squares 0, 1 and highs 0 to 2."""
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
