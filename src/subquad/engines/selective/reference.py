"""The selective scan's specification: one step, and the loop over tokens.

Bt batch   T time   D channels   N state numbers a channel   S sequences (of the batch, or packed)
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def step(
    x: Tensor,  # [Bt,D]
    dt: Tensor,  # [Bt,D]
    A: Tensor,  # [D,N]
    B: Tensor,  # [Bt,N]
    C: Tensor,  # [Bt,N]
    D: Tensor,  # [D]
    state: Tensor,  # [Bt,D,N]
) -> tuple[Tensor, Tensor]:
    """One token: the specification. Returns y [Bt,D] and the next state [Bt,D,N]."""
    decay = torch.exp(dt[:, :, None] * A)  # [Bt,D,N]
    state = decay * state + (dt * x)[:, :, None] * B[:, None, :]  # [Bt,D,N]
    return (state * C[:, None, :]).sum(-1) + D * x, state


def loop(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The loop over tokens, one packed sequence after another."""
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        parts = []
        for s, (i, j) in enumerate(pairwise(bounds)):
            x_s, dt_s, B_s, C_s = (t[:, i:j] for t in (x, dt, B, C))
            parts.append(loop(x_s, dt_s, A, B_s, C_s, D, state[s : s + 1]))
        return torch.cat([y for y, _ in parts], 1), torch.cat([h for _, h in parts])
    outputs = []
    for t in range(x.shape[1]):
        y, state = step(x[:, t], dt[:, t], A, B[:, t], C[:, t], D, state)
        outputs.append(y)
    return torch.stack(outputs, 1), state
