"""Gradients of `chunked_cpu`: the chunks from the last to the first, with that of the state.

Saved are the inputs and the states at the chunks' starts; what a chunk computes inside is computed
again. With A = tril(Q K^T . decay), L = I + strict(K K^T . decay) diag(beta), e the decay from a
token to the chunk's end, and dS the gradient of the state at the chunk's end, a head's chunk gives

    dA = tril(dO Y^T)       dY = A^T dO + e . (K dS)       dK += e . (Y dS^T)
    dS <- decay . dS + (Q . decay)^T dO                    dQ += decay . (dO S^T)
    delta rule: dX = beta . dY,  dV = dR = L^{-T} dX,  dL = -strict(dR X^T)
                dK -= decay . (dR S^T),  dS -= (K . decay)^T dR          (else dV = dY)

and the scores' gradients, summed over the heads that share a key, go to Q and K at the chunk's end.

The gradient of a log decay g_j is the sum over everything that crosses token j: pairs s < j <= t,
reads of the chunk's start by t >= j, writes to its end by s < j, and the state itself. As in the
forward pass these are sums over their own tokens, not differences of longer sums that cancel.

Letters as in chunked_cpu.py. Products want their right side by rows, so some matrices are met
transposed, [channels,tokens]: `queries`, `keys`, `written`, `values`, `turned`.
"""

# mypy: ignore-errors
from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from subquad.kernels.chunked_cpu import (
    CHUNK,
    ONE,
    ZERO,
    enter,
    load,
    memory,
    multiply,
    multiply_rows,
    over_units,
    prepare,
    read_chunk,
    read_head,
    unit_heads,
)
from subquad.kernels.cpu import SLICE, array, jit, rows
from subquad.kernels.product_cpu import (
    ROWS,
    UPPER,
    WHOLE,
    add_product,
    block,
    lower_product,
    padded,
    transpose,
)


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
def _through_reads(chunk, head, written, S, dout, shared, crossing, square, side, turned):
    """Of dO [m,V]: to the queries, through S and through the scores. `written` is Y^T."""
    transpose(dout, turned)
    side[:] = ZERO
    add_product(S, turned, side, WHOLE)
    column_dots(chunk.queries, side, head.start, crossing.reads)
    add_columns(side, head.start, shared.queries)
    lower_product(dout, written, square)
    pair_gradients(square, chunk.pairs, head.weights, 1, shared.pairs, crossing.pairs)


@jit
def _through_writes(chunk, head, written, dS, dout, shared, crossing, square, turned, dwritten):
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
def _to_start(chunk, head, S, dS, dout):
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
def _through_solution(chunk, head, values, S, dS, dvalues, shared, crossing, square, turned, dbeta):
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
def _through_scores(chunk, shared, erases, square):
    """Of Q K^T and K K^T: to queries and keys."""
    add_product(chunk.queries, shared.pairs, shared.keys, WHOLE)
    transpose(shared.pairs, square)
    add_product(chunk.keys, square, shared.queries, WHOLE)
    if erases:
        add_product(chunk.keys, shared.overlap, shared.keys, WHOLE)
        transpose(shared.overlap, square)
        add_product(chunk.keys, square, shared.keys, WHOLE)


@jit
def _backward(x, starts, do, do_stride, dfinal, dq, dk, dv, dg, dbetas, dinitial, begin, stop):
    """dq, dk [parts,M,Hk*K]; dv [M,H*V]; dg, dbetas [M,H]; dinitial [R,H,K,V] from do and dfinal.

    For units begin/SLICE to stop/SLICE.
    """
    erases, K, V = x.beta.size > 0, padded(x.K), padded(x.V)
    squares, highs, broads = memory(8, CHUNK, CHUNK), memory(6, CHUNK, K), memory(8, CHUNK, V)
    columns, states = np.zeros((6, CHUNK), np.float32), memory(x.G + 1, K, V)
    S = block(states[x.G], K, V)
    for unit in range(begin // SLICE, stop // SLICE):
        row, key_head, part, h0, h1 = unit_heads(x, unit)
        for h in range(h0, h1):
            enter(dfinal[row, h], block(states[h - h0], K, V))
        for n in range(x.chunks[row + 1] - 1, x.chunks[row] - 1, -1):
            chunk = read_chunk(x, row, key_head, n, squares, highs)
            m, first, count = chunk.key.shape[0], chunk.first, chunk.count
            square, side = block(squares[4], m, m), block(highs[5], K, m)
            shared = Shared(
                block(squares[5], m, m),
                block(squares[6], m, m),
                block(highs[3], K, m),
                block(highs[4], K, m),
            )
            crossing = Crossing(block(squares[7], m, m), columns[3, :m], columns[4, :m])
            dout, dvalues = block(broads[3], m, V), block(broads[4], m, V)
            written, values = block(broads[5], V, m), block(broads[6], V, m)
            turned, column = block(broads[7], V, m), columns[5, :m]
            for total in shared:
                total[:] = ZERO
            for h in range(h0, h1):
                dS = block(states[h - h0], K, V)
                enter(starts[n, h], S)
                head = read_head(x, chunk, h, S, squares, broads, columns)
                transpose(head.written, written)
                load(do, do_stride, first, h * x.V, (count, x.V), ONE, dout)
                crossing.pairs[:] = ZERO
                crossing.reads[:], crossing.writes[:] = ZERO, ZERO
                sums = (shared, crossing, square)
                _through_reads(chunk, head, written, S, dout, *sums, side, turned)
                _through_writes(chunk, head, written, dS, dout, *sums, turned, dvalues)
                kept = _to_start(chunk, head, S, dS, dout)
                if erases:
                    transpose(head.values, values)
                    _through_solution(chunk, head, values, S, dS, dvalues, *sums, turned, column)
                    for t in range(count):
                        dbetas[first + t, h] = column[t]
                for t in range(count):
                    dv[first + t, h * x.V : (h + 1) * x.V] = dvalues[t, : x.V]
                if x.log_decay.size > 0:
                    decay_gradient(crossing.pairs, crossing.reads, crossing.writes, kept, column)
                    for t in range(count):
                        dg[first + t, h] = column[t]
            _through_scores(chunk, shared, erases, square)
            begins, key = key_head * x.K, chunk.key
            store_transposed(shared.queries, key, first, count, begins, x.K, x.scale, dq[part])
            store_transposed(shared.keys, key, first, count, begins, x.K, ONE, dk[part])
        for h in range(h0, h1):
            dinitial[row, h] = block(states[h - h0], K, V)[: x.K, : x.V]


def backward(
    do: Tensor,
    dfinal: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    starts: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay, beta (empty for None) and the initial state.

    do [B,T,H,V] and dfinal [R,H,K,V] are those of the output and the final state; the others went
    into `forward`, and `starts` came out of it.
    """
    x = prepare(q, k, v, log_decay, beta, scale, cu_seqlens)
    M, H = int(x.bounds[-1]), x.Hk * x.G
    dq, dk = torch.empty(x.parts, M, x.Hk * x.K), torch.empty(x.parts, M, x.Hk * x.K)
    dv, dinitial = torch.empty(v.shape), torch.empty(dfinal.shape)
    dg, dbeta = (torch.empty(0 if y is None else M, H) for y in (log_decay, beta))
    over_units(
        _backward, x, starts.numpy(), *rows(do.flatten(-2)), array(dfinal),
        dq.numpy(), dk.numpy(), dv.view(M, -1).numpy(), dg.numpy(), dbeta.numpy(), dinitial.numpy(),
    )  # fmt: skip
    dq, dk = (d.sum(0) if x.parts > 1 else d[0] for d in (dq, dk))
    dg, dbeta = (d if d.shape[0] == 0 else d.view(v.shape[:3]) for d in (dg, dbeta))
    return dq.view(q.shape), dk.view(k.shape), dv, dg, dbeta, dinitial
