"""Gradients of `walk.py`: the chunks from the last to the first, with that of the state.

Saved are the inputs and the states at the chunks' starts; what a chunk computes inside is computed
again. What a chunk's gradients are is in `chunk_gradients_cpu.py`.
"""

# mypy: ignore-errors
from __future__ import annotations

import numpy as np
from torch import Tensor

from subquad.backend.cpu.compile import SLICE, array, as_array, jit, rows
from subquad.backend.cpu.product import block, padded
from subquad.backend.cpu.vectors import transpose
from subquad.engines.matrix.cpu import walk_key_backward as chunked_key_backward_cpu
from subquad.engines.matrix.cpu.chunk import read_chunk, read_head
from subquad.engines.matrix.cpu.chunk_gradients import (
    Crossing,
    Shared,
    decay_gradient,
    store_transposed,
    through_reads,
    through_scores,
    through_solution,
    through_writes,
    to_start,
)
from subquad.engines.matrix.cpu.inputs import (
    CHUNK,
    ONE,
    ZERO,
    enter,
    leave,
    load,
    memory,
    over_units,
    prepare,
    store,
    unit_heads,
)


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
                through_reads(chunk, head, written, S, dout, *sums, side, turned)
                through_writes(chunk, head, written, dS, dout, *sums, turned, dvalues)
                kept = to_start(chunk, head, S, dS, dout)
                if erases:
                    transpose(head.values, values)
                    through_solution(chunk, head, values, S, dS, dvalues, *sums, turned, column)
                    for t in range(count):
                        dbetas[first + t, h] = column[t]
                store(dvalues, count, first, h * x.V, x.V, ONE, dv)
                if x.log_decay.size > 0:
                    decay_gradient(crossing.pairs, crossing.reads, crossing.writes, kept, column)
                    for t in range(count):
                        dg[first + t, h] = column[t]
            through_scores(chunk, shared, erases, square)
            begins, key = key_head * x.K, chunk.key
            store_transposed(shared.queries, key, first, count, begins, x.K, x.scale, dq[part])
            store_transposed(shared.keys, key, first, count, begins, x.K, ONE, dk[part])
        for h in range(h0, h1):
            leave(block(states[h - h0], K, V), dinitial[row, h])


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
    if starts.shape[0] < x.chunks[-1]:  # which compiled code would read all the same
        raise RuntimeError(
            f"starts: got {starts.shape[0]}; expected {x.chunks[-1]}, one a chunk. "
            "Fix: call the forward pass with as many to be kept."
        )
    M = int(x.bounds[-1])
    dq, dk = v.new_empty(x.parts, M, x.Hk * x.K), v.new_empty(x.parts, M, x.Hk * x.K)
    dv, dinitial = v.new_empty(v.shape), v.new_empty(dfinal.shape)
    dg, dbeta = (v.new_empty(0 if y is None else y.shape) for y in (log_decay, beta))
    by_token = (as_array(d.view(M, d.numel() // M)) for d in (dv, dg, dbeta))
    walk = chunked_key_backward_cpu.backward if x.gates.size > 0 else _backward
    over_units(
        walk, x, as_array(starts), *rows(do.flatten(-2)), array(dfinal),
        as_array(dq), as_array(dk), *by_token, as_array(dinitial),
    )  # fmt: skip
    dq, dk = (d.sum(0) if x.parts > 1 else d[0] for d in (dq, dk))
    return dq.view(q.shape), dk.view(k.shape), dv, dg, dbeta, dinitial
