"""Gradients of one chunk, `chunk.py`, for one head: from those of its output and final state.

With A = tril(Q K^T . decay), L = I + strict(K K^T . decay) diag(beta), e the decay from a
token to the chunk's end, and dS the gradient of the state at the chunk's end, a head's chunk gives

    dA = tril(dO Y^T)       dY = A^T dO + e . (K dS)       dK += e . (Y dS^T)
    dS <- decay . dS + (Q . decay)^T dO                    dQ += decay . (dO S^T)
    delta rule: dX = beta . dY,  dV = dR = L^{-T} dX,  dL = -strict(dR X^T)
                dK -= decay . (dR S^T),  dS -= (K . decay)^T dR          (else dV = dY)

and the scores' gradients, summed over the heads that share a key, go to Q and K at the chunk's end.

The gradient of a log decay g_j is the sum over everything that crosses token j: pairs s < j <= t,
reads of the chunk's start by t >= j, writes to its end by s < j, and the state itself. As in the
forward pass these are sums over their own tokens, not differences of longer sums that cancel.

Letters as in inputs.py. Products want their right side by rows, so some matrices are
met transposed, [channels,tokens]: `queries`, `keys`, `written`, `values`, `turned`.
"""

# mypy: ignore-errors
from __future__ import annotations

from typing import NamedTuple

import numpy as np

from subquad.backend.cpu.compile import jit
from subquad.backend.cpu.product import ROWS, UPPER, WHOLE, add_product, lower_product
from subquad.backend.cpu.vectors import transpose
from subquad.engines.matrix.cpu.chunk import multiply, multiply_rows
from subquad.engines.matrix.cpu.inputs import ZERO


@jit
def dot(x, y):
    total = ZERO
    for j in range(x.size):
        total += x[j] * y[j]
    return total


@jit
def dots(x, y, factors, out):
    """out[t] += factors[t] * x[t] . y[t]."""
    for t in range(x.shape[0]):
        out[t] += factors[t] * dot(x[t], y[t])


@jit
def multiply_columns(x, factors, out):
    """out[:,t] = factors[t] * x[:,t]."""
    for i in range(x.shape[0]):
        source, row = x[i], out[i]
        for t in range(factors.size):
            row[t] = factors[t] * source[t]


@jit
def add_columns(x, factors, out):
    """out[:,t] += factors[t] * x[:,t]."""
    for i in range(x.shape[0]):
        source, row = x[i], out[i]
        for t in range(factors.size):
            row[t] += factors[t] * source[t]


@jit
def column_dots(x, y, factors, out):
    """out[t] += factors[t] * x[:,t] . y[:,t]; x and y are [channels,tokens]."""
    for i in range(x.shape[0]):
        left, right = x[i], y[i]
        for t in range(factors.size):
            out[t] += factors[t] * left[t] * right[t]


@jit
def solve_transposed(gradient, lower):
    """gradient [m,V] <- (I - lower)^{-T} gradient, backward substitution; `lower` as `solve` left
    it, minus the strict part of L."""
    m = gradient.shape[0]
    for i in range(m - ROWS, -1, -ROWS):
        below = i + ROWS
        if below < m:
            later = lower[below:, i:below]
            add_product(later.T, gradient[below:], gradient[i:below], WHOLE)
        for s in range(below - 2, i - 1, -1):
            row = gradient[s]
            for t in range(s + 1, below):
                other, factor = gradient[t], lower[t, s]
                for j in range(row.size):
                    row[j] += factor * other[j]


@jit
def pair_gradients(dscores, pairs, weights, diagonal, dpairs, crossing):
    """Of scores [t,s] = pairs * weights, s < t (and s = t with `diagonal`, 1 or 0): add to dpairs
    and, for the decays between s and t, to `crossing`."""
    for t in range(pairs.shape[0]):
        d, pair, weight = dscores[t], pairs[t], weights[t]
        dpair, cross = dpairs[t], crossing[t]
        for s in range(t + diagonal):
            x = d[s] * weight[s]
            dpair[s] += x
            cross[s] += x * pair[s]


@jit
def decay_gradient(crossing, reads, writes, state, out):
    """out[j] = everything that crosses token j; see above. `writes` is used up."""
    later_reads = state
    for j in range(out.size - 1, -1, -1):
        later_reads += reads[j]
        row, total = crossing[j], ZERO
        for s in range(j):
            writes[s] += row[s]
            total += writes[s]
        out[j] = later_reads + total


@jit
def store_transposed(x, rows, first, count, column, width, factor, out):
    """out[first:first+count, column:column+width] = factor * x.T; `rows` [tokens,channels] is
    scratch."""
    transpose(x, rows)
    for t in range(count):
        source, row = rows[t], out[first + t]
        for j in range(width):
            row[column + j] = factor * source[j]


class Shared(NamedTuple):
    """Gradients of what the heads that share a key have in common, summed over them."""

    pairs: np.ndarray  # [m,m], the lower triangle
    overlap: np.ndarray  # [m,m], what is below the diagonal
    queries: np.ndarray  # [K,m]
    keys: np.ndarray  # [K,m]


class Crossing(NamedTuple):
    """What crosses a token, of one head: see `decay_gradient`."""

    pairs: np.ndarray  # [m,m]
    reads: np.ndarray  # [m], of the chunk's start
    writes: np.ndarray  # [m], to the chunk's end


@jit
def through_reads(chunk, head, written, S, dout, shared, crossing, square, side, turned):
    """Of dO [m,V]: to the queries, through S and through the scores. `written` is Y^T."""
    transpose(dout, turned)
    side[:] = ZERO
    add_product(S, turned, side, WHOLE)
    column_dots(chunk.queries, side, head.start, crossing.reads)
    add_columns(side, head.start, shared.queries)
    lower_product(dout, written, square)
    pair_gradients(square, chunk.pairs, head.weights, 1, shared.pairs, crossing.pairs)


@jit
def through_writes(chunk, head, written, dS, dout, shared, crossing, square, turned, dwritten):
    """Of dS at the chunk's end and of dO: to what was written, and to the keys it went under."""
    end = head.weights[-1]
    dwritten[:] = ZERO
    add_product(chunk.key, dS, dwritten, WHOLE)
    dots(dwritten, head.written, end, crossing.writes)
    multiply_rows(dwritten, end, dwritten)
    multiply(chunk.pairs, head.weights, square)
    add_product(square.T, dout, dwritten, UPPER)
    multiply_columns(written, end, turned)
    add_product(dS, turned, shared.keys, WHOLE)


@jit
def to_start(chunk, head, S, dS, dout):
    """dS from the chunk's end to its start, as far as S is kept and read; dO is used up. Returns
    what keeping S adds to the gradient of each decay."""
    kept, through = ZERO, head.start[-1]
    for i in range(S.shape[0]):
        kept += dot(S[i], dS[i])
    dS *= through
    multiply_rows(dout, head.start, dout)
    add_product(chunk.queries, dout, dS, WHOLE)
    return kept * through


@jit
def through_solution(chunk, head, values, S, dS, dvalues, shared, crossing, square, turned, dbeta):
    """dY in `dvalues` becomes dV, by way of dX = beta dY and dR. `values` is X^T."""
    for s in range(dbeta.size):
        dbeta[s] = dot(dvalues[s], head.values[s])
    multiply_rows(dvalues, head.beta, dvalues)
    solve_transposed(dvalues, head.lower)
    lower_product(dvalues, values, square)  # -dL
    for t in range(1, dbeta.size):
        row, pair, weight = square[t], chunk.overlap[t], head.weights[t]
        for s in range(t):
            dbeta[s] -= row[s] * pair[s] * weight[s]
            row[s] *= -head.beta[s]
    pair_gradients(square, chunk.overlap, head.weights, 0, shared.overlap, crossing.pairs)
    forgotten = -head.start  # R = V - (K . decay) S
    dots(dvalues, head.seen, forgotten, crossing.reads)
    dseen = head.seen
    multiply_rows(dvalues, forgotten, dseen)
    transpose(dseen, turned)
    add_product(S, turned, shared.keys, WHOLE)
    add_product(chunk.keys, dseen, dS, WHOLE)


@jit
def through_scores(chunk, shared, erases, square):
    """Of Q K^T and K K^T: to queries and keys."""
    add_product(chunk.queries, shared.pairs, shared.keys, WHOLE)
    transpose(shared.pairs, square)
    add_product(chunk.keys, square, shared.queries, WHOLE)
    if erases:
        add_product(chunk.keys, shared.overlap, shared.keys, WHOLE)
        transpose(shared.overlap, square)
        add_product(chunk.keys, square, shared.keys, WHOLE)
