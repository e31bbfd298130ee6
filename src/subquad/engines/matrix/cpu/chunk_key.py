"""One block of the matrix recurrence with decays a key channel, for one head, compiled on the CPU.

Blocks of BLOCK tokens, and the state S is known at each one's start. With a_t = exp(g_t), one
number a channel, P_t = a_0 ... a_t from the block's start and E_s = a_{s+1} ... from s to its end:

    A_ts = sum over the channels of q_t k_s a_{s+1} ... a_t
    O = tril(A) Y + (Q . P) S        S <- e^{sum of g} . S + (K . E)^T Y

where Y = V without erase. The delta rule, with B like A but of keys with keys, writes Y = beta X:

    (I + strict(B) diag(beta)) X = V - (K . P) S

This is exact for any gates: products of numbers in [0, 1] neither overflow nor cancel, and those of
one block are few. Only the state goes through all blocks, so what it keeps of a block is the
exponential of a sum: products of rounded factors would drift away.

The blocks are short because the pairs in a block are met one by one, channel by channel; all else
is products of matrices, and with the state in cache these are as few as in a longer chunk.

Letters as in chunked_inputs_cpu.py; c = BLOCK. Matrices are padded with zeros, in tokens and in
channels, to what products want: a zero key writes nothing, a zero log decay keeps the state.
"""

# mypy: ignore-errors
from __future__ import annotations

from typing import NamedTuple

import numpy as np

from subquad.backend.cpu.compile import exp, jit
from subquad.backend.cpu.product import LOWER, WHOLE, add_product, block, padded
from subquad.backend.cpu.vectors import transpose
from subquad.engines.matrix.cpu.chunk import load_column, multiply, multiply_rows, substitute
from subquad.engines.matrix.cpu.inputs import CHUNK, ONE, ZERO, enter, load, memory
from subquad.engines.matrix.cpu.pairs import BLOCK, pair_scores


@jit
def part(matrix, begin):
    """The rows, or numbers, of one block of a chunk's."""
    return matrix[begin : begin + BLOCK]


class Tokens(NamedTuple):
    """Queries and keys of a chunk, as all heads that share them see them."""

    first: int  # token
    count: int  # of tokens that are not padding
    queries: np.ndarray  # [C,K], scaled
    keys: np.ndarray  # [C,K]
    turned_queries: np.ndarray  # [K,C]
    turned_keys: np.ndarray  # [K,C]


class Block(NamedTuple):
    """What a head's gates and values make of a block; or of several, one below the other."""

    decay: np.ndarray  # [c,K], a
    start: np.ndarray  # [c,K], P
    end: np.ndarray  # [c,K], E
    kept: np.ndarray  # [1,K], of the state
    scores: np.ndarray  # [c,c], the lower triangle of A
    values: np.ndarray  # [c,V], Y
    beta: np.ndarray  # [c], only for the delta rule, as are
    overlap: np.ndarray  # [c,c], the lower triangle of B
    lower: np.ndarray  # [c,c], minus what is below the diagonal of the system that was solved
    solved: np.ndarray  # [c,V], X


@jit
def room(blocks, K, V):
    """Memory for so many blocks."""
    m = blocks * BLOCK
    highs, kept = memory(3, m, K), np.empty((blocks, K), np.float32)
    squares, broads = memory(3, m, BLOCK), memory(2, m, V)
    return Block(
        block(highs[0], m, K),
        block(highs[1], m, K),
        block(highs[2], m, K),
        kept,
        block(squares[0], m, BLOCK),
        block(broads[0], m, V),
        np.zeros(m, np.float32),
        block(squares[1], m, BLOCK),
        block(squares[2], m, BLOCK),
        block(broads[1], m, V),
    )


@jit
def one_block(blocks, begin):
    """The one of them that begins with that token."""
    n = begin // BLOCK
    return Block(
        part(blocks.decay, begin),
        part(blocks.start, begin),
        part(blocks.end, begin),
        blocks.kept[n : n + 1],
        part(blocks.scores, begin),
        part(blocks.values, begin),
        part(blocks.beta, begin),
        part(blocks.overlap, begin),
        part(blocks.lower, begin),
        part(blocks.solved, begin),
    )


@jit
def read_tokens(x, row, n, head, highs):
    """Chunk n of all, one of that sequence, for a key head. Uses highs 0 to 3."""
    K, first = padded(x.K), x.bounds[row] + (n - x.chunks[row]) * CHUNK
    count = min(CHUNK, x.bounds[row + 1] - first)
    queries, keys = block(highs[0], CHUNK, K), block(highs[1], CHUNK, K)
    turned_queries, turned_keys = block(highs[2], K, CHUNK), block(highs[3], K, CHUNK)
    column, size = head * x.K, (count, x.K)
    load(x.q, x.q_stride, first, column, size, x.scale, queries)
    load(x.k, x.k_stride, first, column, size, ONE, keys)
    transpose(queries, turned_queries)
    transpose(keys, turned_keys)
    return Tokens(first, count, queries, keys, turned_queries, turned_keys)


@jit
def accumulate(decay, start, end, kept):
    """`decay` [c,K], log decays, become decays; the others are made from them: see Block."""
    last = decay.shape[0] - 1
    kept[:] = ZERO
    for t in range(last + 1):
        row = decay[t]
        for j in range(kept.size):
            kept[j] += row[j]
            row[j] = exp(row[j])
    for j in range(kept.size):
        kept[j] = exp(kept[j])
    for j in range(kept.size):
        start[0, j], end[last, j] = decay[0, j], ONE
    for t in range(1, last + 1):
        before, factor, row = start[t - 1], decay[t], start[t]
        for j in range(row.size):
            row[j] = before[j] * factor[j]
    for s in range(last, 0, -1):
        after, factor, row = end[s], decay[s], end[s - 1]
        for j in range(row.size):
            row[j] = after[j] * factor[j]


@jit
def read_block(x, chunk, b, h, S, own, moved, turned):
    """Fill `own`: what head h makes, after a state S, of the block from the chunk's token b on.

    moved [c,K] and turned [K,c] are scratch.
    """
    first, count = chunk.first + b, min(BLOCK, chunk.count - b)
    queries, keys = chunk.turned_queries[:, b : b + BLOCK], chunk.turned_keys[:, b : b + BLOCK]
    load(x.gates, x.gates_stride, first, h * x.K, (count, x.K), ONE, own.decay)
    load(x.v, x.v_stride, first, h * x.V, (count, x.V), ONE, own.values)
    accumulate(own.decay, own.start, own.end, own.kept[0])
    transpose(own.decay, turned)
    pair_scores(queries, keys, turned, own.scores)
    if x.beta.size > 0:
        load_column(x.beta, first, count, h, own.beta)
        pair_scores(keys, keys, turned, own.overlap)
        solve(part(chunk.keys, b), own, S, moved)


@jit
def solve(keys, own, S, moved):
    """own.values, V, become what the delta rule writes. `moved` [c,K] is scratch."""
    for t in range(BLOCK):
        row, source = own.lower[t], own.overlap[t]
        for s in range(t):
            row[s] = -source[s] * own.beta[s]
        row[t:] = ZERO
        key, factor, out = keys[t], own.start[t], moved[t]
        for j in range(out.size):
            out[j] = -key[j] * factor[j]
    enter(own.values, own.solved)
    add_product(moved, S, own.solved, WHOLE)
    substitute(own.solved, own.lower)
    multiply_rows(own.solved, own.beta, own.values)


@jit
def read_out(queries, own, S, moved, out):
    """out [c,V]: what the tokens read from the state and from each other."""
    out[:] = ZERO
    multiply(queries, own.start, moved)
    add_product(moved, S, out, WHOLE)
    add_product(own.scores, own.values, out, LOWER)


@jit
def pass_on(keys, own, S, moved):
    """S from the block's start to its end."""
    keep(own, S)
    multiply(keys, own.end, moved)
    add_product(moved.T, own.values, S, WHOLE)


@jit
def keep(own, S):
    """S [K,V], decayed from the block's start to its end; or a gradient the other way."""
    for i in range(S.shape[0]):
        row, factor = S[i], own.kept[0, i]
        for j in range(row.size):
            row[j] *= factor
