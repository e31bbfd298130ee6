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


@triton.jit
def at_least(gate, floor):
    """A gate that is no number stays none: Triton's maximum would make it the floor, "forget"."""
    return tl.maximum(gate, floor, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def locate(segment, table, tokens, length, per_row, PACKED: tl.constexpr, C: tl.constexpr):
    """First token, length, and first chunk (counted over the whole call) of a segment."""
    if PACKED:
        begin = tl.load(table + segment * 3)
        length = tl.load(table + segment * 3 + 1).to(tl.int32)
        chunk = tl.load(table + segment * 3 + 2)
    else:
        row = (segment // per_row).to(tl.int64)
        offset = (segment % per_row) * length
        begin = row * tokens + offset
        chunk = row * tl.cdiv(tokens, C) + offset // C
        length = tl.minimum(length, tokens - offset)
    return begin, length, chunk


@triton.jit
def nothing_follows(segment, per_row, REVERSE: tl.constexpr):
    """Whether a segment is the last of its row to be scanned: no other waits for its state."""
    if REVERSE:
        return segment % per_row == 0
    else:
        return segment % per_row == per_row - 1


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


@triton.jit(do_not_specialize=["per_row"])
def join(
    states, start, finish, totals, offsets, per_row,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr,
    GATED: tl.constexpr, REVERSE: tl.constexpr, START: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Turn each segment's own end state into the state that enters it.

    PACKED: also store the state that leaves each sequence; otherwise its last scan finds it.
    """
    pid = tl.program_id(0)
    BLOCKS: tl.constexpr = (K * V + BLOCK - 1) // BLOCK
    cell = (pid % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    head = (pid // BLOCKS) % H
    sequence = (pid // (BLOCKS * H)).to(tl.int64)
    if PACKED:
        begin = tl.load(offsets + sequence)
        segments = (tl.load(offsets + sequence + 1) - begin).to(tl.int32)
    else:
        begin = sequence * per_row
        segments = per_row
    inside = cell < K * V
    carry = tl.zeros([BLOCK], tl.float32)
    if START:
        carry += tl.load(start + (sequence * H + head) * K * V + cell, mask=inside, other=0.0)
    for step in range(0, segments):
        if REVERSE:
            segment = begin + segments - 1 - step
        else:
            segment = begin + step
        place = (segment * H + head) * K * V + cell
        grown = tl.load(states + place, mask=inside, other=0.0)
        tl.store(states + place, carry, mask=inside)
        if GATED:
            total = tl.load(totals + (segment * H + head) * K + cell // V, mask=inside, other=0.0)
            carry *= tl.exp(total)
        carry += grown
    if PACKED:
        tl.store(finish + (sequence * H + head) * K * V + cell, carry, mask=inside)
