"""The segments of packed sequences, found on the device: nothing waits for their lengths.

No one has looked at the boundaries either, so they are held inside the tokens there are and never
fall, and the outer two are 0 and the number of tokens, whatever they say. Wrong ones give wrong
numbers, but no access outside of a tensor, and no results that are what memory happened to hold.
"""

import triton
import triton.language as tl

from subquad.engines.matrix.gpu.tiles import FIRST, LAST


@triton.jit(do_not_specialize=["sequences", "tokens", "length"])
def count_segments(
    cu_seqlens, bounds, offsets, firsts, sequences, tokens, length,
    C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first token, segment and chunk of each sequence (bounds, offsets, firsts), and the ends.

    One program. An empty sequence has a segment, too: it hands the state on.
    """
    s = tl.arange(0, BLOCK)
    highest = tl.zeros([], tl.int64)
    segment = tl.zeros([], tl.int64)
    chunk = tl.zeros([], tl.int64)
    for s0 in range(0, sequences + 1, BLOCK):
        inside = s0 + s <= sequences
        real = s0 + s < sequences
        begin = boundary(cu_seqlens, s0 + s, sequences, tokens, inside)
        end = boundary(cu_seqlens, s0 + s + 1, sequences, tokens, real)
        begin = tl.maximum(tl.associative_scan(begin, 0, larger), highest)
        size = tl.maximum(end, begin) - begin
        pieces = tl.where(real, tl.maximum(tl.cdiv(size, length), 1), 0)
        chunks = tl.cdiv(size, C)
        tl.store(bounds + s0 + s, begin, mask=inside)
        tl.store(offsets + s0 + s, segment + tl.cumsum(pieces, 0) - pieces, mask=inside)
        tl.store(firsts + s0 + s, chunk + tl.cumsum(chunks, 0) - chunks, mask=inside)
        highest = tl.max(begin, 0)
        segment += tl.sum(pieces, 0)
        chunk += tl.sum(chunks, 0)


@triton.jit
def boundary(cu_seqlens, index, sequences, tokens, mask):
    end = tl.load(cu_seqlens + index, mask=mask & (index > 0), other=0).to(tl.int64)
    return tl.where(index == sequences, tokens, tl.minimum(tl.maximum(end, 0), tokens))


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=["sequences", "segments", "length", "halvings"])
def cut_segments(
    bounds, offsets, firsts, table, sequences, segments, length, halvings,
    C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The table of segments, as `locate` and `neighbours` read it. Those left over are empty."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low = tl.zeros([BLOCK], tl.int32)  # the last sequence that begins here or before
    high = low + sequences - 1
    for _ in range(halvings):
        middle = (low + high + 1) // 2
        begun = tl.load(offsets + middle) <= index
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle - 1)
    used = index < tl.load(offsets + sequences)
    into = (index - tl.load(offsets + low)) * length
    begin = tl.load(bounds + low)
    left = tl.load(bounds + low + 1) - begin - into
    ends = tl.where((into == 0) | ~used, FIRST, 0) + tl.where((left <= length) | ~used, LAST, 0)
    place = table + index.to(tl.int64) * 5
    inside = index < segments
    tl.store(place, begin + into, mask=inside)
    tl.store(place + 1, tl.where(used, tl.minimum(left, length), 0), mask=inside)
    tl.store(place + 2, tl.load(firsts + low) + into // C, mask=inside)
    tl.store(place + 3, tl.where(used, low, -1), mask=inside)
    tl.store(place + 4, ends, mask=inside)
