"""Forms in plain PyTorch whose backward pass keeps its precision under anybody's autocast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from subquad.engines.runtime.autocast import no_autocast
from subquad.engines.runtime.derivatives import recorded_gradients, will_be_differentiated
from subquad.engines.runtime.eager import can_call_operators


def without_autocast(
    form: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor | None], device_type: str
) -> tuple[Tensor, ...]:
    """`form(*inputs)` in the dtypes of its inputs, and its backward pass likewise.

    PyTorch runs a backward pass under the autocast of whoever calls it. `no_autocast` around the
    forward pass does not reach there: matrix products of gradients would be in bfloat16.
    """
    tensors = [x for x in inputs if x is not None]
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    # A compiler traces both passes under the forward pass's autocast.
    plain = not torch.compiler.is_compiling() and can_call_operators()
    if recorded and plain and torch._C._len_torch_dispatch_stack() == 0:
        outputs: tuple[Tensor, ...]
        outputs = _Shielded.apply(form, device_type, *inputs)  # type: ignore[no-untyped-call]
        return outputs
    with no_autocast(device_type):
        return form(*inputs)


class _Shielded(torch.autograd.Function):
    """A graph inside one node, so that it is the node that says how its backward pass is run."""

    @staticmethod
    def forward(
        ctx: Any, form: Callable[..., tuple[Tensor, ...]], device_type: str, *inputs: Tensor | None
    ) -> tuple[Tensor, ...]:
        own = [None if x is None else x.detach().requires_grad_(x.requires_grad) for x in inputs]
        with torch.enable_grad(), no_autocast(device_type):
            outputs = form(*own)
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        ctx.form, ctx.device_type, ctx.own, ctx.outputs = form, device_type, own, outputs
        return tuple(y.detach() for y in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        if will_be_differentiated():
            return None, None, *recorded_gradients(ctx.form, ctx.saved_tensors, gradients)
        pairs = [
            (y, dy) for y, dy in zip(ctx.outputs, gradients) if dy is not None and y.requires_grad
        ]
        needed = [x for x in ctx.own if x is not None and x.requires_grad]
        if not pairs:
            return (None,) * (2 + len(ctx.own))
        with no_autocast(ctx.device_type):
            found = iter(
                torch.autograd.grad(
                    [y for y, _ in pairs],
                    needed,
                    [dy for _, dy in pairs],
                    retain_graph=True,  # the outer graph's nodes say how long it lives
                    allow_unused=True,
                )
            )
        wanted = (x is not None and x.requires_grad for x in ctx.own)
        return None, None, *(next(found) if mine else None for mine in wanted)
