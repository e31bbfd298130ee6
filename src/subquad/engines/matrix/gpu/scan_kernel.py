"""The Triton kernel behind every row without erasing and without gates per key channel.

With reader r, writer w, values x and gate products over the tokens between j and i, the scan is

    forward   y_i = sum_{j <= i} (r_i . w_j) x_j        (a state S += w_j x_j^T, read by r)
    REVERSE   y_j = sum_{i >= j} (r_j . w_i) x_i        (the same with time turned round)

and the recurrence and its three gradients differ only in who plays which part:

    o  : r, w, x = q, k, v                 dv : r, w, x = k, q, do, REVERSE
    dq : r, w, x = do, v, k, OUT           dk : r, w, x = v, do, q, OUT, REVERSE

OUT says that the output's channels are those of the keys. A program owns one segment of one head
and BN output columns; it walks the segment in chunks, the state [BN, BM] in registers. Outputs and
state stand with their columns as rows of the products: so the state is a product's left operand
where it lies, and never passes through shared memory. `docs/kernels.md` explains the choices.
`scan_key.py` is the scan with gates per key channel.
"""

import triton
import triton.language as tl

from subquad.engines.matrix.gpu.tiles import (
    FLOOR2,
    HEAD,
    HEAD_FIXED,
    LOG2E,
    NONE,
    assigned,
    at_least,
    gap,
    load_tile,
    locate,
    neighbours,
    two_parts,
)


@triton.jit
def head_decays(sums, fractions, REVERSE: tl.constexpr, BONUS: tl.constexpr,
                PRECISE: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """A head's log2 decays: of each pair, up to the reader, after the writer, over the chunk.

    A pair's row is its writer and its column its reader. PRECISE: whole numbers and fractions
    apart, since the difference of two large sums has lost the last bits of its fraction.
    """
    t = tl.arange(0, C)
    whole = tl.load(sums + t)
    read_whole = whole
    total = tl.load(sums + C - 1)
    after = total - whole
    if BONUS:  # the reader stands before its own gate
        read_whole = tl.load(sums + t - 1, mask=t > 0, other=0.0)
    to_reader = read_whole
    if REVERSE:
        pair = read_whole[:, None] - whole[None, :]
    else:
        pair = read_whole[None, :] - whole[:, None]
    if PRECISE:
        part = tl.load(fractions + t)
        read_part = part
        all_parts = tl.load(fractions + C - 1)
        after += all_parts - part
        if BONUS:
            read_part = tl.load(fractions + t - 1, mask=t > 0, other=0.0)
        to_reader += read_part
        total += all_parts
        if REVERSE:
            pair += read_part[:, None] - part[None, :]
        else:
            pair += read_part[None, :] - part[:, None]
    return pair, to_reader, after, total


@triton.jit
def fixed_gate(gate):
    """log2 of one step's decay."""
    return at_least(tl.load(gate).to(tl.float32) * LOG2E, FLOOR2)


@triton.jit
def fixed_decays(distance, step_gate, t, count, BONUS: tl.constexpr):
    """The same for a gate that never changes: log2 decays as multiples of one step's."""
    reader = t.to(tl.float32)
    if not BONUS:
        reader += 1.0
    after = tl.maximum(count - 1 - t, 0).to(tl.float32) * step_gate
    return distance * step_gate, reader * step_gate, after, count.to(tl.float32) * step_gate


@triton.jit
def read_state(state, r, WHOLE: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr):
    """state @ r^T. WHOLE: as two parts of 8 bits, so that hardly any of its bits is lost."""
    if WHOLE and DOT.primitive_bitwidth == 16:
        high, low = two_parts(state)
        y = tl.dot(high, tl.trans(r))
        return tl.dot(low, tl.trans(r), y)
    return tl.dot(state.to(DOT), tl.trans(r), input_precision=PREC)


@triton.jit(do_not_specialize=["tokens", "seg_len", "per_row", "chunks_in_all", "all_tokens"])
def scan(
    r, w, x, y, partner, gate, sums, fractions, bonus, start, states, finish, totals, ends,
    lasts, reads, dbonus,
    table, tokens, seg_len, per_row, chunks_in_all, all_tokens, y_scale, start_scale,
    finish_scale, one,
    r_head, w_head, x_head, partner_head, gate_head,
    r_token: tl.constexpr, w_token: tl.constexpr, x_token: tl.constexpr,
    partner_token: tl.constexpr,
    H: tl.constexpr, R_SHARE: tl.constexpr, W_SHARE: tl.constexpr, X_SHARE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SLICES: tl.constexpr,
    C: tl.constexpr, GATE: tl.constexpr, OUT: tl.constexpr, REVERSE: tl.constexpr,
    BONUS: tl.constexpr, READ: tl.constexpr, START: tl.constexpr, SPLIT: tl.constexpr,
    FINISH: tl.constexpr, SLOPES: tl.constexpr, PACKED: tl.constexpr, DOT: tl.constexpr,
    PREC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One segment, one head, BN output columns. See the module's docstring for the parts.

    SLICES programs share out the M contracted channels, BM each: the state's rows fall apart into
    theirs, and what they write to y [SLICES, all_tokens, H, N] and `dbonus` is still to be added.

    start, finish: states [sequences, H, K, V] in and out; SPLIT: sequences have several segments,
    and `states` [boundaries, H, K, V] are those between two. READ=False makes them: it only
    carries the state, and leaves the segment's summed gates in `totals`.

    A gate's gradient is the sum over the tokens from it on of q.dq - k.dk, plus the state's
    product with its own gradient at the segment's end (the states there dq has left in `ends`, at
    boundaries, and in `lasts`; dk leaves the product in `totals`). SLOPES (in dq and dk) stores the
    dots of y with its partner, q or k, in `reads`, for `sum_slopes`. Both sums see every pair of
    tokens once and all but the pairs across the gate must cancel, to the bit: each dot takes its
    partner as rounded as the other scan takes it, and the state is read whole.
    """
    BLOCKS: tl.constexpr = (N + BN - 1) // BN
    SHARES: tl.constexpr = BLOCKS * SLICES
    share, block, part, head, segment = assigned(BLOCKS, SHARES, H)
    sequence, is_first, is_last, behind, ahead = neighbours(
        segment, table, per_row, PACKED, REVERSE
    )
    if not READ:  # noqa: SIM102 - known when compiling; what follows is not
        if is_last:
            return
    begin, length, chunk = locate(segment, table, tokens, seg_len, per_row, PACKED, C)
    chunks = tl.cdiv(length, C)
    t = tl.arange(0, C)
    m = part * BM + tl.arange(0, BM)
    n = block * BN + tl.arange(0, BN)
    EVEN_M: tl.constexpr = M == BM * SLICES
    EVEN_N: tl.constexpr = N % BN == 0
    K: tl.constexpr = N if OUT else M
    k = n if OUT else m
    BONUS_GRAD: tl.constexpr = BONUS and OUT and REVERSE
    PRECISE: tl.constexpr = DOT.primitive_bitwidth == 32

    r += begin * r_token + (head // R_SHARE) * r_head
    w += begin * w_token + (head // W_SHARE) * w_head
    x += begin * x_token + (head // X_SHARE) * x_head
    # The partner of x's gradient is shared as the other of q and k is: as x itself.
    partner += begin * partner_token + (head // X_SHARE) * partner_head
    row = begin * H + head  # of [tokens, H, ...] tensors; the next token's is H further
    y_row = row
    if SLICES > 1:
        y_row += part * all_tokens.to(tl.int64) * H
    if OUT:  # the state is stored [K, V]; here M runs over V
        cell = n[:, None] * M + m[None, :]
    else:
        cell = n[:, None] + m[None, :] * N
    inside = (n[:, None] < N) & (m[None, :] < M)
    # Where its sequence's first and last state lie, and those of the boundaries on either side.
    outer = cell + (sequence * H + head) * (M * N)
    near = cell + (behind * H + head) * (M * N)
    far = cell + (ahead * H + head) * (M * N)
    enters = inside & is_first & (sequence >= 0)
    leaves = inside & is_last & (sequence >= 0)
    state = tl.zeros([BN, BM], tl.float32)
    end = tl.zeros([BN, BM], tl.float32)
    if START:
        state += tl.load(start + outer, mask=enters, other=0.0) * start_scale
        if SLOPES and REVERSE:
            end += tl.load(lasts + outer, mask=enters, other=0.0)
    if SPLIT and READ:
        state += tl.load(states + near, mask=inside & (is_first == 0), other=0.0) * start_scale
        if SLOPES and REVERSE:
            end += tl.load(ends + near, mask=inside & (is_first == 0), other=0.0)
    if SLOPES and REVERSE:
        product = 0.0
        if START or SPLIT:
            product += tl.sum(tl.sum(state * end, 1), 0) * finish_scale
        tl.store(totals + (segment.to(tl.int64) * H + head) * SHARES + share, product)
    if BONUS:
        extra = tl.load(bonus + head * K + k, mask=k < K, other=0.0).to(tl.float32)
    bonus_grown = tl.zeros([BN], tl.float32)
    gone = 0.0
    distance = gap(t[None, :], t[:, None], REVERSE)
    keep = distance >= 0
    if BONUS:  # the reader stands before its own gate, and its own write has a weight of its own
        keep = distance > 0
        distance -= 1
    if GATE == HEAD_FIXED:
        step_gate = fixed_gate(gate + head * gate_head)

    for step in tl.range(0, chunks, num_stages=STAGES):
        if REVERSE:
            c = chunks - 1 - step
        else:
            c = step
        t0 = tl.cast(c * C, tl.int64)
        count = tl.minimum(length - c * C, C)
        real = (n[:, None] < N) & (t[None, :] < count)
        w_CM = load_tile(w + t0 * w_token, t, m, w_token, count, M, EVEN_M).to(DOT)
        x_NC = tl.trans(load_tile(x + t0 * x_token, t, n, x_token, count, N, EVEN_N)).to(DOT)
        r_CM = w_CM
        if READ:
            r_CM = load_tile(r + t0 * r_token, t, m, r_token, count, M, EVEN_M).to(DOT)
        partner_NC = x_NC
        if SLOPES or BONUS_GRAD:  # with its columns as rows already, as it meets no product
            at = t0 * partner_token + t[None, :] * partner_token + n[:, None]
            partner_NC = tl.load(partner + at, mask=real, other=0.0).to(DOT)

        if GATE == HEAD:
            at = (head * chunks_in_all.to(tl.int64) + chunk + c) * C
            pair, to_reader, after, total = head_decays(
                sums + at, fractions + at, REVERSE, BONUS, PRECISE, C
            )
        elif GATE == HEAD_FIXED:
            pair, to_reader, after, total = fixed_decays(distance, step_gate, t, count, BONUS)
        if GATE != NONE:
            if REVERSE:
                read, write = after, to_reader
            else:
                read, write = to_reader, after

        if READ:
            scores = tl.dot(w_CM, tl.trans(r_CM), input_precision=PREC)
            if GATE != NONE:
                scores *= tl.exp2(pair)
            scores = tl.where(keep, scores, 0.0).to(DOT)
            y_NC = read_state(state, r_CM, SLOPES, DOT, PREC)
            if GATE != NONE:
                read = tl.exp2(read)[None, :]
                if SLOPES:
                    dots = (partner_NC * read).to(DOT) * y_NC
                y_NC *= read
            if SLOPES:
                inner = tl.dot(x_NC, scores, input_precision=PREC)
                dots += partner_NC * inner
                y_NC += inner
                at = (row + t0 * H + t * H) * SHARES + share
                tl.store(reads + at, tl.sum(dots, 0) * y_scale, mask=t < count)
            else:
                y_NC = tl.dot(x_NC, scores, y_NC, input_precision=PREC)
            if BONUS:
                own = tl.sum(r_CM.to(tl.float32) * w_CM.to(tl.float32), 1)[None, :] * x_NC
                if BONUS_GRAD:
                    bonus_grown += tl.sum(own * partner_NC, 1) * y_scale
                if OUT:
                    y_NC += own * extra[:, None]
                else:
                    y_NC += tl.sum(r_CM * (w_CM * extra[None, :]), 1)[None, :] * x_NC
            tile = (y_row + t0 * H) * N + n[:, None] + t[None, :] * (H * N)
            tl.store(y + tile, (y_NC * y_scale).to(y.dtype.element_ty), mask=real)

        moved = x_NC
        if GATE != NONE:
            moved = (x_NC * tl.exp2(write)[None, :]).to(DOT)
            state *= tl.exp2(total)
            gone += total / LOG2E
        state = tl.dot(moved, w_CM, state, input_precision=PREC)
        if GATE == NONE:  # a state that is nothing but a sum of products makes ptxas wait for each
            state *= one

    if FINISH:
        tl.store(finish + outer, state * finish_scale, mask=leaves)
    if SPLIT and SLOPES and not REVERSE:
        tl.store(ends + far, state * finish_scale, mask=inside & (is_last == 0))
    if not READ:
        tl.store(states + far, state * finish_scale, mask=inside)
        if GATE != NONE:
            at = (ahead * H + head) * K + k
            tl.store(totals + at, gone + tl.zeros_like(k), mask=(k < K) & (block == 0))
    if BONUS_GRAD:
        place = (segment.to(tl.int64) * SLICES + part) * H + head
        tl.store(dbonus + place * N + n, bonus_grown, mask=n < N)
