"""The token before: what RWKV mixes into each token."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.errors import fail


def token_shift(
    x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x_{t-1} for every token of x, and the last tokens.

    Args:
        x: [B,T,D].
        state: [N,1,D], the token before the first of each sequence; None for zeros.
        cu_seqlens: [N+1], the bounds of N packed sequences (then B is 1).

    Returns:
        [B,T,D] and [N,1,D].

    Raises:
        ValueError: a state of another shape.
    """
    B, T, D = x.shape
    rows = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if state is None:
        state = torch.zeros(rows, 1, D, dtype=x.dtype, device=x.device)
    elif state.shape != (rows, 1, D):
        got, expected = f"shape {tuple(state.shape)}", f"[N,1,D] = {(rows, 1, D)}"
        raise fail("state['shift']", got, expected, "pass what an earlier call returned")
    state = state.to(x.dtype)
    if cu_seqlens is None:
        if T == 1:
            return state, x
        return torch.cat([state, x[:, :-1]], 1), x[:, -1:].contiguous()
    bounds = cu_seqlens.long()
    before = torch.cat([x[:, :1], x[:, :-1]], 1)
    before = before.index_copy(1, bounds[:-1], state.transpose(0, 1))
    return before, x.index_select(1, bounds[1:] - 1).transpose(0, 1).contiguous()
