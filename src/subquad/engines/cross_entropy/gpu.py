"""The cross-entropy of labels on a GPU, as an operator over Triton kernels.

Differentiable in the logits, whose gradient has their dtype. Between the two passes it keeps two
numbers a token, where PyTorch keeps a float32 copy of the logits' log-softmax.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.backend.gpu.launch import launch_one
from subquad.backend.gpu.launch_cache import replayed
from subquad.backend.gpu.tensors import reason_to_decline, rows
from subquad.engines.runtime.operator import operator

TILE, WARPS = 4096, 4  # logits that a program holds at once, and its warps


def supported(logits: Tensor, labels: Tensor) -> str | None:
    """None if the kernels can take these tensors, else why not."""
    if labels.dtype not in (torch.int32, torch.int64) or labels.device != logits.device:
        return f"labels are {labels.dtype} on {labels.device}; the Triton kernels take int32, int64"
    return reason_to_decline(logits)


@operator("subquad::cross_entropy")
@replayed
def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Losses like labels, float32, and sums [..., 2] for the backward pass.

    logits [..., V]; labels [...] int. A label of -100 has a loss and gradients of 0, one outside of
    the vocabulary has NaN.
    """
    from subquad.engines.cross_entropy.kernels import forward

    losses, sums = _results(logits, labels)
    logits, row = rows(logits)
    sizes = _sizes(logits)
    launch_one(forward, (labels.numel(),), logits, labels.contiguous(), losses, sums, row, **sizes)
    return losses, sums


@cross_entropy.register_fake
def _(logits, labels):
    return _results(logits, labels)


@operator("subquad::cross_entropy_backward")
@replayed
def cross_entropy_backward(dlosses: Tensor, logits: Tensor, labels: Tensor, sums: Tensor) -> Tensor:
    """The gradient of the logits [..., V]."""
    from subquad.engines.cross_entropy.kernels import backward

    dlogits = logits.new_empty(logits.shape)
    logits, row = rows(logits)
    sizes = _sizes(logits)
    blocks = -(-sizes["V"] // sizes["BV"])
    launch_one(
        backward, (labels.numel() * blocks,),
        dlosses.contiguous(), logits, labels.contiguous(), sums, dlogits, row,
        BLOCKS=blocks, **sizes,
    )  # fmt: skip
    return dlogits


@cross_entropy_backward.register_fake
def _(dlosses, logits, labels, sums):
    return logits.new_empty(logits.shape)


def _save(ctx, inputs: tuple, output: tuple) -> None:
    sums = output[1]
    ctx.mark_non_differentiable(sums)
    ctx.save_for_backward(*inputs, sums)


def _gradients(ctx, dlosses: Tensor, dsums: Tensor) -> tuple:
    return cross_entropy_backward(dlosses, *ctx.saved_tensors), None


cross_entropy.register_autograd(_gradients, setup=_save)


def _results(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    losses = logits.new_empty(labels.shape, dtype=torch.float32)
    return losses, logits.new_empty((*labels.shape, 2), dtype=torch.float32)


def _sizes(logits: Tensor) -> dict[str, int]:
    V = logits.shape[-1]
    return {"V": V, "BV": min(TILE, 1 << (V - 1).bit_length()), "num_warps": WARPS}
