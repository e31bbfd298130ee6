"""The walk of `walk_backward.py` for decays a key channel: from the last block to the first.

Of a chunk the state at its start is known. Those at its blocks' starts are computed again, and stay
in cache until the blocks are met the other way. What a block's gradients are is in
`chunk_key_gradients_cpu.py`.
"""

# mypy: ignore-errors
from __future__ import annotations

import numpy as np

from subquad.backend.cpu.compile import SLICE, jit
from subquad.backend.cpu.product import WHOLE, add_product, block, padded
from subquad.backend.cpu.vectors import LANES, transpose
from subquad.engines.matrix.cpu.chunk_key import (
    one_block,
    part,
    pass_on,
    read_block,
    read_tokens,
    room,
)
from subquad.engines.matrix.cpu.chunk_key_gradients import (
    Crossing,
    decay_gradient,
    through_solution,
    through_state,
    to_start,
    to_values,
)
from subquad.engines.matrix.cpu.inputs import (
    CHUNK,
    ONE,
    ZERO,
    enter,
    leave,
    load,
    memory,
    store,
    unit_heads,
)
from subquad.engines.matrix.cpu.pairs import BLOCK, pair_gradients


@jit
def read_again(x, chunk, h, blocks, states, turned, moved):
    """Fill a head's blocks of a chunk, and the states at their starts from the first of them."""
    for b in range(0, chunk.count, BLOCK):
        own = one_block(blocks, b)
        n = b // BLOCK
        read_block(x, chunk, b, h, states[n], own, moved, turned)
        if b + BLOCK < chunk.count:
            enter(states[n], states[n + 1])
            pass_on(part(chunk.keys, b), own, states[n + 1], moved)


@jit
def backward(x, starts, do, do_stride, dfinal, dq, dk, dv, dg, dbetas, dinitial, begin, stop):
    """dq, dk [parts,M,Hk*K]; dv [M,H*V]; dg [M,H*K]; dbetas [M,H]; dinitial [R,H,K,V] from do and
    dfinal.

    For units begin/SLICE to stop/SLICE.
    """
    K, V = padded(x.K), padded(x.V)
    highs, rows, broads = memory(6, CHUNK, K), memory(5, BLOCK, K), memory(4, BLOCK, V)
    dqueries, dkeys = block(highs[4], CHUNK, K), block(highs[5], CHUNK, K)
    gradients, blocks = memory(x.G, K, V), room(CHUNK // BLOCK, K, V)
    states = memory(CHUNK // BLOCK, K, V).reshape((CHUNK // BLOCK, K, V))
    moved, side = block(rows[0], BLOCK, K), block(rows[1], K, BLOCK)
    crossing = Crossing(
        block(rows[2], BLOCK, K),
        block(rows[3], BLOCK, K),
        block(rows[4], BLOCK, K),
        np.empty(K, np.float32),
    )
    dout, turned_out = block(broads[0], BLOCK, V), block(broads[1], V, BLOCK)
    dvalues, turned_values = block(broads[2], BLOCK, V), block(broads[3], V, BLOCK)
    dscores, lanes = memory(1, BLOCK, BLOCK)[0].reshape((BLOCK, BLOCK)), memory(1, BLOCK, LANES)[0]
    dbeta = np.empty(BLOCK, np.float32)
    for unit in range(begin // SLICE, stop // SLICE):
        row, key_head, share, h0, h1 = unit_heads(x, unit)
        for h in range(h0, h1):
            enter(dfinal[row, h], block(gradients[h - h0], K, V))
        for n in range(x.chunks[row + 1] - 1, x.chunks[row] - 1, -1):
            chunk = read_tokens(x, row, n, key_head, highs)
            dqueries[:], dkeys[:] = ZERO, ZERO
            for h in range(h0, h1):
                dS = block(gradients[h - h0], K, V)
                enter(starts[n, h], states[0])
                read_again(x, chunk, h, blocks, states, side, moved)
                for b in range((chunk.count - 1) // BLOCK * BLOCK, -1, -BLOCK):
                    own, S = one_block(blocks, b), states[b // BLOCK]
                    first, count = chunk.first + b, min(BLOCK, chunk.count - b)
                    queries, dquery = part(chunk.queries, b), part(dqueries, b)
                    keys, dkey = part(chunk.keys, b), part(dkeys, b)
                    load(do, do_stride, first, h * x.V, (count, x.V), ONE, dout)
                    transpose(dout, turned_out)
                    transpose(own.values, turned_values)
                    for total in crossing[:3]:
                        total[:] = ZERO
                    through_state(
                        S, turned_out, own.start, queries, dquery, crossing.reads, side, moved
                    )
                    through_state(
                        dS, turned_values, own.end, keys, dkey, crossing.writes, side, moved
                    )
                    dscores[:] = ZERO
                    add_product(dout, turned_values, dscores, WHOLE)
                    pair_gradients(
                        dscores, queries, keys, own.decay, dquery, dkey, crossing.pairs, lanes
                    )
                    to_values(keys, own, dS, dout, moved, dvalues)
                    to_start(queries, own, S, dS, dout, moved, crossing)
                    if x.beta.size > 0:
                        through_solution(
                            keys, own, S, dS, dvalues, dkey, crossing, dbeta,
                            (dscores, dout, turned_out, side, moved, lanes),
                        )  # fmt: skip
                        for t in range(count):
                            dbetas[first + t, h] = dbeta[t]
                    decay_gradient(crossing)
                    store(dvalues, count, first, h * x.V, x.V, ONE, dv)
                    store(crossing.pairs, count, first, h * x.K, x.K, ONE, dg)
            column = key_head * x.K
            store(dqueries, chunk.count, chunk.first, column, x.K, x.scale, dq[share])
            store(dkeys, chunk.count, chunk.first, column, x.K, ONE, dk[share])
        for h in range(h0, h1):
            leave(block(gradients[h - h0], K, V), dinitial[row, h])
