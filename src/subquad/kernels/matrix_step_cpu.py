"""One token of the matrix recurrence on the CPU, for decoding: float32, one pass over the state.

In PyTorch each of decay, erase, write and read walks over the state by itself and allocates it
anew; decoding is bound by exactly that. Here every row of the state is read once (twice with an
erase, the second time from cache), written once, and read out while it is in registers.

R rows (batch x heads)   K key size   V value size
"""

# mypy: ignore-errors
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from subquad.kernels.cpu import SLICE, array, jit, over_channels

SILENT = np.float32(1e-30)  # a state this small is zero: denormal numbers are slow


@jit
def _step(q, k, v, decay, beta, a, b, bonus, state, o, new, start, stop):
    """For rows start/SLICE to stop/SLICE. Empty arrays stand for what is absent.

    q, k [R/G,K]; v, o [R,V]; decay [R,1], [R,K] or empty; beta [R]; a, b [R,K]; bonus [H,K];
    state, new [R,K,V].
    """
    R, K, V = state.shape
    shared = R // k.shape[0]
    seen = np.empty(V, np.float32)  # what the token reads before it writes: S^T k or S^T a
    write = np.empty(V, np.float32)
    keep = np.float32(1.0)
    for r in range(start // SLICE, stop // SLICE):
        q_r, k_r, v_r, o_r = q[r // shared], k[r // shared], v[r], o[r]
        for j in range(V):
            o_r[j] = np.float32(0.0)
            seen[j] = np.float32(0.0)
            write[j] = v_r[j]
        if beta.size > 0 or a.size > 0:
            for i in range(K):
                if a.size > 0:
                    x = a[r, i]
                else:
                    x = k_r[i]
                    if decay.size > 0:
                        x *= decay[r, i if decay.shape[1] > 1 else 0]
                row = state[r, i]
                for j in range(V):
                    seen[j] += x * row[j]
            if beta.size > 0:
                for j in range(V):
                    write[j] = beta[r] * (v_r[j] - seen[j])
        for i in range(K):
            if decay.size > 0:
                keep = decay[r, i if decay.shape[1] > 1 else 0]
            row, out, x, y = state[r, i], new[r, i], k_r[i], q_r[i]
            if a.size > 0:
                back = b[r, i]
                for j in range(V):
                    n = keep * row[j] + x * write[j] + back * seen[j]
                    out[j] = n if abs(n) > SILENT else np.float32(0.0)
            else:
                for j in range(V):
                    n = keep * row[j] + x * write[j]
                    out[j] = n if abs(n) > SILENT else np.float32(0.0)
            if bonus.size > 0:  # read before the write, the token itself through u
                u = bonus[r % bonus.shape[0], i] * x
                for j in range(V):
                    o_r[j] += y * (row[j] + u * write[j])
            else:
                for j in range(V):
                    o_r[j] += y * out[j]


_ABSENT = np.empty(0, np.float32)
_ABSENT_2D = np.empty((0, 0), np.float32)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    bonus: Tensor | None,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """As `reference.step`, for plain float32 CPU tensors and no gradients.

    q (scaled), k [B,Hk,K]; v [B,H,V]; decay [B,H,1|K] (not its logarithm); beta [B,H]; a, b
    [B,H,K]; bonus [H,K]; state [B,H,K,V]. Returns o [B,H,V] and the new state.
    """
    B, H, K, V = state.shape
    o, new = torch.empty((B, H, V)), torch.empty((B, H, K, V))

    def flat(x: Tensor | None) -> np.ndarray:
        return _ABSENT_2D if x is None else array(x.flatten(0, 1))

    over_channels(
        _step,
        B * H * SLICE,  # split by heads: what the splitter takes for a line of channels
        state.numel(),
        *(flat(x) for x in (q, k, v, decay)),
        _ABSENT if beta is None else array(beta.flatten()),
        *(flat(x) for x in (a, b)),
        _ABSENT_2D if bonus is None else array(bonus),
        array(state.flatten(0, 1)),
        o.flatten(0, 1).numpy(),
        new.flatten(0, 1).numpy(),
    )
    return o, new
