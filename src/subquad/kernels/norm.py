"""RMS norms of groups of channels on a GPU, gated or not, as operators over Triton kernels.

Differentiable in x, gate and weight. The weight's gradient is summed program by program in a fixed
order: it repeats to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gpu import reason_to_decline, rows
from .operator import operator

WIDEST = 16384  # channels of a group: a program holds all of one
TILE = 1024  # numbers a program holds of each tensor, or one group's, if that is more
STEPS = 16  # tiles that a program of the backward pass walks, to write fewer partial sums


def supported(x: Tensor, size: int, weight: Tensor | None, gate: Tensor | None) -> str | None:
    """None if the kernels can take these tensors, else why not."""
    if size > WIDEST:
        return f"groups of {size} channels; the Triton kernels hold at most {WIDEST}"
    return reason_to_decline(x, weight, gate)


@operator("subquad::rms_norm")
def norm(
    x: Tensor, gate: Tensor | None, weight: Tensor | None, size: int, gate_first: bool, eps: float,
    scale: float,
) -> Tensor:  # fmt: skip
    """x [..., D] over the root mean square of each `size` channels, times scale, weight and silu.

    gate like x; weight [D] or [size]. The result has x's dtype, promoted with the gate's.
    """
    from .normalise import forward

    tokens, groups = x.numel() // x.shape[-1], x.shape[-1] // size
    y = _result(x, gate)
    x, gate = rows(x), None if gate is None else rows(gate)
    blocks = _blocks(size)
    forward[(-(-tokens // blocks["BT"]) * groups,)](
        x, x if gate is None else gate, x if weight is None else weight.contiguous(), y, tokens,
        x.stride(0), 0 if gate is None else gate.stride(0), eps, scale, G=groups, S=size,
        **blocks, **_kind(gate, gate_first, weight, size),
    )  # fmt: skip
    return y


@norm.register_fake
def _(x, gate, weight, size, gate_first, eps, scale):
    return _result(x, gate)


@operator("subquad::rms_norm_backward")
def norm_backward(
    dy: Tensor, x: Tensor, gate: Tensor | None, weight: Tensor | None, size: int, gate_first: bool,
    eps: float, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, gate and weight, the last two empty where there is none."""
    from .normalise import backward

    tokens, groups = x.numel() // x.shape[-1], x.shape[-1] // size
    dx, dgate, dweight = _gradients_of(x, gate, weight)
    dy, x, gate = rows(dy), rows(x), None if gate is None else rows(gate)
    blocks = _blocks(size)
    pieces = -(-tokens // (blocks["BT"] * STEPS))
    parts = x.new_empty(pieces if weight is not None else 0, groups, size, dtype=torch.float32)
    backward[(pieces * groups,)](
        dy, x, x if gate is None else gate, x if weight is None else weight.contiguous(),
        dx, dgate, parts, tokens, dy.stride(0), x.stride(0), 0 if gate is None else gate.stride(0),
        eps, scale, G=groups, S=size, STEPS=STEPS, **blocks,
        **_kind(gate, gate_first, weight, size),
    )  # fmt: skip
    if weight is not None:
        shared = weight.shape[0] == size
        dweight = parts.sum((0, 1) if shared else 0).flatten().to(weight.dtype)
    return dx, dgate, dweight


@norm_backward.register_fake
def _(dy, x, gate, weight, size, gate_first, eps, scale):
    return _gradients_of(x, gate, weight)


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    x, gate, weight, *ctx.options = inputs
    ctx.save_for_backward(x, gate, weight)


def _gradients(ctx, dy: Tensor) -> tuple:
    x, gate, weight = ctx.saved_tensors
    dx, dgate, dweight = norm_backward(dy, x, gate, weight, *ctx.options)
    dgate, dweight = None if gate is None else dgate, None if weight is None else dweight
    return dx, dgate, dweight, None, None, None, None


norm.register_autograd(_gradients, setup=_save)


def _result(x: Tensor, gate: Tensor | None) -> Tensor:
    dtype = x.dtype if gate is None else torch.promote_types(x.dtype, gate.dtype)
    return x.new_empty(x.shape, dtype=dtype)


def _gradients_of(x: Tensor, gate: Tensor | None, weight: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (x, gate, weight))


def _blocks(size: int) -> dict[str, int]:
    """Tile sizes: whole groups, and as many tokens as keep the tile small."""
    width = 1 << (size - 1).bit_length()
    warps = 4 if width <= 4096 else 16
    return {"BS": width, "BT": max(1, TILE // width), "num_warps": warps}


def _kind(
    gate: Tensor | None, gate_first: bool, weight: Tensor | None, size: int
) -> dict[str, int]:
    """The kernels' ORDER and WEIGHT."""
    own = weight is not None and weight.shape[0] != size
    return {
        "ORDER": 0 if gate is None else 2 if gate_first else 1,
        "WEIGHT": 0 if weight is None else 2 if own else 1,
    }
