"""Selective step sizes on a GPU, as an operator over Triton kernels: dt, dt * x, decay.

Differentiable in everything. The gradients of bias and A_log are summed program by program in a
fixed order: they repeat to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.backend.gpu.launch import launch_one
from subquad.backend.gpu.launch_cache import replayed
from subquad.backend.gpu.tensors import head_tiles, reason_to_decline, rows
from subquad.engines.runtime.operator import operator

WIDEST = 4096  # channels of a head
TILE = 2048  # numbers a program holds of x
STEPS = 8  # tiles that a program of the backward pass walks, to write fewer partial sums


def supported(x: Tensor | None, dt: Tensor, dt_bias: Tensor, A_log: Tensor) -> str | None:
    """None if the kernels can take these tensors, else why not."""
    if x is not None and x.shape[3] > WIDEST:
        return f"heads of {x.shape[3]} channels; the Triton kernels hold at most {WIDEST}"
    return reason_to_decline(x, dt, dt_bias, A_log)


@operator("subquad::discretise")
@replayed
def discretise(
    x: Tensor | None, dt: Tensor, dt_bias: Tensor, A_log: Tensor
) -> tuple[Tensor, Tensor]:
    """softplus(dt + dt_bias) times x, [B,T,H,P] (empty without x), and times -exp(A_log), [B,T,H].

    x [B,T,H,P]; dt [B,T,H]; dt_bias, A_log [H]. The second result is float32.
    """
    from subquad.engines.step_size.kernels import forward

    v, log_decay = _results(x, dt)
    (raw, raw_row), sizes = rows(dt), _tiles(x, dt)
    flat, row = (raw, 0) if x is None else rows(x, 2)
    tokens = dt.numel() // sizes["H"]
    launch_one(
        forward, (-(-tokens // sizes["BT"]) * sizes["H"],),
        flat, raw, dt_bias.contiguous(), A_log.contiguous(), v, log_decay,
        tokens, row, raw_row, VALUES=x is not None, **sizes,
    )  # fmt: skip
    return v, log_decay


@discretise.register_fake
def _(x, dt, dt_bias, A_log):
    return _results(x, dt)


@operator("subquad::discretise_backward")
@replayed
def discretise_backward(
    dv: Tensor, dlog_decay: Tensor, x: Tensor | None, dt: Tensor, dt_bias: Tensor, A_log: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (empty without), dt, and both dt_bias and A_log, [2,H] float32."""
    from subquad.engines.step_size.kernels import backward

    dx = dt.new_empty(0) if x is None else x.new_empty(x.shape)
    draw = dt.new_empty(dt.shape)
    (raw, raw_row), sizes = rows(dt), _tiles(x, dt)
    (flat, row), (dv, dv_row) = ((raw, 0), (raw, 0)) if x is None else (rows(x, 2), rows(dv, 2))
    heads = sizes["H"]
    tokens = dt.numel() // heads
    pieces = -(-tokens // (sizes["BT"] * STEPS))
    parts = dt.new_empty(pieces, 2, heads, dtype=torch.float32)
    launch_one(
        backward, (pieces * heads,),
        dv, dlog_decay.contiguous(), flat, raw, dt_bias.contiguous(), A_log.contiguous(),
        dx, draw, parts, tokens, dv_row, row, raw_row, STEPS=STEPS, VALUES=x is not None, **sizes,
    )  # fmt: skip
    return dx, draw, parts.sum(0)


@discretise_backward.register_fake
def _(dv, dlog_decay, x, dt, dt_bias, A_log):
    dx = dt.new_empty(0) if x is None else x.new_empty(x.shape)
    return dx, dt.new_empty(dt.shape), dt.new_empty(2, dt.shape[2], dtype=torch.float32)


def _save(ctx, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx, dv: Tensor, dlog_decay: Tensor) -> tuple:
    x, dt, dt_bias, A_log = ctx.saved_tensors
    dx, draw, sums = discretise_backward(dv, dlog_decay, x, dt, dt_bias, A_log)
    dbias, drate = sums.unbind()
    return None if x is None else dx, draw, dbias.to(dt_bias.dtype), drate.to(A_log.dtype)


discretise.register_autograd(_gradients, setup=_save)


def _results(x: Tensor | None, dt: Tensor) -> tuple[Tensor, Tensor]:
    v = dt.new_empty(0) if x is None else x.new_empty(x.shape)
    return v, dt.new_empty(dt.shape, dtype=torch.float32)


def _tiles(x: Tensor | None, dt: Tensor) -> dict[str, int]:
    return head_tiles(dt.shape[2], 1 if x is None else x.shape[3], TILE)
