"""One chunk of the scan with gates per key channel: factored about its middle, or for any gates."""

import triton
import triton.language as tl

from subquad.engines.matrix.gpu.tiles import LOG2E, two_parts


@triton.jit
def sum_gates(select, gates, PARTS: tl.constexpr):
    """select @ gates for a 0/+-1 matrix: sums on the tensor cores.

    The gates go as PARTS bfloat16 numbers each: one holds bfloat16 gates, three any float32.
    """
    select = select.to(tl.bfloat16)
    part = gates.to(tl.bfloat16)
    total = tl.dot(select, part)
    if PARTS > 1:
        rest = gates.to(tl.float32) - part.to(tl.float32)
        part = rest.to(tl.bfloat16)
        total = tl.dot(select, part, total)
        if PARTS > 2:
            part = (rest - part.to(tl.float32)).to(tl.bfloat16)
            total = tl.dot(select, part, total)
    return total


@triton.jit
def along(vector, OUT: tl.constexpr):
    """A vector over the gated axis of the state [M, N]."""
    if OUT:
        return vector[None, :]
    else:
        return vector[:, None]


@triton.jit
def read_state(r, state, WHOLE: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr):
    """r @ state. WHOLE: as two parts of 8 bits, so that hardly any of the state's bits is lost."""
    if WHOLE and DOT.primitive_bitwidth == 16:
        high, low = two_parts(state)
        y = tl.dot(r, high)
        return tl.dot(r, low, y)
    return tl.dot(r, state.to(DOT), input_precision=PREC)


@triton.jit
def decay(gates):
    """exp of summed gates: exp2 needs no care for results below float32's normal range."""
    return tl.exp2(gates * LOG2E)


@triton.jit
def near_chunk(r, w, x, partner, state, gates, first, last, keep, PARTS: tl.constexpr,
               OUT: tl.constexpr, REVERSE: tl.constexpr, BONUS: tl.constexpr, READ: tl.constexpr,
               SLOPES: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
               C: tl.constexpr):  # fmt: skip
    """A chunk gated per key channel, decays factored about its middle: matrix products only.

    first, last: the summed gates before and from the middle. The caller has made sure that
    exp(+-their size) is harmless. Returns y, the dots of y with its partner, and the state.
    """
    t = tl.arange(0, C)
    middle: tl.constexpr = C // 2
    up = (t[None, :] >= middle) & (t[None, :] <= t[:, None])
    down = (t[None, :] < middle) & (t[None, :] > t[:, None])
    select = tl.where(up, 1.0, 0.0) - tl.where(down, 1.0, 0.0)
    since = sum_gates(select, gates, PARTS)  # the middle; before it, negative
    # The later token of a pair gains exp(since), the earlier exp(-since), whichever of r and w
    # holds it: `row` for r, `column` for w.
    if REVERSE:
        row, column = -since, since
        enter, leave = last, first
    else:
        row, column = since, -since
        enter, leave = first, last
    if BONUS:  # the reader stands before its own gate
        if REVERSE:
            column -= gates.to(tl.float32)
        else:
            row -= gates.to(tl.float32)
    entered = state * along(decay(enter), OUT)
    y = tl.zeros([C, state.shape[1]], tl.float32)
    dots = y
    if OUT:
        moved = (x * decay(column)).to(DOT)
        if READ:
            scores = tl.dot(r, tl.trans(w), input_precision=PREC)
            scores = tl.where(keep, scores, 0.0).to(DOT)
            y = read_state(r, entered, SLOPES, DOT, PREC)
            y = tl.dot(scores, moved, y, input_precision=PREC)
            row = decay(row)
            if SLOPES:
                dots = (partner * row).to(DOT) * y
            y *= row
        state = tl.dot(tl.trans(w), moved, entered, input_precision=PREC)
    else:
        moved = (w * decay(column)).to(DOT)
        if READ:
            reads = (r * decay(row)).to(DOT)
            scores = tl.dot(reads, tl.trans(moved), input_precision=PREC)
            scores = tl.where(keep, scores, 0.0).to(DOT)
            y = tl.dot(reads, entered.to(DOT), input_precision=PREC)
            y = tl.dot(scores, x, y, input_precision=PREC)
        state = tl.dot(tl.trans(moved), x, entered, input_precision=PREC)
    return y, dots, state * along(decay(leave), OUT)


@triton.jit
def far_chunk(r, w, x, partner, state, gates, total, PARTS: tl.constexpr,
              OUT: tl.constexpr, REVERSE: tl.constexpr, BONUS: tl.constexpr, READ: tl.constexpr,
              SLOPES: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
              C: tl.constexpr):  # fmt: skip
    """The same for any gates: every pair of tokens is factored about a boundary between the two.

    Blocks of 2, 4, 8, ... tokens are cut in halves; a pair with the writer in the left half and
    the reader in the right one decays by exp(gates after the writer in the left half) times
    exp(gates up to the reader in the right half). Neither factor exceeds 1, whatever the gates.
    """
    t = tl.arange(0, C)
    i = t[:, None]
    s = t[None, :]
    if BONUS:
        before = decay(sum_gates(tl.where(s < i, 1.0, 0.0), gates, PARTS))
    else:
        before = decay(sum_gates(tl.where(s <= i, 1.0, 0.0), gates, PARTS))
    after = decay(sum_gates(tl.where(s > i, 1.0, 0.0), gates, PARTS))
    if REVERSE:
        read, write = after, before
    else:
        read, write = before, after
    y = tl.zeros([C, state.shape[1]], tl.float32)
    dots = y
    scores = tl.zeros([C, C], tl.float32)
    if READ:
        if OUT:
            y = read_state(r, state, SLOPES, DOT, PREC)
            if SLOPES:
                dots = (partner * read).to(DOT) * y
            y *= read
            scores = tl.dot(r, tl.trans(w), input_precision=PREC)
        else:
            y = tl.dot((r * read).to(DOT), state.to(DOT), input_precision=PREC)
        size = 1
        while size < C:
            right = (i & size) != 0
            near = (i // (2 * size)) == (s // (2 * size))
            boundary = (i // size) * size  # of a right half: where it begins
            if BONUS:
                ours = tl.where(right, (s >= boundary) & (s < i), (s > i) & (s < boundary + size))
            else:
                ours = tl.where(right, (s >= boundary) & (s <= i), (s > i) & (s < boundary + size))
            factor = decay(sum_gates(tl.where(ours, 1.0, 0.0), gates, PARTS))
            if REVERSE:
                keep = near & ((i & size) == 0) & ((s & size) != 0)
            else:
                keep = near & ((i & size) != 0) & ((s & size) == 0)
            if OUT:
                part = tl.where(keep, scores, 0.0).to(DOT)
                pairs = tl.dot(part, (x * factor).to(DOT), input_precision=PREC)
                if SLOPES:
                    dots += (partner * factor).to(DOT) * pairs
                y += pairs * factor
            else:
                part = tl.dot((r * factor).to(DOT), tl.trans((w * factor).to(DOT)),
                              input_precision=PREC)  # fmt: skip
                scores += tl.where(keep, part, 0.0)
            size *= 2
        undecayed = tl.sum(r.to(tl.float32) * w.to(tl.float32), 1)  # a token reads its own write
        if OUT:
            if not BONUS:
                y += undecayed[:, None] * x
        else:
            if not BONUS:
                scores += tl.where(i == s, undecayed[:, None], 0.0)
            y = tl.dot(scores.to(DOT), x, y, input_precision=PREC)
    state = state * along(decay(total), OUT)
    if OUT:
        state = tl.dot(tl.trans(w), (x * write).to(DOT), state, input_precision=PREC)
    else:
        state = tl.dot(tl.trans((w * write).to(DOT)), x, state, input_precision=PREC)
    return y, dots, state
