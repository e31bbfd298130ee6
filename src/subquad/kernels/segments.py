"""The segments of packed sequences, found on the device: nothing waits for their lengths.

Boundaries are held inside the tokens there are, as no one has looked at them: wrong ones give wrong
numbers, but no access outside of a tensor.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["sequences", "segments", "tokens", "length"])
def count_segments(
    cu_seqlens, offsets, firsts, sequences, segments, tokens, length,
    C: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first segment and the first chunk of each sequence (offsets, firsts; [sequences + 1]).

    One program. Not SPLIT: a segment each, though the sequence be empty.
    """
    s = tl.arange(0, BLOCK)
    segment = tl.zeros([], tl.int64)
    chunk = tl.zeros([], tl.int64)
    for s0 in range(0, sequences + 1, BLOCK):
        real = s0 + s < sequences
        begin, end = boundaries(cu_seqlens, s0 + s, real, tokens)
        if SPLIT:
            pieces = tl.cdiv(end - begin, length)
        else:
            pieces = real.to(tl.int64)
        chunks = tl.cdiv(end - begin, C)
        inside = s0 + s <= sequences
        before = segment + tl.cumsum(pieces, 0) - pieces
        tl.store(offsets + s0 + s, tl.minimum(before, segments), mask=inside)
        tl.store(firsts + s0 + s, chunk + tl.cumsum(chunks, 0) - chunks, mask=inside)
        segment += tl.sum(pieces, 0)
        chunk += tl.sum(chunks, 0)


@triton.jit(do_not_specialize=["sequences", "segments", "tokens", "length", "halvings"])
def cut_segments(
    cu_seqlens, offsets, firsts, table, sequences, segments, tokens, length, halvings,
    C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The table of segments: first token, length, first chunk. Those left over are empty."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # The last sequence that begins with this segment or before; empty ones have none.
    low = tl.zeros([BLOCK], tl.int32)
    high = low + sequences - 1
    for _ in range(halvings):
        middle = (low + high + 1) // 2
        begun = tl.load(offsets + middle) <= index
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle - 1)
    into = (index - tl.load(offsets + low)) * length
    begin, end = boundaries(cu_seqlens, low, low < sequences, tokens)
    size = tl.minimum(tl.maximum(end - begin - into, 0), length)
    place = table + index.to(tl.int64) * 3
    inside = index < segments
    tl.store(place, begin + into, mask=inside)
    tl.store(place + 1, size, mask=inside)
    # Sequences that overlap have more chunks than there is room for; others never.
    most = tl.cdiv(tokens, C) + sequences - 1 - tl.cdiv(size, C)
    tl.store(place + 2, tl.minimum(tl.load(firsts + low) + into // C, most), mask=inside)


@triton.jit
def boundaries(cu_seqlens, sequence, real, tokens):
    """Where sequences begin and end (both 0 where not `real`)."""
    begin = tl.load(cu_seqlens + sequence, mask=real, other=0).to(tl.int64)
    end = tl.load(cu_seqlens + sequence + 1, mask=real, other=0).to(tl.int64)
    begin = tl.minimum(tl.maximum(begin, 0), tokens)
    return begin, tl.minimum(tl.maximum(end, begin), tokens)
