"""The selective scan as an operator: autograd and `torch.compile` see one node, whatever runs.

Its backward pass is that form's; higher derivatives are those of the loop over tokens.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from subquad.engines.runtime.derivatives import recorded_gradients, will_be_differentiated
from subquad.engines.runtime.operator import operator
from subquad.engines.selective import pytorch as scan
from subquad.engines.selective import reference as diagonal_reference


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """y and the last state, by the implementation named; all tensors of one dtype."""
    inputs = (x, dt, A, B, C, D, state)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    y, last_state, _ = _scan(*inputs, cu_seqlens, impl, save)
    return y, last_state


def _form_module(impl: str) -> ModuleType:
    """Where `forward`, `backward` and `checkpoint_shape` of an implementation are."""
    if impl == "torch":
        return scan
    if impl == "triton":
        from subquad.engines.selective import gpu as selective_scan_gpu

        return selective_scan_gpu
    from subquad.engines.selective import cpu as selective_scan_cpu

    return selective_scan_cpu


@operator("subquad::selective_scan")
def _scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    impl: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last state and, if `save`, what the backward pass starts its chunks from."""
    y, last_state, checkpoints = _form_module(impl).forward(
        x, dt, A, B, C, D, state, cu_seqlens, save
    )
    return y, last_state, checkpoints


@operator("subquad::selective_scan_backward")
def _scan_backward(
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
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if checkpoints.shape[0] == 0:  # which compiled code would read all the same
        raise RuntimeError(
            "checkpoints: got none; expected the forward pass's. Fix: call that with save=True."
        )
    gradients = _form_module(impl).backward(
        dy, dlast, x, dt, A, B, C, D, state, cu_seqlens, checkpoints
    )
    dx, ddt, dA, dB, dC, dD, dstate = gradients
    return dx, ddt, dA, dB, dC, dD, dstate


@_scan.register_fake
def _(x, dt, A, B, C, D, state, cu_seqlens, impl, save):  # type: ignore[no-untyped-def]
    K, *shape = _form_module(impl).checkpoint_shape(x, A, state.shape[0])
    checkpoints = x.new_empty(K if save else 0, *shape)
    return x.new_empty(x.shape), x.new_empty(state.shape), checkpoints


@_scan_backward.register_fake
def _(dy, dlast, x, dt, A, B, C, D, state, cu_seqlens, checkpoints, impl):  # type: ignore[no-untyped-def]
    return tuple(t.new_empty(t.shape) for t in (x, dt, A, B, C, D, state))


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.impl, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(True)


def _gradients(ctx, dy, dlast, _):  # type: ignore[no-untyped-def]
    *inputs, cu_seqlens, checkpoints = ctx.saved_tensors
    if will_be_differentiated():

        def form(x, dt, A, B, C, D, state):  # type: ignore[no-untyped-def]
            return diagonal_reference.loop(x, dt, A, B, C, D, state, cu_seqlens)

        return *recorded_gradients(form, inputs, (dy, dlast)), None, None, None
    if checkpoints.shape[0] == 0:  # traced or exported where no gradient was to be asked for
        checkpoints = _scan(*inputs, cu_seqlens, ctx.impl, True)[2]
    found = _scan_backward(dy, dlast, *inputs, cu_seqlens, checkpoints, ctx.impl)
    return *found, None, None, None


_scan.register_autograd(_gradients, _setup)
