"""Gradients of one block, `chunk_key.py`, for one head: from those of its output and its end.

With dS the gradient of the state at the block's end, and dA = tril(dO Y^T):

    dY = A^T dO + (K . E) dS        dQ += P . (dO S^T)        dK += E . (Y dS^T)
    dS <- e^{sum of g} . dS + (Q . P)^T dO
    delta rule: dX = beta . dY,  dV = dR = L^{-T} dX,  dL = -strict(dR X^T)
                dK -= P . (dR S^T),  dS -= (K . P)^T dR          (else dV = dY)

and what dA and dL gives Q, K and g pair by pair: see `pairs_cpu.py`.

The gradient of a log decay g_j is the sum over everything that crosses token j: pairs s < j <= t,
reads of the block's start by t >= j, writes to its end by s < j, and the state itself. As in the
forward pass these are sums over their own tokens, not differences of longer sums that cancel.
"""

# mypy: ignore-errors
from __future__ import annotations

from typing import NamedTuple

import numpy as np

from subquad.backend.cpu.compile import jit
from subquad.backend.cpu.product import UPPER, WHOLE, add_product
from subquad.backend.cpu.vectors import transpose
from subquad.engines.matrix.cpu.chunk import multiply, multiply_rows
from subquad.engines.matrix.cpu.chunk_gradients import solve_transposed
from subquad.engines.matrix.cpu.chunk_key import keep
from subquad.engines.matrix.cpu.inputs import ZERO
from subquad.engines.matrix.cpu.pairs import pair_gradients


class Crossing(NamedTuple):
    """What crosses a token, of one head: by pairs, by reads of the start, by writes to the end."""

    pairs: np.ndarray  # [c,K], summed already over what crosses
    reads: np.ndarray  # [c,K], of each token t
    writes: np.ndarray  # [c,K], of each token s
    state: np.ndarray  # [K]


@jit
def through_state(state, turned, factors, x, dx, crossing, side, rows):
    """Of y = (factors * x) @ state: to x [c,K], and to the decays in factors, if there are any.

    state [K,V]; turned [V,c], the transposed gradient of y; dx and crossing [c,K] are added to.
    `side` [K,c] and `rows` [c,K] are scratch.
    """
    side[:] = ZERO
    add_product(state, turned, side, WHOLE)
    transpose(side, rows)
    for t in range(rows.shape[0]):
        row, factor, source, out, cross = rows[t], factors[t], x[t], dx[t], crossing[t]
        for j in range(row.size):
            y = row[j] * factor[j]
            out[j] += y
            cross[j] += y * source[j]


@jit
def to_values(keys, own, dS, dout, moved, dvalues):
    """dY [c,V]. `moved` [c,K] is scratch."""
    dvalues[:] = ZERO
    multiply(keys, own.end, moved)
    add_product(moved, dS, dvalues, WHOLE)
    add_product(own.scores.T, dout, dvalues, UPPER)


@jit
def to_start(queries, own, S, dS, dout, moved, crossing):
    """dS from the block's end to its start, as far as S is kept and read."""
    for i in range(S.shape[0]):
        row, gradient, total = S[i], dS[i], ZERO
        for j in range(row.size):
            total += row[j] * gradient[j]
        crossing.state[i] = own.kept[0, i] * total
    keep(own, dS)
    multiply(queries, own.start, moved)
    add_product(moved.T, dout, dS, WHOLE)


@jit
def through_solution(keys, own, S, dS, dvalues, dkeys, crossing, dbeta, scratch):
    """The delta rule: dY in `dvalues` becomes dV, by way of dX = beta dY and dR = L^{-T} dX."""
    square, seen, turned, side, moved, lanes = scratch
    for s in range(dbeta.size):
        gradient, solved, total = dvalues[s], own.solved[s], ZERO
        for j in range(gradient.size):
            total += gradient[j] * solved[j]
        dbeta[s] = total
    multiply_rows(dvalues, own.beta, dvalues)
    solve_transposed(dvalues, own.lower)
    transpose(own.solved, turned)
    square[:] = ZERO
    add_product(dvalues, turned, square, WHOLE)  # -dL
    for t in range(dbeta.size):
        row, pair = square[t], own.overlap[t]
        for s in range(t):
            dbeta[s] -= row[s] * pair[s]
            row[s] *= -own.beta[s]
        row[t:] = ZERO
    pair_gradients(square, keys, keys, own.decay, dkeys, dkeys, crossing.pairs, lanes)
    for t in range(dvalues.shape[0]):  # R = V - (K . P) S
        row, out = dvalues[t], seen[t]
        for j in range(row.size):
            out[j] = -row[j]
    transpose(seen, turned)
    through_state(S, turned, own.start, keys, dkeys, crossing.reads, side, moved)
    multiply(keys, own.start, moved)
    add_product(moved.T, seen, dS, WHOLE)


@jit
def decay_gradient(crossing):
    """crossing.pairs becomes the gradient of the log decays; `state` is used up."""
    out, later = crossing.pairs, crossing.state
    for j in range(out.shape[0] - 1, -1, -1):
        row, read = out[j], crossing.reads[j]
        for i in range(row.size):
            later[i] += read[i]
            row[i] += later[i]
    earlier = later
    earlier[:] = ZERO
    for j in range(1, out.shape[0]):
        row, write = out[j], crossing.writes[j - 1]
        for i in range(row.size):
            earlier[i] += write[i]
            row[i] += earlier[i]
