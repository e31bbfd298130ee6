"""What the scan kernels share: their constants, how a program finds its segment, how it loads.

Shape suffixes in all of them: C tokens of a chunk, M contracted channels, N output channels of a
program.
"""

import triton
import triton.language as tl

# exp(-104) is 0 in float32, so clamping one step's log decay there changes no result, and -inf
# (forget everything) cannot meet another -inf in a difference.
FLOOR = tl.constexpr(-104.0)
LOG2E = tl.constexpr(1.4426950408889634)
FLOOR2 = tl.constexpr(-151.0)  # the same for powers of two
# A factor exp(+-FARTHEST) times any sane activation stays inside bfloat16's and float32's range.
FARTHEST = tl.constexpr(40.0)

# Kinds of gate (GATE) that `scan` knows; layout.py numbers them.
NONE = tl.constexpr(0)
HEAD_FIXED = tl.constexpr(1)
HEAD = tl.constexpr(2)


# Bits of what `segments.py` says of a segment's place in its sequence.
FIRST = tl.constexpr(1)
LAST = tl.constexpr(2)


@triton.jit
def at_least(gate, floor):
    """A gate that is no number stays none: Triton's maximum would make it the floor, "forget"."""
    return tl.maximum(gate, floor, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def assigned(BLOCKS: tl.constexpr, SHARES: tl.constexpr, H: tl.constexpr):
    """What a program of a scan works on: its share of a head, which is a block of output columns
    and a slice of the contracted channels; the head; the segment."""
    pid = tl.program_id(0)
    share = pid % SHARES
    return share, share % BLOCKS, share // BLOCKS, (pid // SHARES) % H, pid // (SHARES * H)


@triton.jit
def locate(segment, table, tokens, length, per_row, PACKED: tl.constexpr, C: tl.constexpr):
    """First token, length, and first chunk (counted over the whole call) of a segment."""
    if PACKED:
        begin = tl.load(table + segment * 5)
        length = tl.load(table + segment * 5 + 1).to(tl.int32)
        chunk = tl.load(table + segment * 5 + 2)
    else:
        row = (segment // per_row).to(tl.int64)
        offset = (segment % per_row) * length
        begin = row * tokens + offset
        chunk = row * tl.cdiv(tokens, C) + offset // C
        length = tl.minimum(length, tokens - offset)
    return begin, length, chunk


@triton.jit
def neighbours(segment, table, per_row, PACKED: tl.constexpr, REVERSE: tl.constexpr):
    """How a segment is tied to others, as the scan goes: its sequence (-1: none, it is left over),
    whether it is the sequence's first and last, the boundaries where it sets out and where it ends.

    A boundary lies between two segments of a sequence; they are counted through all sequences,
    each of which has one less than it has segments.
    """
    if PACKED:
        sequence = tl.load(table + segment * 5 + 3)
        ends = tl.load(table + segment * 5 + 4)
        first = (ends & FIRST) != 0
        last = (ends & LAST) != 0
    else:
        sequence = (segment // per_row).to(tl.int64)
        first = segment % per_row == 0
        last = segment % per_row == per_row - 1
    boundary = segment - sequence
    if REVERSE:
        return sequence, last, first, boundary, boundary - 1
    else:
        return sequence, first, last, boundary - 1, boundary


@triton.jit
def load_tile(base, rows, cols, stride, count, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    mask = rows[:, None] < count
    if not EVEN:
        mask = mask & (cols[None, :] < WIDTH)
    return tl.load(base + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0)


@triton.jit
def load_gates(base, rows, cols, stride, count, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    return at_least(load_tile(base, rows, cols, stride, count, WIDTH, EVEN), FLOOR)


@triton.jit
def gap(reader, writer, REVERSE: tl.constexpr):
    """How many tokens the reader of a pair stands after the writer."""
    if REVERSE:
        return writer - reader
    else:
        return reader - writer


@triton.jit
def two_parts(x):
    """x as the sum of two bfloat16 numbers, the first cut off: to round it, and to widen it again
    for the difference, takes four times as long as an addition."""
    bits = x.to(tl.int32, bitcast=True) & -65536
    high = bits.to(tl.float32, bitcast=True)
    return high.to(tl.bfloat16), (x - high).to(tl.bfloat16)


@triton.jit(do_not_specialize=["size"])
def add_slices(parts, whole, size, SLICES: tl.constexpr, BLOCK: tl.constexpr):
    """whole [size] = the sum of parts [SLICES, size]."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(parts + i, mask=i < size, other=0.0)
    for part in tl.static_range(1, SLICES):
        total += tl.load(parts + part * size.to(tl.int64) + i, mask=i < size, other=0.0)
    tl.store(whole + i, total.to(whole.dtype.element_ty), mask=i < size)


@triton.jit(do_not_specialize=["per_row"])
def join(
    states, start, totals, offsets, per_row,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr,
    GATED: tl.constexpr, REVERSE: tl.constexpr, START: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Turn what each segment alone leaves at its boundary into the state there."""
    pid = tl.program_id(0)
    BLOCKS: tl.constexpr = (K * V + BLOCK - 1) // BLOCK
    cell = (pid % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    head = (pid // BLOCKS) % H
    sequence = (pid // (BLOCKS * H)).to(tl.int64)
    if PACKED:
        begin = tl.load(offsets + sequence)
        boundaries = (tl.load(offsets + sequence + 1) - begin).to(tl.int32) - 1
        begin -= sequence
    else:
        boundaries = per_row - 1
        begin = sequence * boundaries
    if boundaries < 1:
        return
    inside = cell < K * V
    carry = tl.zeros([BLOCK], tl.float32)
    if START:
        carry += tl.load(start + (sequence * H + head) * K * V + cell, mask=inside, other=0.0)
    for step in range(0, boundaries):
        if REVERSE:
            boundary = begin + boundaries - 1 - step
        else:
            boundary = begin + step
        place = (boundary * H + head) * K * V + cell
        if GATED:
            total = tl.load(totals + (boundary * H + head) * K + cell // V, mask=inside, other=0.0)
            carry *= tl.exp(total)
        carry += tl.load(states + place, mask=inside, other=0.0)
        tl.store(states + place, carry, mask=inside)
