"""One token of the matrix recurrence on the CPU, for decoding: float32, one pass over the state.

In PyTorch each of decay, erase, write and read walks over the state by itself and allocates it
anew; decoding is bound by exactly that. Here every row of the state is read once (twice with an
erase, the second time from cache), written once, and read out while it is in registers.

R rows (batch x heads)   H heads   G heads that share a key   K key size   V value size
"""

# mypy: ignore-errors
from __future__ import annotations

import numpy as np
from torch import Tensor

from subquad.backend.cpu.compile import SLICE, address, at, exp, jit, over_channels
from subquad.backend.cpu.tape import Tape, integers, kernel, real
from subquad.engines.matrix.kind import is_per_key

SILENT = np.float32(1e-30)  # a state this small is zero: denormal numbers are slow


@jit
def _step(
    q, k, v, log_decay, beta, a, b, bonus, state, value_log_decay, o, new,  # addresses, 0: absent
    R, H, G, K, V, scale, rates, width, value_rates, start, stop,
):  # fmt: skip
    """For rows start/SLICE to stop/SLICE of R = B * H.

    q, k [R/G,K]; v, o [R,V]; log_decay [rates,width], rates R or H, width 1 or K; beta [R]; a, b
    [R,K]; bonus [H,K]; state, new [R,K,V]; value_log_decay [value_rates,V].
    """
    queries, keys, values, out = (
        at(q, (R // G, K)),
        at(k, (R // G, K)),
        at(v, (R, V)),
        at(o, (R, V)),
    )
    old_state, new_state = at(state, (R, K, V)), at(new, (R, K, V))
    log_decays, betas, u = at(log_decay, (rates, width)), at(beta, (R,)), at(bonus, (H, K))
    readers, writers = at(a, (R, K)), at(b, (R, K))
    value_log_decays = at(value_log_decay, (value_rates, V))
    along_values = np.ones(V, np.float32)
    seen = np.empty(V, np.float32)  # what the token reads before it writes: S^T k or S^T a
    write = np.empty(V, np.float32)
    decay = np.ones(K, np.float32)
    for r in range(start // SLICE, stop // SLICE):
        q_r, k_r, v_r, o_r = queries[r // G], keys[r // G], values[r], out[r]
        if log_decay != 0:
            for i in range(K):
                decay[i] = exp(log_decays[r % rates, i if width > 1 else 0])
        if value_log_decay != 0:
            for j in range(V):
                along_values[j] = exp(value_log_decays[r % value_rates, j])
        for j in range(V):
            o_r[j] = np.float32(0.0)
            seen[j] = np.float32(0.0)
            write[j] = v_r[j]
        if beta != 0 or a != 0:
            for i in range(K):
                x = readers[r, i] if a != 0 else k_r[i] * decay[i]
                row = old_state[r, i]
                for j in range(V):
                    seen[j] += x * row[j]
            if beta != 0:
                for j in range(V):
                    write[j] = betas[r] * (v_r[j] - seen[j])
        for i in range(K):
            row, new_row = old_state[r, i], new_state[r, i]
            keep, x, y = decay[i], k_r[i], np.float32(scale * q_r[i])
            if a != 0:
                back = writers[r, i]
                for j in range(V):
                    n = keep * row[j] + x * write[j] + back * seen[j]
                    new_row[j] = np.float32(0.0) if abs(n) < SILENT else n  # NaN stays NaN
            elif value_log_decay != 0:
                for j in range(V):
                    n = keep * along_values[j] * row[j] + x * write[j]
                    new_row[j] = np.float32(0.0) if abs(n) < SILENT else n
            else:
                for j in range(V):
                    n = keep * row[j] + x * write[j]
                    new_row[j] = np.float32(0.0) if abs(n) < SILENT else n
            if bonus != 0:  # read before the write, the token itself through u
                through = u[r % H, i] * x
                for j in range(V):
                    o_r[j] += y * (row[j] + through * write[j])
            else:
                for j in range(V):
                    o_r[j] += y * new_row[j]


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    bonus: Tensor | None,
    scale: float,
    state: Tensor,
    value_log_decay: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `linear_recurrence` with T = 1, for plain float32 CPU tensors and no gradients.

    q, k [B,1,Hk,K]; v [B,1,H,V]; log_decay [H], [H,K], [B,1,H] or [B,1,H,K]; beta [B,1,H]; a, b
    [B,1,H,K]; bonus [H,K]; state [B,H,K,V]; value_log_decay [H,V] or [B,1,H,V]. Returns o
    [B,1,H,V] and the new state.
    """
    B, H, K, V = state.shape
    o, new = v.new_empty(v.shape), v.new_empty(state.shape)
    inputs = [
        None if x is None else x.contiguous()
        for x in (q, k, v, log_decay, beta, a, b, bonus, state, value_log_decay)
    ]
    over_channels(
        _step,
        B * H * SLICE,  # split by heads: what the splitter takes for a line of channels
        state.numel(),
        *(address(x) for x in inputs),
        address(o),
        address(new),
        B * H,
        H,
        H // k.shape[2],
        K,
        V,
        float(scale),
        *_rates(log_decay, K),
        _value_rates(value_log_decay, V),
    )
    return o, new


@kernel
def _unit(arguments, unit):
    n = integers(arguments, 21)
    _step(
        n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11],
        n[12], n[13], n[14], n[15], n[16], real(n[17]), n[18], n[19], n[20],
        unit * SLICE, (unit + 1) * SLICE,
    )  # fmt: skip


def record(
    tape: Tape,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    bonus: Tensor | None,
    scale: float,
    state: Tensor,
    value_log_decay: Tensor | None,
    o: Tensor,
    new: Tensor,
) -> None:
    """`step` of contiguous tensors, into o and new."""
    B, H, K, V = state.shape
    tensors = (q, k, v, log_decay, beta, a, b, bonus, state, value_log_decay, o, new)
    sizes = (B * H, H, H // k.shape[2], K, V)
    rates = (*_rates(log_decay, K), _value_rates(value_log_decay, V))
    tape.step(_unit, B * H, *tensors, *sizes, float(scale), *rates)


def _value_rates(value_log_decay: Tensor | None, V: int) -> int:
    return 0 if value_log_decay is None else value_log_decay.numel() // V


def _rates(log_decay: Tensor | None, K: int) -> tuple[int, int]:
    """The rows and the width of a decay: by head or by row of the state, one number or K."""
    if log_decay is None:
        return 0, 1
    width = K if is_per_key(log_decay) else 1
    return log_decay.numel() // width, width
