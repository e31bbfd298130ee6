"""The chunked form of the matrix recurrence on the CPU: float32, the state in cache while it walks.

What a chunk computes is in `chunk_cpu.py`. Chunks are met one after another, so nothing of a chunk
ever leaves the second-level cache. Decays a key channel are walked over in `chunked_key_cpu.py`.
"""

# mypy: ignore-errors
from __future__ import annotations

import numpy as np
from torch import Tensor

from subquad.backend.cpu.compile import SLICE, array, as_array, jit
from subquad.backend.cpu.product import WHOLE, add_product, block, padded
from subquad.engines.matrix.cpu import walk_key as chunked_key_cpu
from subquad.engines.matrix.cpu.chunk import multiply_rows, read_chunk, read_head, read_out
from subquad.engines.matrix.cpu.inputs import (
    CHUNK,
    ONE,
    enter,
    leave,
    memory,
    over_units,
    prepare,
    store,
    unit_heads,
)


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
                    leave(S, starts[n, h])
                head = read_head(x, chunk, h, S, squares, broads, columns)
                read_out(chunk, head, S, scores, out)
                store(out, chunk.count, chunk.first, h * x.V, x.V, ONE, o)
                multiply_rows(head.written, head.weights[m - 1], head.written)
                S *= head.start[m - 1]
                add_product(chunk.keys, head.written, S, WHOLE)
        for h in range(h0, h1):
            leave(block(states[h - h0], K, V), final[row, h])


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

    q, k [B,T,Hk,K]; v [B,T,H,V]; log_decay [B,T,H] or [B,T,H,K]; beta [B,T,H]; state [R,H,K,V];
    all float32. `backward` needs the states at the starts; `kept` is how many chunks there can be,
    or 0 to keep none.
    """
    x = prepare(q, k, v, log_decay, beta, scale, cu_seqlens)
    o, final = v.new_empty(v.shape), v.new_empty(state.shape)
    starts = v.new_empty(kept, *state.shape[1:])
    flat = o.view(-1, x.Hk * x.G * x.V)
    walk = chunked_key_cpu.forward if x.gates.size > 0 else _forward
    over_units(walk, x, array(state), as_array(flat), as_array(final), as_array(starts))
    return o, final, starts
