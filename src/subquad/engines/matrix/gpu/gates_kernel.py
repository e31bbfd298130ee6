"""Sums of gates made before the scans, and the gradient of gates per head made after them."""

import triton
import triton.language as tl

from subquad.engines.matrix.gpu.tiles import FARTHEST, FLOOR2, LOG2E, at_least, load_gates, locate


@triton.jit(do_not_specialize=["tokens", "seg_len", "per_row", "chunks_in_all"])
def sum_head_gates(
    gate, wholes, fractions, table, tokens, seg_len, per_row, chunks_in_all, gate_token, gate_head,
    H: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """A head's gates summed from each chunk's beginning, [H, chunks, C], in powers of two.

    Past a sequence's end nothing decays: its last chunk is filled up with the last sum.
    PRECISE: whole numbers and fractions apart; otherwise all of it in `wholes`.
    """
    pid = tl.program_id(0)
    head = pid % H
    begin, length, chunk = locate(pid // H, table, tokens, seg_len, per_row, PACKED, C)
    t = tl.arange(0, C)
    gate += begin * gate_token + head * gate_head
    for c in range(0, tl.cdiv(length, C)):
        t0 = tl.cast(c * C, tl.int64)
        mask = t0 + t < length
        value = tl.load(gate + (t0 + t) * gate_token, mask=mask, other=0.0).to(tl.float32)
        value = at_least(value * LOG2E, FLOOR2)
        at = (head * tl.cast(chunks_in_all, tl.int64) + chunk + c) * C + t
        if PRECISE:
            floor = tl.floor(value)
            tl.store(fractions + at, tl.cumsum(value - floor, 0))
            value = floor
        tl.store(wholes + at, tl.cumsum(value, 0))


@triton.jit(do_not_specialize=["tokens", "seg_len", "per_row", "chunks_in_all"])
def sum_key_gates(
    gate, first, last, fits, table, tokens, seg_len, per_row, chunks_in_all, gate_token, gate_head,
    H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Summed gates of every chunk's two halves, and whether the middle-factored path may run."""
    pid = tl.program_id(0)
    head = pid % H
    begin, length, chunk = locate(pid // H, table, tokens, seg_len, per_row, PACKED, C)
    t = tl.arange(0, C // 2)
    k = tl.arange(0, BK)
    gate += begin * gate_token + head * gate_head
    for c in range(0, tl.cdiv(length, C)):
        base = gate + tl.cast(c * C, tl.int64) * gate_token
        count = length - c * C
        left = load_gates(base, t, k, gate_token, count, K, BK == K).to(tl.float32)
        right = load_gates(base, t + C // 2, k, gate_token, count, K, BK == K).to(tl.float32)
        # Sums of sizes, not sizes of sums: gates of both signs must not hide one another.
        size = tl.maximum(tl.sum(tl.abs(left), 0), tl.sum(tl.abs(right), 0))
        at = (chunk + c) * H + head
        tl.store(first + at * K + k, tl.sum(left, 0), mask=k < K)
        tl.store(last + at * K + k, tl.sum(right, 0), mask=k < K)
        flag = head * tl.cast(chunks_in_all, tl.int64) + chunk + c
        tl.store(fits + flag, (tl.max(size, 0) <= FARTHEST).to(tl.int32))


@triton.jit(do_not_specialize=["tokens", "seg_len", "per_row"])
def sum_slopes(
    reads, writes, tails, dgate, table, tokens, seg_len, per_row,
    H: tl.constexpr, SHARES: tl.constexpr, C: tl.constexpr, FIXED: tl.constexpr,
    BONUS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The gradient of gates per head: reverse sums of q.dq - k.dk over a segment."""
    pid = tl.program_id(0)
    head = pid % H
    place = pid.to(tl.int64)
    begin, length, _ = locate(pid // H, table, tokens, seg_len, per_row, PACKED, C)
    t = tl.arange(0, C)
    grown = tl.zeros([C], tl.float32)
    later = tl.load(tails + place * SHARES)
    for share in tl.static_range(1, SHARES):
        later += tl.load(tails + place * SHARES + share)
    chunks = tl.cdiv(length, C)
    for step in range(0, chunks):
        t0 = tl.cast((chunks - 1 - step) * C, tl.int64)
        real = t0 + t < length
        token = (begin + t0 + t) * H + head
        qdq = tl.zeros([C], tl.float32)
        kdk = tl.zeros([C], tl.float32)
        for share in tl.static_range(SHARES):
            qdq += tl.load(reads + token * SHARES + share, mask=real, other=0.0)
            kdk += tl.load(writes + token * SHARES + share, mask=real, other=0.0)
        slope = tl.cumsum(qdq - kdk, 0, reverse=True) + later
        later += tl.sum(qdq - kdk, 0)
        if BONUS:
            slope -= qdq
        if FIXED:
            grown += tl.where(real, slope, 0.0)
        else:
            tl.store(dgate + token, slope.to(dgate.dtype.element_ty), mask=real)
    if FIXED:
        tl.store(dgate + place, tl.sum(grown, 0))
