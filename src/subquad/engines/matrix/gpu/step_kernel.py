"""The Triton kernel of one decoded token of the matrix recurrence: one pass over the state.

A program owns one head of one row and BV value columns of its state [K, V]: it reads them once,
forgets, erases, writes, reads out and stores them once. A column's K numbers all lie in the
program, so the sums over K (what an erase sees, what the query reads) need nothing from elsewhere,
and all of the state is loaded before any of it is stored: `new` may be `state` itself.

Shape suffixes: K key channels, V value columns of the program.
"""

import triton
import triton.language as tl

# Kinds of gate (GATE) and of erase (ERASE); layout.py and matrix_step.py number them alike.
NONE = tl.constexpr(0)
KEY = tl.constexpr(3)
DELTA = tl.constexpr(1)
LOW_RANK = tl.constexpr(2)


@triton.jit
def step(
    q, k, v, gate, beta, a, b, bonus, state, o, new,
    q_row, q_head, k_row, k_head, v_row, v_head, gate_row, gate_head, beta_row, beta_head,
    a_row, a_head, b_row, b_head, scale,
    H: tl.constexpr, SHARE: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, GATE: tl.constexpr, ERASE: tl.constexpr, BONUS: tl.constexpr,
    START: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    BLOCKS: tl.constexpr = (V + BV - 1) // BV
    columns = (pid % BLOCKS) * BV + tl.arange(0, BV)
    head = ((pid // BLOCKS) % H).to(tl.int64)  # the next one can be a long sequence away
    row = (pid // (BLOCKS * H)).to(tl.int64)
    channels = tl.arange(0, BK)
    in_K, in_V = channels < K, columns < V
    inside = in_K[:, None] & in_V[None, :]

    cells = (row * H + head) * (K * V) + channels[:, None] * V + columns[None, :]
    state_KV = tl.zeros([BK, BV], tl.float32)
    if START:
        state_KV = tl.load(state + cells, mask=inside, other=0.0)
    key = head // SHARE
    q_K = tl.load(q + row * q_row + key * q_head + channels, mask=in_K, other=0.0).to(tl.float32)
    k_K = tl.load(k + row * k_row + key * k_head + channels, mask=in_K, other=0.0).to(tl.float32)
    v_V = tl.load(v + row * v_row + head * v_head + columns, mask=in_V, other=0.0).to(tl.float32)
    q_K *= scale

    before = state_KV
    gates = gate + row * gate_row + head * gate_head
    if GATE == KEY:
        state_KV *= tl.exp(tl.load(gates + channels, mask=in_K, other=0.0).to(tl.float32))[:, None]
    elif GATE != NONE:
        state_KV *= tl.exp(tl.load(gates).to(tl.float32))
    if ERASE == DELTA:
        strength = tl.load(beta + row * beta_row + head * beta_head).to(tl.float32)
        v_V = strength * (v_V - tl.sum(k_K[:, None] * state_KV, 0))
    elif ERASE == LOW_RANK:
        a_K = tl.load(a + row * a_row + head * a_head + channels, mask=in_K, other=0.0)
        b_K = tl.load(b + row * b_row + head * b_head + channels, mask=in_K, other=0.0)
        seen = tl.sum(a_K.to(tl.float32)[:, None] * before, 0)
        state_KV += b_K.to(tl.float32)[:, None] * seen[None, :]
    state_KV += k_K[:, None] * v_V[None, :]
    if BONUS:  # the query reads before the write, the token itself through the bonus
        extra = tl.load(bonus + head * K + channels, mask=in_K, other=0.0).to(tl.float32)
        o_V = tl.sum(q_K[:, None] * before, 0) + tl.sum(q_K * extra * k_K, 0) * v_V
    else:
        o_V = tl.sum(q_K[:, None] * state_KV, 0)
    tl.store(new + cells, state_KV, mask=inside)
    tl.store(o + (row * H + head) * V + columns, o_V.to(o.dtype.element_ty), mask=in_V)
