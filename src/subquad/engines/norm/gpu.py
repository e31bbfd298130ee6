"""RMS norms of groups of channels on a GPU, gated or not, as operators over Triton kernels.

Differentiable in x, gate, weight, values and skip. The gradients of weight and skip are summed
program by program in a fixed order: they repeat to the bit.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from subquad.backend.gpu.launch import launch_one
from subquad.backend.gpu.launch_cache import replayed
from subquad.backend.gpu.tensors import reason_to_decline, rows
from subquad.engines.runtime.operator import operator

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

    gate [..., D]; weight [D] or [size]. With a skip [H], x and values are [..., H, P], H P = D, and
    skip * values is added to x first. The result, [..., D], has `dtype`, or if that is None x's
    promoted with the gate's.
    """
    from subquad.engines.norm.kernels import forward

    y = _result(x, gate, skip, dtype)
    channels, axes = y.shape[-1], _axes(skip)
    tokens = y.numel() // channels
    options = _options(channels, size, *_kind(gate, gate_first, weight, skip, size))
    (x, row), (gate, gate_row), (values, values_row) = rows(x, axes), _rows(gate), _rows(values, 2)
    launch_one(
        forward, (-(-tokens // options["BT"]) * options["G"],),
        x, *_or(x, gate, _flat(weight), values, _flat(skip)), y, tokens, row, gate_row, values_row,
        eps, scale, **options,
    )  # fmt: skip
    return y


@norm.register_fake
def _(x, gate, weight, values, skip, size, gate_first, eps, scale, dtype):
    return _result(x, gate, skip, dtype)


@operator("subquad::rms_norm_backward")
@replayed
def norm_backward(
    dy: Tensor, x: Tensor, gate: Tensor | None, weight: Tensor | None, values: Tensor | None,
    skip: Tensor | None, size: int, gate_first: bool, eps: float, scale: float,
) -> list[Tensor]:  # fmt: skip
    """Gradients of x and of what is there of gate, weight, values and skip.

    Those that are sums over the tokens come from each program's share.
    """
    from subquad.engines.norm.kernels import backward

    channels = dy.shape[-1]
    tokens = dy.numel() // channels
    dx, dgate, dvalues = (None if t is None else t.new_empty(t.shape) for t in (x, gate, values))
    options = _options(channels, size, *_kind(gate, gate_first, weight, skip, size))
    (dy, dy_row), (x, row) = rows(dy), rows(x, _axes(skip))
    (gate, gate_row), (values, values_row) = _rows(gate), _rows(values, 2)
    pieces = -(-tokens // (options["BT"] * STEPS))
    parts = skip_parts = None
    if weight is not None:
        shares = pieces * channels // weight.shape[0]
        parts = x.new_empty(shares, weight.shape[0], dtype=torch.float32)
    if skip is not None:
        skip_parts = x.new_empty(pieces, *x.shape[-2:], dtype=torch.float32)
    launch_one(
        backward, (pieces * options["G"],),
        dy, x, *_or(x, gate, _flat(weight), values, _flat(skip)), dx,
        *_or(x, dgate, dvalues, parts, skip_parts), tokens, dy_row, row, gate_row, values_row, eps,
        scale, STEPS=STEPS, **options,
    )  # fmt: skip
    dweight = dskip = None
    if weight is not None and parts is not None:
        dweight = parts.sum(0).to(weight.dtype)
    if skip is not None and skip_parts is not None:
        dskip = skip_parts.sum(0).sum(1).to(skip.dtype)
    return [g for g in (dx, dgate, dweight, dvalues, dskip) if g is not None]


@norm_backward.register_fake
def _(dy, x, gate, weight, values, skip, size, gate_first, eps, scale):
    return [t.new_empty(t.shape) for t in (x, gate, weight, values, skip) if t is not None]


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    *tensors, size, gate_first, eps, scale, _ = inputs
    ctx.options = size, gate_first, eps, scale
    ctx.save_for_backward(*tensors)


def _gradients(ctx, dy: Tensor) -> tuple:
    tensors = ctx.saved_tensors
    found = iter(norm_backward(dy, *tensors, *ctx.options))
    return *(None if t is None else next(found) for t in tensors), *[None] * 5


norm.register_autograd(_gradients, setup=_save)


def _result(
    x: Tensor, gate: Tensor | None, skip: Tensor | None, dtype: torch.dtype | None
) -> Tensor:
    if dtype is None:
        dtype = x.dtype if gate is None else torch.promote_types(x.dtype, gate.dtype)
    shape = x.shape if skip is None else (*x.shape[:-2], x.shape[-2] * x.shape[-1])
    return x.new_empty(shape, dtype=dtype)


def _axes(skip: Tensor | None) -> int:
    """Of x, that hold a token's channels."""
    return 1 if skip is None else 2


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


def _rows(x: Tensor | None, axes: int = 1) -> tuple[Tensor | None, int]:
    return (None, 0) if x is None else rows(x, axes)


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _or(absent: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Each tensor, or for None a valid pointer that the kernel never follows."""
    return tuple(absent if t is None else t for t in tensors)
