"""The backward pass of heads that share their keys and have gates per head, as Mamba-2's do.

Scans as in `scan.py` would write dq and dk for every head and add them up afterwards. Here
`chunk_states` walks the sequence twice and stores what stands at every chunk's borders: the state,
and then the gradient of the state. With both at hand no chunk waits for another one. A program of
`value_gradients` or `key_gradients` takes one chunk and all heads in turn: q, k and the products of
the two are made once, dq and dk add up in the accumulators. In one kernel the two spilled registers
and took twice as long.

Pairs of tokens are matrices with the writer's row and the reader's column, and dq stands with its
channels as rows: so no product's result is transposed to enter another one, which Triton 3.6
miscompiles.
"""

import triton
import triton.language as tl

from subquad.engines.matrix.gpu.scan_kernel import fixed_decays, fixed_gate, head_decays
from subquad.engines.matrix.gpu.tiles import HEAD, HEAD_FIXED, load_tile, locate, neighbours


@triton.jit(do_not_specialize=["tokens", "seg_len", "per_row", "chunks_in_all"])
def chunk_states(
    w, x, gate, sums, start, entering, states, finish,
    table, tokens, seg_len, per_row, chunks_in_all, scale,
    w_head, x_head, gate_head, w_token: tl.constexpr, x_token: tl.constexpr,
    H: tl.constexpr, SHARE: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr,
    REVERSE: tl.constexpr, START: tl.constexpr, SPLIT: tl.constexpr, FINISH: tl.constexpr,
    PACKED: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The state that enters each chunk of a segment, `states` [chunks, H, V, K], bfloat16.

    w, x = k, v; or REVERSE q, do: the gradient of the state that leaves each chunk.
    start, finish: [sequences, H, K, V], what enters and what leaves the sequences. SPLIT: they have
    several segments, and `entering` [boundaries, H, K, V] holds the states between two.
    """
    BLOCKS: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    block = pid % BLOCKS
    head = (pid // BLOCKS) % H
    segment = pid // (BLOCKS * H)
    begin, length, chunk = locate(segment, table, tokens, seg_len, per_row, PACKED, C)
    chunks = tl.cdiv(length, C)
    t = tl.arange(0, C)
    n = tl.arange(0, BK)
    m = block * BV + tl.arange(0, BV)
    inside = (m[:, None] < V) & (n[None, :] < K)
    cell = m[:, None] + n[None, :] * V
    sequence, is_first, is_last, behind, _ = neighbours(segment, table, per_row, PACKED, REVERSE)
    outer = (sequence * H + head) * (K * V) + cell
    w += begin * w_token + (head // SHARE) * w_head
    x += begin * x_token + head * x_head
    state = tl.zeros([BV, BK], tl.float32)
    if START:
        enters = inside & is_first & (sequence >= 0)
        state += tl.load(start + outer, mask=enters, other=0.0)
    if SPLIT:
        near = (behind * H + head) * (K * V) + cell
        state += tl.load(entering + near, mask=inside & (is_first == 0), other=0.0)
    if GATE == HEAD_FIXED:
        step_gate = fixed_gate(gate + head * gate_head)

    for step in tl.range(0, chunks, num_stages=STAGES):
        if REVERSE:
            c = chunks - 1 - step
        else:
            c = step
        t0 = tl.cast(c * C, tl.int64)
        count = tl.minimum(length - c * C, C)
        w_CK = load_tile(w + t0 * w_token, t, n, w_token, count, K, K == BK).to(DOT)
        x_CV = load_tile(x + t0 * x_token, t, m, x_token, count, V, V % BV == 0)
        if GATE == HEAD:
            at = (head * chunks_in_all.to(tl.int64) + chunk + c) * C
            summed = tl.load(sums + at + t)
            total = tl.load(sums + at + C - 1)
            if REVERSE:
                write = summed
            else:
                write = total - summed
        else:
            total = count.to(tl.float32) * step_gate
            if REVERSE:
                write = (t.to(tl.float32) + 1.0) * step_gate
            else:
                write = tl.maximum(count - 1 - t, 0).to(tl.float32) * step_gate
        at = ((chunk + c).to(tl.int64) * H + head) * (K * V)
        tl.store(states + at + m[:, None] * K + n[None, :], state.to(DOT), mask=inside)
        moved = (x_CV * (tl.exp2(write) * scale)[:, None]).to(DOT)
        state = tl.dot(tl.trans(moved), w_CK, state * tl.exp2(total))

    if FINISH:
        leaves = inside & is_last & (sequence >= 0)
        tl.store(finish + outer, state, mask=leaves)


@triton.jit
def chunk_gates(gate, sums, head, chunk, chunks_in_all, gate_head, distance, t, count,
                GATE: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """log2 decays of a head in one chunk: of each pair, up to the reader, after the writer, in all.

    A pair whose writer comes later than its reader has a wrong decay, but never an infinite one.
    """
    if GATE == HEAD:
        sums += (head * chunks_in_all.to(tl.int64) + chunk) * C
        pair, read, write, total = head_decays(sums, sums, False, False, False, C)
    else:
        step_gate = fixed_gate(gate + head * gate_head)
        pair, read, write, total = fixed_decays(distance, step_gate, t, count, False)
    pair = tl.minimum(pair, 127.0, propagate_nan=tl.PropagateNan.ALL)
    return pair, read, write, total


@triton.jit(do_not_specialize=["tokens", "seg_len", "per_row", "chunks_in_all", "parts", "each"])
def value_gradients(
    q, k, v, do, gate, sums, states, dstates, dv, dgate,
    table, tokens, seg_len, per_row, chunks_in_all, parts, each, scale,
    q_head, k_head, v_head, do_head, gate_head,
    q_token: tl.constexpr, k_token: tl.constexpr, v_token: tl.constexpr, do_token: tl.constexpr,
    H: tl.constexpr, SHARE: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr,
    SLOPES: tl.constexpr, PACKED: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dv and (SLOPES) the gates' gradients in a chunk, for `each` heads of one key head.

    states, dstates: what chunk_states made, [chunks, H, V, K]. dgate: [tokens, H] float32.

    A gate's gradient is what all pairs of tokens across it weigh, a pair (q . k) (do . v) gates:
    those from before the chunk to behind it (`across`), those that the chunk's later tokens read
    (`earlier`) and its earlier ones write (`later`), and those within. The last are told by their
    readers less their writers, from the gate on; both sums see the same rounded scores.
    """
    pid = tl.program_id(0)
    part = pid % parts
    shared = (pid // parts) % (H // SHARE)
    segment = pid // (parts * (H // SHARE))
    begin, length, chunk = locate(segment, table, tokens, seg_len, per_row, PACKED, C)
    if length <= 0:
        return
    t = tl.arange(0, C)
    n = tl.arange(0, BK)
    m = tl.arange(0, BV)
    q_CK = load_tile(q + begin * q_token + shared * q_head, t, n, q_token, length, K, K == BK)
    k_CK = load_tile(k + begin * k_token + shared * k_head, t, n, k_token, length, K, K == BK)
    distance = t[None, :] - t[:, None]
    keys = tl.where(distance >= 0, tl.dot(k_CK, tl.trans(q_CK)) * scale, 0.0)
    inside = (m[:, None] < V) & (n[None, :] < K)
    real = (t[:, None] < length) & (m[None, :] < V)
    v += begin * v_token
    do += begin * do_token

    first = shared * SHARE + part * each
    for head in tl.range(first, tl.minimum(first + each, (shared + 1) * SHARE), num_stages=STAGES):
        v_CV = load_tile(v + head * v_head, t, m, v_token, length, V, V == BV)
        do_CV = load_tile(do + head * do_head, t, m, do_token, length, V, V == BV)
        at = (chunk.to(tl.int64) * H + head) * (K * V) + m[:, None] * K + n[None, :]
        state = tl.load(states + at, mask=inside, other=0.0)
        dstate = tl.load(dstates + at, mask=inside, other=0.0)
        pair, read, write, total = chunk_gates(
            gate, sums, head, chunk, chunks_in_all, gate_head, distance, t, length, GATE, C
        )
        scores = (keys * tl.exp2(pair)).to(DOT)
        dv_CV = tl.dot(k_CK, tl.trans(dstate)) * tl.exp2(write)[:, None]
        dv_CV = tl.dot(scores, do_CV, dv_CV)
        if SLOPES:
            across = tl.sum(tl.sum(state.to(tl.float32) * dstate, 1), 0) * tl.exp2(total)
            o_CV = tl.dot(q_CK, tl.trans(state)) * (tl.exp2(read) * scale)[:, None]
            earlier = tl.sum(do_CV * o_CV, 1)
            own = tl.dot(v_CV, tl.trans(do_CV)) * scores
            later = tl.sum(v_CV * dv_CV, 1) - tl.sum(own, 0)  # and the writers less the readers
            slope = tl.cumsum(earlier - later, 0, reverse=True) + (across + tl.sum(later, 0))
            tl.store(dgate + (begin + t) * H + head, slope, mask=t < length)
        tile = (begin + t[:, None]) * (H * V) + head * V + m[None, :]
        tl.store(dv + tile, dv_CV.to(dv.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["tokens", "seg_len", "per_row", "chunks_in_all", "parts", "each"])
def key_gradients(
    q, k, v, do, gate, sums, states, dstates, dq, dk,
    table, tokens, seg_len, per_row, chunks_in_all, parts, each, scale,
    q_head, k_head, v_head, do_head, gate_head,
    q_token: tl.constexpr, k_token: tl.constexpr, v_token: tl.constexpr, do_token: tl.constexpr,
    H: tl.constexpr, SHARE: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr,
    PACKED: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What `each` heads of one key head add to dq and dk in a chunk.

    dq, dk: [tokens, H / SHARE, parts, K], of which each program writes one part. The products of
    do and v within the chunk are summed over the heads before they meet the keys.
    """
    pid = tl.program_id(0)
    part = pid % parts
    shared = (pid // parts) % (H // SHARE)
    segment = pid // (parts * (H // SHARE))
    begin, length, chunk = locate(segment, table, tokens, seg_len, per_row, PACKED, C)
    if length <= 0:
        return
    t = tl.arange(0, C)
    n = tl.arange(0, BK)
    m = tl.arange(0, BV)
    inside = (m[:, None] < V) & (n[None, :] < K)
    distance = t[None, :] - t[:, None]
    pairs = tl.zeros([C, C], tl.float32)
    dq_KC = tl.zeros([BK, C], tl.float32)
    dk_CK = tl.zeros([C, BK], tl.float32)
    v += begin * v_token
    do += begin * do_token

    first = shared * SHARE + part * each
    for head in tl.range(first, tl.minimum(first + each, (shared + 1) * SHARE), num_stages=STAGES):
        v_CV = load_tile(v + head * v_head, t, m, v_token, length, V, V == BV)
        do_CV = load_tile(do + head * do_head, t, m, do_token, length, V, V == BV)
        at = (chunk.to(tl.int64) * H + head) * (K * V) + m[:, None] * K + n[None, :]
        state = tl.load(states + at, mask=inside, other=0.0)
        dstate = tl.load(dstates + at, mask=inside, other=0.0)
        pair, read, write, _ = chunk_gates(
            gate, sums, head, chunk, chunks_in_all, gate_head, distance, t, length, GATE, C
        )
        pairs += tl.dot(v_CV, tl.trans(do_CV)) * tl.exp2(pair)
        dk_CK = tl.dot((v_CV * tl.exp2(write)[:, None]).to(DOT), dstate, dk_CK)
        near_do = (do_CV * (tl.exp2(read) * scale)[:, None]).to(DOT)
        dq_KC = tl.dot(tl.trans(state), tl.trans(near_do), dq_KC)

    q_CK = load_tile(q + begin * q_token + shared * q_head, t, n, q_token, length, K, K == BK)
    k_CK = load_tile(k + begin * k_token + shared * k_head, t, n, k_token, length, K, K == BK)
    pairs = tl.where(distance >= 0, pairs * scale, 0.0).to(DOT)
    dk_CK = tl.dot(pairs, q_CK, dk_CK)
    dq_KC = tl.dot(tl.trans(k_CK), pairs, dq_KC)
    row = ((begin + t) * (H // SHARE) + shared) * parts + part
    real = (t[:, None] < length) & (n[None, :] < K)
    tl.store(dk + row[:, None] * K + n[None, :], dk_CK.to(dk.dtype.element_ty), mask=real)
    real = (n[:, None] < K) & (t[None, :] < length)
    tl.store(dq + row[None, :] * K + n[:, None], dq_KC.to(dq.dtype.element_ty), mask=real)
