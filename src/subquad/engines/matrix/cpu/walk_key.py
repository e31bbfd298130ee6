"""The walk of `walk.py` for decays a key channel. What a block is: `chunk_key_cpu.py`."""

# mypy: ignore-errors
from __future__ import annotations

from subquad.backend.cpu.compile import SLICE, jit
from subquad.backend.cpu.product import block, padded
from subquad.engines.matrix.cpu.chunk_key import (
    part,
    pass_on,
    read_block,
    read_out,
    read_tokens,
    room,
)
from subquad.engines.matrix.cpu.inputs import CHUNK, ONE, enter, leave, memory, store, unit_heads
from subquad.engines.matrix.cpu.pairs import BLOCK


@jit
def forward(x, initial, o, final, starts, begin, stop):
    """o [M,H*V], final [R,H,K,V] and, if not empty, starts [chunks,H,K,V] from initial [R,H,K,V].

    For units begin/SLICE to stop/SLICE.
    """
    K, V = padded(x.K), padded(x.V)
    highs, blocks, broads = memory(4, CHUNK, K), memory(2, BLOCK, K), memory(1, BLOCK, V)
    states = memory(x.G, K, V)
    moved, turned = block(blocks[0], BLOCK, K), block(blocks[1], K, BLOCK)
    out = block(broads[0], BLOCK, V)
    own = room(1, K, V)
    for unit in range(begin // SLICE, stop // SLICE):
        row, key_head, _, h0, h1 = unit_heads(x, unit)
        for h in range(h0, h1):
            enter(initial[row, h], block(states[h - h0], K, V))
        for n in range(x.chunks[row], x.chunks[row + 1]):
            chunk = read_tokens(x, row, n, key_head, highs)
            for h in range(h0, h1):
                S = block(states[h - h0], K, V)
                if starts.size > 0:
                    leave(S, starts[n, h])
                for b in range(0, chunk.count, BLOCK):
                    read_block(x, chunk, b, h, S, own, moved, turned)
                    read_out(part(chunk.queries, b), own, S, moved, out)
                    count = min(BLOCK, chunk.count - b)
                    store(out, count, chunk.first + b, h * x.V, x.V, ONE, o)
                    pass_on(part(chunk.keys, b), own, S, moved)
        for h in range(h0, h1):
            leave(block(states[h - h0], K, V), final[row, h])
