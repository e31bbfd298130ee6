"""The selective scan on a GPU: launches of the Triton kernels in `kernels.py`.

M tokens of all sequences   S sequences   D channels   N state numbers a channel   K checkpoints
"""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.backend.gpu.launch import launch_one
from subquad.backend.gpu.launch_cache import replayed

TOKENS = 32  # of a tile; a state is kept before each for the backward pass
_NUMBERS = 64  # state numbers [BD,BN] of a program: more, and a tile does not fit in registers
# Each share of dB and dC is a tensor of its own, so there are no more of them than fill the chip.
_FEWEST_SHARES, _PROGRAMS = 32, 512


def checkpoint_shape(x: Tensor, A: Tensor, sequences: int) -> tuple[int, ...]:
    """[K,D,N]: a state before each tile; a sequence's begin at its first token / TOKENS + s."""
    return x.shape[0] * x.shape[1] // TOKENS + sequences, *A.shape


def _tiles(A: Tensor) -> dict[str, int]:
    D, N = A.shape
    BN = 1 << (N - 1).bit_length()
    return {"D": D, "N": N, "BT": TOKENS, "BD": max(1, _NUMBERS // BN), "BN": BN}


@replayed
def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [Bt,T,D], the last states [S,D,N], and checkpoints [K,D,N], or [0,D,N] without `save`."""
    from subquad.engines.selective.kernels import forward as kernel

    x, dt, A, B, C, D, state = (tensor.contiguous() for tensor in (x, dt, A, B, C, D, state))
    bounds = None if cu_seqlens is None else cu_seqlens.contiguous()
    S = state.shape[0]
    K = checkpoint_shape(x, A, S)[0] if save else 0
    y, last = torch.empty_like(x), torch.empty_like(state)
    checkpoints = x.new_empty(K, *A.shape)
    sizes = _tiles(A)
    blocks = -(-sizes["D"] // sizes["BD"])
    launch_one(
        kernel, (S * blocks,),
        x, dt, A, B, C, D, state, bounds, y, last, checkpoints, x.shape[1],
        BLOCKS=blocks, PACKED=bounds is not None, SAVE=save, **sizes,
    )  # fmt: skip
    return y, last, checkpoints


@replayed
def backward(
    dy: Tensor,
    dlast: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    checkpoints: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of x, dt, A, B, C, D and state from those of y and the last states.

    Shares are summed in a fixed order, so the gradients repeat to the bit.
    """
    from subquad.engines.selective.kernels import backward as kernel

    dy, dlast, x, dt, A, B, C, D = (t.contiguous() for t in (dy, dlast, x, dt, A, B, C, D))
    bounds = None if cu_seqlens is None else cu_seqlens.contiguous()
    S, tokens = state.shape[0], x.shape[0] * x.shape[1]
    sizes = _tiles(A)
    blocks = -(-sizes["D"] // sizes["BD"])
    each = -(-blocks // max(_FEWEST_SHARES, _PROGRAMS // S))
    parts = -(-blocks // each)
    dx, ddt, dstate = torch.empty_like(x), torch.empty_like(dt), torch.empty_like(dlast)
    dA = A.new_empty(S, *A.shape)
    dB, dC = (x.new_empty(parts, *B.shape) for _ in range(2))
    launch_one(
        kernel, (S * parts,),
        dy, dlast, x, dt, A, B, C, D, bounds, checkpoints,
        dx, ddt, dA, dB, dC, dstate, x.shape[1], tokens,
        PARTS=parts, EACH=each, PACKED=bounds is not None, **sizes,
    )  # fmt: skip
    return dx, ddt, dA.sum(0), dB.sum(0), dC.sum(0), (dy * x).sum((0, 1)), dstate
