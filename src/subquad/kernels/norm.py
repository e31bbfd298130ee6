"""RMS norms of groups of channels on a GPU, gated or not, as operators over Triton kernels.

Differentiable in x, gate, weight, values and skip. The gradients of weight and skip are summed
program by program in a fixed order: they repeat to the bit.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .gpu import reason_to_decline, rows
from .launch import launch_one
from .operator import operator
from .replay import replayed

WIDEST = 16384  # channels of a group: a program holds all of one
TILE = 1024  # numbers a program holds of each tensor, or one group's, if that is more
STEPS = 16  # tiles that a program of the backward pass walks, to write fewer partial sums


def supported(size: int, *tensors: Tensor | None) -> str | None:
    """None if the kernels can take these tensors, else why not."""
    if size > WIDEST:
        return f"groups of {size} channels; the Triton kernels hold at most {WIDEST}"
    return reason_to_decline(*tensors)


@operator("subquad::rms_norm")
@replayed
def norm(
    x: Tensor, gate: Tensor | None, weight: Tensor | None, values: Tensor | None,
    skip: Tensor | None, size: int, gate_first: bool, eps: float, scale: float,
    dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    """x [..., D] over the root mean square of each `size` channels, times scale, weight and silu.

    gate like x; weight [D] or [size]. With values like x and skip [H], a number for each D / H
    channels, skip * values is added to x first. The result has `dtype`, or if that is None x's
    promoted with the gate's.
    """
    from .normalise import forward

    tokens = x.numel() // x.shape[-1]
    y = _result(x, gate, dtype)
    options = _options(x.shape[-1], size, *_kind(gate, gate_first, weight, skip, size))
    x, gate, values = rows(x), _rows(gate), _rows(values)
    launch_one(
        forward, (-(-tokens // options["BT"]) * options["G"],),
        x, *_or(x, gate, weight, values, skip), y, tokens, x.stride(0), _stride(gate),
        _stride(values), eps, scale, **options,
    )  # fmt: skip
    return y


@norm.register_fake
def _(x, gate, weight, values, skip, size, gate_first, eps, scale, dtype):
    return _result(x, gate, dtype)


@operator("subquad::rms_norm_backward")
@replayed
def norm_backward(
    dy: Tensor, x: Tensor, gate: Tensor | None, weight: Tensor | None, values: Tensor | None,
    skip: Tensor | None, size: int, gate_first: bool, eps: float, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, gate, weight, values and skip, each but the first empty where there is none.

    Those that are sums over the tokens come from each program's share.
    """
    from .normalise import backward

    tokens, channels = x.numel() // x.shape[-1], x.shape[-1]
    dx, dgate, dweight, dvalues, dskip = _gradients_of(x, gate, weight, values, skip)
    options = _options(channels, size, *_kind(gate, gate_first, weight, skip, size))
    dy, x, gate, values = rows(dy), rows(x), _rows(gate), _rows(values)
    pieces = -(-tokens // (options["BT"] * STEPS))
    parts, skip_parts = (
        x.new_empty(pieces if given is not None else 0, channels, dtype=torch.float32)
        for given in (weight, skip)
    )
    launch_one(
        backward, (pieces * options["G"],),
        dy, x, *_or(x, gate, weight, values, skip), dx, dgate, dvalues, parts, skip_parts, tokens,
        dy.stride(0), x.stride(0), _stride(gate), _stride(values), eps, scale, STEPS=STEPS,
        **options,
    )  # fmt: skip
    if weight is not None:
        dweight = parts.view(-1, weight.shape[0]).sum(0).to(weight.dtype)
    if skip is not None:
        dskip = skip_parts.sum(0).view(skip.shape[0], -1).sum(1).to(skip.dtype)
    return dx, dgate, dweight, dvalues, dskip


@norm_backward.register_fake
def _(dy, x, gate, weight, values, skip, size, gate_first, eps, scale):
    return _gradients_of(x, gate, weight, values, skip)


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    *tensors, size, gate_first, eps, scale, _ = inputs
    ctx.options = size, gate_first, eps, scale
    ctx.save_for_backward(*tensors)


def _gradients(ctx, dy: Tensor) -> tuple:
    tensors = ctx.saved_tensors
    found = norm_backward(dy, *tensors, *ctx.options)
    return *(None if t is None else g for t, g in zip(tensors, found)), *[None] * 5


norm.register_autograd(_gradients, setup=_save)


def _result(x: Tensor, gate: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    if dtype is None:
        dtype = x.dtype if gate is None else torch.promote_types(x.dtype, gate.dtype)
    return x.new_empty(x.shape, dtype=dtype)


def _gradients_of(x: Tensor, *others: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (x, *others))


def _kind(
    gate: Tensor | None, gate_first: bool, weight: Tensor | None, skip: Tensor | None, size: int
) -> tuple[int, int, int]:
    """The kernels' ORDER and WEIGHT, and the number of heads with a skip."""
    own = weight is not None and weight.shape[0] != size
    order = 0 if gate is None else 2 if gate_first else 1
    return order, 0 if weight is None else 2 if own else 1, 0 if skip is None else skip.shape[0]


@lru_cache(maxsize=256)
def _options(channels: int, size: int, order: int, weight: int, heads: int) -> dict[str, int]:
    """What the kernels are compiled for: whole groups, and as many tokens as keep a tile small."""
    width = 1 << (size - 1).bit_length()
    return {
        "G": channels // size, "S": size, "BS": width, "BT": max(1, TILE // width),
        "ORDER": order, "WEIGHT": weight, "HEAD": channels // heads if heads else 0,
        "num_warps": 4 if width <= 4096 else 16,
    }  # fmt: skip


def _rows(x: Tensor | None) -> Tensor | None:
    return None if x is None else rows(x)


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _or(
    absent: Tensor, gate: Tensor | None, weight: Tensor | None, values: Tensor | None,
    skip: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Each tensor, or for None a valid pointer that the kernel never follows."""
    weight, skip = (None if t is None else t.contiguous() for t in (weight, skip))
    return tuple(absent if t is None else t for t in (gate, weight, values, skip))
