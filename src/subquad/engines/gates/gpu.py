"""A gated product and GLA's forget gate on a GPU, as operators over Triton kernels.

Differentiable in every tensor. Only what goes in is kept for the backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.backend.gpu.launch import launch_one
from subquad.backend.gpu.launch_cache import replayed
from subquad.backend.gpu.tensors import rows
from subquad.engines.runtime.operator import operator

TILE, CHANNELS = 4096, 256  # numbers that a program holds of each tensor, and how many lie together


@operator("subquad::silu_product")
@replayed
def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both [..., C], in their promoted dtype; rounded once."""
    from subquad.engines.gates.kernels import silu_product as kernel

    y = _product(gate, up)
    grid, tokens, sizes = _tiles(y)
    (gate, gate_row), (up, up_row) = rows(gate), rows(up)
    launch_one(kernel, grid, gate, up, y, tokens, gate_row, up_row, **sizes)
    return y


@silu_product.register_fake
def _(gate, up):
    return _product(gate, up)


@operator("subquad::silu_product_backward")
@replayed
def silu_product_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    from subquad.engines.gates.kernels import silu_product_backward as kernel

    dgate, dup = gate.new_empty(gate.shape), up.new_empty(up.shape)
    grid, tokens, sizes = _tiles(dy)
    (dy, dy_row), (gate, gate_row), (up, up_row) = rows(dy), rows(gate), rows(up)
    launch_one(kernel, grid, dy, gate, up, dgate, dup, tokens, dy_row, gate_row, up_row, **sizes)
    return dgate, dup


@silu_product_backward.register_fake
def _(dy, gate, up):
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx, dy: Tensor) -> tuple:
    return silu_product_backward(dy, *ctx.saved_tensors)


silu_product.register_autograd(_gradients, setup=_save)


@operator("subquad::log_sigmoid")
@replayed
def log_sigmoid(x: Tensor, scale: float) -> Tensor:
    """log(sigmoid(x)) * scale, like x [..., C], float32."""
    from subquad.engines.gates.kernels import log_sigmoid as kernel

    y = x.new_empty(x.shape, dtype=torch.float32)
    grid, tokens, sizes = _tiles(x)
    x, row = rows(x)
    launch_one(kernel, grid, x, y, tokens, row, scale, **sizes)
    return y


@log_sigmoid.register_fake
def _(x, scale):
    return x.new_empty(x.shape, dtype=torch.float32)


@operator("subquad::log_sigmoid_backward")
@replayed
def log_sigmoid_backward(dy: Tensor, x: Tensor, scale: float) -> Tensor:
    """The gradient of x."""
    from subquad.engines.gates.kernels import log_sigmoid_backward as kernel

    dx = x.new_empty(x.shape)
    grid, tokens, sizes = _tiles(x)
    (dy, dy_row), (x, row) = rows(dy), rows(x)
    launch_one(kernel, grid, dy, x, dx, tokens, dy_row, row, scale, **sizes)
    return dx


@log_sigmoid_backward.register_fake
def _(dy, x, scale):
    return x.new_empty(x.shape)


def _save_scale(ctx, inputs: tuple, output: Tensor) -> None:
    x, ctx.scale = inputs
    ctx.save_for_backward(x)


def _gradient(ctx, dy: Tensor) -> tuple:
    return log_sigmoid_backward(dy, *ctx.saved_tensors, ctx.scale), None


log_sigmoid.register_autograd(_gradient, setup=_save_scale)


def _product(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype))


def _tiles(x: Tensor) -> tuple[tuple[int], int, dict[str, int]]:
    """The grid, the tokens, and what the kernels are compiled for."""
    channels = x.shape[-1]
    width = min(CHANNELS, 1 << (channels - 1).bit_length())
    tokens, height = x.numel() // channels, TILE // width
    grid = -(-tokens // height) * -(-channels // width)
    return (grid,), tokens, {"C": channels, "BC": width, "BT": height}
