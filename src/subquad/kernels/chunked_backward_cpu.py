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

Letters as in chunked_cpu.py. `keys`, `queries`, ... are transposed, [channels,tokens]: a product
wants its right side by rows, and those of Q K^T and its gradients run over tokens.
"""

# mypy: ignore-errors
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from subquad.kernels.chunked_cpu import (
    CHUNK,
    chunk_tokens,
    enter,
    gates,
    load,
    multiply,
    multiply_rows,
    over_units,
    prepare,
    solve,
    unit_heads,
)
from subquad.kernels.cpu import SLICE, array, jit, rows
from subquad.kernels.product_cpu import (
    ROWS,
    UPPER,
    WHOLE,
    add_product,
    aligned,
    block,
    lower_product,
    padded,
    transpose,
)

ZERO, ONE = np.float32(0.0), np.float32(1.0)


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
def pair_gradients(dscores, pairs, weights, factors, diagonal, dpairs, crossing):
    """Of scores [t,s] = pairs * weights * factors of the columns, s < t (and s = t with `diagonal`,
    1 or 0): add to dpairs and, for the decays between s and t, to `crossing`."""
    for t in range(pairs.shape[0]):
        d, pair, weight = dscores[t], pairs[t], weights[t]
        dpair, cross = dpairs[t], crossing[t]
        for s in range(t + diagonal):
            x = d[s] * weight[s] * factors[s]
            dpair[s] += x
            cross[s] += x * pair[s]


@jit
def beta_gradient(dvalues, values, dlower, overlap, weights, out):
    """out[s] = dY_s . X_s - sum over t > s of dlower * overlap * weights."""
    for t in range(out.size):
        out[t] = dot(dvalues[t], values[t])
    for t in range(1, out.size):
        d, pair, weight = dlower[t], overlap[t], weights[t]
        for s in range(t):
            out[s] -= d[s] * pair[s] * weight[s]


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


@jit
def _backward(x, starts, do, do_stride, dfinal, dq, dk, dv, dg, dbetas, dinitial, begin, stop):
    """dq, dk [parts,M,Hk*K]; dv [M,H*V]; dg, dbetas [M,H]; dinitial [R,H,K,V] from do and dfinal.

    For units begin/SLICE to stop/SLICE.
    """
    erases = x.beta.size > 0
    wide, tall = padded(x.V), padded(x.K)
    squares, broads = aligned(9 * CHUNK * CHUNK), aligned(8 * CHUNK * wide)
    highs, columns = aligned(6 * CHUNK * tall), aligned(8 * CHUNK)
    S, dstates = block(aligned(tall * wide), tall, wide), aligned(x.G * tall * wide)
    ones = np.ones(CHUNK, np.float32)
    for unit in range(begin // SLICE, stop // SLICE):
        row, head, part, h0, h1 = unit_heads(x, unit)
        dstates[:] = ZERO
        for h in range(h0, h1):
            enter(dfinal[row, h], block(dstates[(h - h0) * tall * wide :], tall, wide))
        for n in range(x.chunks[row + 1] - 1, x.chunks[row] - 1, -1):
            first, count, m = chunk_tokens(x, row, n)
            pairs, overlap, weights, scores, lower, dscores, dpairs, doverlap, crossing = (
                block(squares[0 * m * m :], m, m),
                block(squares[1 * m * m :], m, m),
                block(squares[2 * m * m :], m, m),
                block(squares[3 * m * m :], m, m),
                block(squares[4 * m * m :], m, m),
                block(squares[5 * m * m :], m, m),
                block(squares[6 * m * m :], m, m),
                block(squares[7 * m * m :], m, m),
                block(squares[8 * m * m :], m, m),
            )
            values, seen, written, dout, dvalues = (
                block(broads[0 * m * wide :], m, wide),
                block(broads[1 * m * wide :], m, wide),
                block(broads[2 * m * wide :], m, wide),
                block(broads[3 * m * wide :], m, wide),
                block(broads[4 * m * wide :], m, wide),
            )
            values_t, written_t, side_t = (
                block(broads[5 * m * wide :], wide, m),
                block(broads[6 * m * wide :], wide, m),
                block(broads[7 * m * wide :], wide, m),
            )
            key, queries, keys, dqueries, dkeys, side = (
                block(highs[0 * m * tall :], m, tall),
                block(highs[1 * m * tall :], tall, m),
                block(highs[2 * m * tall :], tall, m),
                block(highs[3 * m * tall :], tall, m),
                block(highs[4 * m * tall :], tall, m),
                block(highs[5 * m * tall :], tall, m),
            )
            g, beta, start, reads, writes, dcolumn, negative = (
                columns[0 * CHUNK :][:m],
                columns[1 * CHUNK :][:m],
                columns[2 * CHUNK :][:m],
                columns[3 * CHUNK :][:m],
                columns[4 * CHUNK :][:m],
                columns[5 * CHUNK :][:m],
                columns[6 * CHUNK :][:m],
            )
            g[:] = ZERO
            size = (count, x.K)
            load(x.q, x.q_stride, first, head * x.K, size, x.scale, key)
            transpose(key, queries)
            load(x.k, x.k_stride, first, head * x.K, size, ONE, key)
            transpose(key, keys)
            lower_product(queries.T, keys, pairs)
            if erases:
                lower_product(key, keys, overlap)
            dqueries[:], dkeys[:], dpairs[:], doverlap[:] = ZERO, ZERO, ZERO, ZERO
            size = (count, x.V)
            for h in range(h0, h1):
                dS = block(dstates[(h - h0) * tall * wide :], tall, wide)
                # As in the forward pass.
                enter(starts[n, h], S)
                load(x.v, x.v_stride, first, h * x.V, size, ONE, values)
                gates(x, first, count, h, g, beta, weights, start)
                end, total = weights[m - 1], start[m - 1]
                if erases:
                    seen[:] = ZERO
                    add_product(key, S, seen, WHOLE)
                    solve(values, seen, start, overlap, weights, beta, lower)
                    multiply_rows(values, beta, written)
                    transpose(values, values_t)
                    transpose(written, written_t)
                else:
                    written = values
                    transpose(values, written_t)
                # What tokens read: from the state at the start, and from each other.
                load(do, do_stride, first, h * x.V, size, ONE, dout)
                transpose(dout, side_t)
                side[:], reads[:], writes[:], crossing[:] = ZERO, ZERO, ZERO, ZERO
                add_product(S, side_t, side, WHOLE)
                column_dots(queries, side, start, reads)
                add_columns(side, start, dqueries)
                lower_product(dout, written_t, dscores)
                pair_gradients(dscores, pairs, weights, ones, 1, dpairs, crossing)
                # What they write: to the state at the end, and to each other.
                dvalues[:] = ZERO
                add_product(key, dS, dvalues, WHOLE)
                dots(dvalues, written, end, writes)
                multiply_rows(dvalues, end, dvalues)
                multiply(pairs, weights, scores)
                add_product(scores.T, dout, dvalues, UPPER)
                multiply_columns(written_t, end, side_t)
                add_product(dS, side_t, dkeys, WHOLE)
                # The state itself.
                kept = ZERO
                for i in range(tall):
                    kept += dot(S[i], dS[i])
                kept *= total
                dS *= total
                multiply_rows(dout, start, dout)
                add_product(queries, dout, dS, WHOLE)
                if erases:
                    multiply_rows(dvalues, beta, dout)  # dX, then dR
                    solve_transposed(dout, lower)
                    lower_product(dout, values_t, dscores)
                    beta_gradient(dvalues, values, dscores, overlap, weights, dcolumn)
                    for t in range(count):
                        dbetas[first + t, h] = dcolumn[t]
                    for t in range(m):
                        negative[t] = -beta[t]
                    pair_gradients(dscores, overlap, weights, negative, 0, doverlap, crossing)
                    for t in range(m):
                        negative[t] = -start[t]
                    dots(dout, seen, negative, reads)
                    multiply_rows(dout, negative, seen)
                    transpose(seen, side_t)
                    add_product(S, side_t, dkeys, WHOLE)
                    add_product(keys, seen, dS, WHOLE)
                    dvalues[:] = dout
                for t in range(count):
                    dv[first + t, h * x.V : (h + 1) * x.V] = dvalues[t, : x.V]
                if x.log_decay.size > 0:
                    decay_gradient(crossing, reads, writes, kept, dcolumn)
                    for t in range(count):
                        dg[first + t, h] = dcolumn[t]
            add_product(queries, dpairs, dkeys, WHOLE)
            transpose(dpairs, scores)
            add_product(keys, scores, dqueries, WHOLE)
            if erases:
                add_product(keys, doverlap, dkeys, WHOLE)
                transpose(doverlap, scores)
                add_product(keys, scores, dkeys, WHOLE)
            column = head * x.K
            store_transposed(dqueries, key, first, count, column, x.K, x.scale, dq[part])
            store_transposed(dkeys, key, first, count, column, x.K, ONE, dk[part])
        for h in range(h0, h1):
            dS = block(dstates[(h - h0) * tall * wide :], tall, wide)
            dinitial[row, h] = dS[: x.K, : x.V]


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
) -> tuple[Tensor, ...]:
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
    shared = [d.sum(0) if x.parts > 1 else d[0] for d in (dq, dk)]
    gates = [d if d.shape[0] == 0 else d.view(v.shape[:3]) for d in (dg, dbeta)]
    return shared[0].view(q.shape), shared[1].view(k.shape), dv, *gates, dinitial
