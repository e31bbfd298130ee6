"""Gradients of one block, `chunk_key_cpu.py`, for one head: from those of its output and its end.

With dS the gradient of the state at the block's end, and dA = tril(dO V^T):

    dV = A^T dO + (K . E) dS        dQ += P . (dO S^T)        dK += E . (V dS^T)
    dS <- e^{sum of g} . dS + (Q . P)^T dO

and what dA gives Q, K and g pair by pair, see `pairs_cpu.py`.

The gradient of a log decay g_j is the sum over everything that crosses token j: pairs s < j <= t,
reads of the block's start by t >= j, writes to its end by s < j, and the state itself. As in the
forward pass these are sums over their own tokens, not differences of longer sums that cancel.
"""

# mypy: ignore-errors
from __future__ import annotations

from typing import NamedTuple

import numpy as np

from subquad.kernels.chunk_cpu import multiply
from subquad.kernels.chunk_key_cpu import keep
from subquad.kernels.chunked_inputs_cpu import ZERO
from subquad.kernels.cpu import jit
from subquad.kernels.product_cpu import UPPER, WHOLE, add_product
from subquad.kernels.vectors_cpu import transpose


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
    """dV [c,V]. `moved` [c,K] is scratch."""
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
