"""The scan with gates per key channel; `scan.py` says what a scan is and who plays which part.

The gates lie along the contracted axis in o and dv, and along the output axis (OUT) in dq and dk.
Outputs stand [C, N] and the state [BM, BN] in the products: with the gated axis of the state as
rows, a thread holds few of its channels, and so few of their decays.
"""

import triton
import triton.language as tl

from subquad.engines.matrix.gpu.chunk_key_kernel import far_chunk, near_chunk, sum_gates
from subquad.engines.matrix.gpu.tiles import (
    assigned,
    gap,
    load_gates,
    load_tile,
    locate,
    neighbours,
)


@triton.jit
def all_fit(fits, chunks):
    """Whether near_chunk may take all chunks of a segment."""
    one = tl.arange(0, 128)
    least = tl.full([128], 1, tl.int32)
    for begin in range(0, chunks, 128):
        here = tl.load(fits + begin + one, mask=begin + one < chunks, other=1)
        least = tl.minimum(least, here)
    return tl.min(least, 0) != 0


@triton.jit(do_not_specialize=["tokens", "seg_len", "per_row", "chunks_in_all", "all_tokens"])
def scan_key(
    r, w, x, y, partner, gate, first, last, fits, bonus, start, states, finish, totals,
    ends, lasts, reads, dgate, dbonus,
    table, tokens, seg_len, per_row, chunks_in_all, all_tokens, y_scale, start_scale,
    finish_scale,
    r_head, w_head, x_head, partner_head, gate_head,
    r_token: tl.constexpr, w_token: tl.constexpr, x_token: tl.constexpr,
    partner_token: tl.constexpr, gate_token: tl.constexpr,
    H: tl.constexpr, R_SHARE: tl.constexpr, W_SHARE: tl.constexpr, X_SHARE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SLICES: tl.constexpr,
    C: tl.constexpr, FIXED: tl.constexpr, OUT: tl.constexpr, REVERSE: tl.constexpr,
    BONUS: tl.constexpr, READ: tl.constexpr, START: tl.constexpr, SPLIT: tl.constexpr,
    FINISH: tl.constexpr, KEEP_READS: tl.constexpr, GATE_GRAD: tl.constexpr, FAR: tl.constexpr,
    PACKED: tl.constexpr, PARTS: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One segment, one head, BN output columns; parts, slices and states as in `scan`.

    It takes two launches: one leaves out the segments with a chunk too far for near_chunk, and FAR
    takes those. Neither compiles to what the other does well: with both paths in one loop, no load
    is fetched ahead and the registers of one spill for the other's sake.

    A gate's gradient, as in `scan`, is a sum of q.dq - k.dk: KEEP_READS (in dq) stores q.dq in
    `reads`; GATE_GRAD (in dk) takes them up, and the states that dq has left. Of SLICES each has
    its own share of `reads` and of dgate.
    """
    BLOCKS: tl.constexpr = (N + BN - 1) // BN
    SHARES: tl.constexpr = BLOCKS * SLICES
    _, block, part, head, segment = assigned(BLOCKS, SHARES, H)
    sequence, is_first, is_last, behind, ahead = neighbours(
        segment, table, per_row, PACKED, REVERSE
    )
    if not READ:  # noqa: SIM102 - known when compiling; what follows is not
        if is_last:
            return
    begin, length, chunk = locate(segment, table, tokens, seg_len, per_row, PACKED, C)
    chunks = tl.cdiv(length, C)
    fits += head * tl.cast(chunks_in_all, tl.int64) + chunk
    if all_fit(fits, chunks) == FAR:
        return
    t = tl.arange(0, C)
    m = part * BM + tl.arange(0, BM)
    n = block * BN + tl.arange(0, BN)
    EVEN_M: tl.constexpr = M == BM * SLICES
    EVEN_N: tl.constexpr = N % BN == 0
    G: tl.constexpr = N if OUT else M  # gated channels, and whether their tile needs a mask
    EVEN_G: tl.constexpr = EVEN_N if OUT else EVEN_M
    g = n if OUT else m
    SLOPES: tl.constexpr = KEEP_READS or GATE_GRAD
    BONUS_GRAD: tl.constexpr = BONUS and OUT and REVERSE
    PRECISE: tl.constexpr = DOT.primitive_bitwidth == 32

    r += begin * r_token + (head // R_SHARE) * r_head
    w += begin * w_token + (head // W_SHARE) * w_head
    x += begin * x_token + (head // X_SHARE) * x_head
    # The partner of x's gradient is shared as the other of q and k is: as x itself.
    partner += begin * partner_token + (head // X_SHARE) * partner_head
    row = begin * H + head  # of [tokens, H, ...] tensors; the next token's is H further
    if SLICES > 1:
        row += part * all_tokens.to(tl.int64) * H
    gate += begin * gate_token + head * gate_head
    if OUT:  # the state is stored [K, V]; here M runs over V
        cell = m[:, None] + n[None, :] * M
    else:
        cell = m[:, None] * N + n[None, :]
    inside = (m[:, None] < M) & (n[None, :] < N)
    outer = cell + (sequence * H + head) * (M * N)
    near_by = cell + (behind * H + head) * (M * N)
    far_off = cell + (ahead * H + head) * (M * N)
    enters = inside & is_first & (sequence >= 0)
    leaves = inside & is_last & (sequence >= 0)
    state = tl.zeros([BM, BN], tl.float32)
    end = tl.zeros([BM, BN], tl.float32)
    if START:
        state += tl.load(start + outer, mask=enters, other=0.0) * start_scale
        if GATE_GRAD:
            end += tl.load(lasts + outer, mask=enters, other=0.0)
    if SPLIT and READ:
        state += tl.load(states + near_by, mask=inside & (is_first == 0), other=0.0) * start_scale
        if GATE_GRAD:
            end += tl.load(ends + near_by, mask=inside & (is_first == 0), other=0.0)
    if BONUS:
        extra = tl.load(bonus + head * G + g, mask=g < G, other=0.0).to(tl.float32)
    gone = tl.zeros([BN if OUT else BM], tl.float32)
    later = tl.zeros([BN], tl.float32)  # the gates' gradient after the chunk
    if GATE_GRAD and (START or SPLIT):
        later += tl.sum(state * end, 0) * finish_scale
    grown = tl.zeros([BN], tl.float32)
    bonus_grown = tl.zeros([BN], tl.float32)
    distance = gap(t[:, None], t[None, :], REVERSE)
    keep = distance >= 0
    if BONUS:  # the reader stands before its own gate, and its own write has a weight of its own
        keep = distance > 0

    for step in tl.range(0, chunks, num_stages=STAGES):
        if REVERSE:
            c = chunks - 1 - step
        else:
            c = step
        t0 = tl.cast(c * C, tl.int64)
        count = tl.minimum(length - c * C, C)
        w_CM = load_tile(w + t0 * w_token, t, m, w_token, count, M, EVEN_M).to(DOT)
        x_CN = load_tile(x + t0 * x_token, t, n, x_token, count, N, EVEN_N).to(DOT)
        if READ:
            r_CM = load_tile(r + t0 * r_token, t, m, r_token, count, M, EVEN_M).to(DOT)
        else:
            r_CM = w_CM
        partner_CN = x_CN
        if SLOPES or BONUS_GRAD:
            partner_CN = load_tile(
                partner + t0 * partner_token, t, n, partner_token, count, N, EVEN_N
            ).to(DOT)

        at = ((chunk + c) * H + head) * G
        gates = load_gates(gate + t0 * gate_token, t, g, gate_token, count, G, EVEN_G)
        before = tl.load(first + at + g, mask=g < G, other=0.0)
        after = tl.load(last + at + g, mask=g < G, other=0.0)
        gone += before + after
        near = True
        if FAR:
            near = tl.load(fits + c) != 0
        if near:
            y_CN, dots, state = near_chunk(
                r_CM, w_CM, x_CN, partner_CN, state, gates, before, after, keep,
                PARTS, OUT, REVERSE, BONUS, READ, SLOPES, DOT, PREC, C,
            )  # fmt: skip
        else:
            y_CN, dots, state = far_chunk(
                r_CM, w_CM, x_CN, partner_CN, state, gates, before + after,
                PARTS, OUT, REVERSE, BONUS, READ, SLOPES, DOT, PREC, C,
            )  # fmt: skip

        if READ:
            real = (t[:, None] < count) & (n[None, :] < N)
            token = row + t0 * H
            tile = t[:, None] * (H * N) + n[None, :]
            if SLOPES:
                dots *= y_scale
            if KEEP_READS:
                tl.store(reads + token * N + tile, dots, mask=real)
            elif GATE_GRAD:
                qdq = tl.load(reads + token * N + tile, mask=real, other=0.0)
                change = qdq - dots
                upto = tl.where(t[None, :] >= t[:, None], 1.0, 0.0)
                slope = sum_gates(upto, change, 3 if PRECISE else 2)
                slope += later[None, :]
                later += tl.sum(change, 0)
                if BONUS:
                    slope -= qdq
                if FIXED:
                    grown += tl.sum(tl.where(real, slope, 0.0), 0)
                else:
                    tl.store(dgate + token * N + tile, slope.to(dgate.dtype.element_ty), mask=real)

            if BONUS:
                if OUT:
                    own_CN = tl.sum(r_CM.to(tl.float32) * w_CM.to(tl.float32), 1)[:, None] * x_CN
                    if BONUS_GRAD:
                        bonus_grown += tl.sum(own_CN * partner_CN, 0) * y_scale
                    y_CN += own_CN * extra[None, :]
                else:
                    y_CN += tl.sum(r_CM * (w_CM * extra[None, :]), 1)[:, None] * x_CN
            tl.store(y + token * N + tile, (y_CN * y_scale).to(y.dtype.element_ty), mask=real)

    if FINISH:
        tl.store(finish + outer, state * finish_scale, mask=leaves)
    if SPLIT and KEEP_READS:
        tl.store(ends + far_off, state * finish_scale, mask=inside & (is_last == 0))
    if not READ:
        tl.store(states + far_off, state * finish_scale, mask=inside)
        tl.store(totals + (ahead * H + head) * G + g, gone, mask=(g < G) & (block == 0))
    place = (segment.to(tl.int64) * SLICES + part) * H + head
    if GATE_GRAD and FIXED:
        tl.store(dgate + place * N + n, grown, mask=n < N)
    if BONUS_GRAD:
        tl.store(dbonus + place * N + n, bonus_grown, mask=n < N)
