"""A skip around the recurrence on a GPU, as an operator over Triton kernels: y + D_h x.

Differentiable in everything; D's gradient is summed program by program in a fixed order: it
repeats to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gpu import head_tiles, reason_to_decline, rows
from .operator import operator
from .timestep import STEPS, TILE, WIDEST


def supported(y: Tensor, x: Tensor, weight: Tensor) -> str | None:
    """None if the kernels can take these tensors, else why not."""
    if x.shape[3] > WIDEST:
        return f"heads of {x.shape[3]} channels; the Triton kernels hold at most {WIDEST}"
    return reason_to_decline(y, x, weight)


@operator("subquad::add_skip")
def add_skip(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """y [B,T,H,P] + weight [H] * x [B,T,H,P], in y's dtype."""
    from .add_skip import forward

    out = y.new_empty(y.shape)
    sizes = head_tiles(x.shape[2], x.shape[3], TILE)
    y, x = rows(y.flatten(2)), rows(x.flatten(2))
    tokens = x.shape[0]
    forward[(-(-tokens // sizes["BT"]) * sizes["H"],)](
        y, x, weight.contiguous(), out, tokens, y.stride(0), x.stride(0), **sizes
    )
    return out


@add_skip.register_fake
def _(y, x, weight):
    return y.new_empty(y.shape)


@operator("subquad::add_skip_backward")
def add_skip_backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight; y's is dy."""
    from .add_skip import backward

    dx = x.new_empty(x.shape)
    sizes = head_tiles(x.shape[2], x.shape[3], TILE)
    dy, x = rows(dy.flatten(2)), rows(x.flatten(2))
    tokens, heads = x.shape[0], sizes["H"]
    pieces = -(-tokens // (sizes["BT"] * STEPS))
    parts = x.new_empty(pieces, heads, dtype=torch.float32)
    backward[(pieces * heads,)](
        dy, x, weight.contiguous(), dx, parts, tokens, dy.stride(0), x.stride(0), STEPS=STEPS,
        **sizes,
    )  # fmt: skip
    return dx, parts.sum(0).to(weight.dtype)


@add_skip_backward.register_fake
def _(dy, x, weight):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _gradients(ctx, dy: Tensor) -> tuple:
    return dy, *add_skip_backward(dy, *ctx.saved_tensors)


add_skip.register_autograd(_gradients, setup=_save)
