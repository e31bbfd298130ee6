"""The short causal depthwise convolution that most of these layers put before their recurrence.

B batch   T time   D channels   W taps   N sequences (of the batch, or packed)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.engines.runtime.derivatives import recorded_gradients, will_be_differentiated
from subquad.engines.runtime.eager import can_call_compiled_code, can_call_operators
from subquad.engines.runtime.operator import operator
from subquad.engines.runtime.overrides import overridable
from subquad.engines.runtime.overwrite import may_overwrite, records_gradient
from subquad.engines.runtime.validation import check_cu_seqlens, check_shape, check_tensor
from subquad.errors import choose, fail


@overridable
def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution over time, with what it must remember as an explicit state.

        y_t = activation(bias + sum_w weight[:, w] * x_{t - W + 1 + w})

    Source: the convolution before the scan in Mamba (Gu and Dao 2023, section 3.4, figure 3) and
    before the keys and queries of the delta rules.

    Args:
        x: [B,T,D], T >= 1.
        weight: [D,W], W >= 1; the last tap weighs the current token.
        bias: [D] or None.
        activation: None or "silu".
        state: [N,W-1,D], the last W-1 inputs before x, oldest first; None means zeros.
        cu_seqlens: [N+1] int, the bounds of N sequences packed in x (then B is 1): 0 first, T last.

    Returns:
        y [B,T,D] in x's dtype (sums are float32, or float64 for float64 inputs), and the next
        state [N,W-1,D] in x's dtype. Gradients flow through both and into `state`. The GPU
        kernels have first derivatives only.

    Raises:
        ValueError: naming the argument that does not fit, and the fix.
    """
    N = _check(x, weight, bias, activation, state, cu_seqlens)
    if x.is_cuda and can_call_operators():
        from subquad.engines.convolution import gpu as kernels

        if kernels.supported(x, weight, bias, state) is None:
            return _on_gpu(N, x, weight, bias, activation == "silu", state, cu_seqlens)
    if state is None:
        state = x.new_zeros(N, weight.shape[1] - 1, x.shape[2])
    silu = activation == "silu"
    given = (x, weight, state) if bias is None else (x, weight, state, bias)
    if x.shape[0] * x.shape[1] == N and can_call_compiled_code(given):  # one token each: decoding
        from subquad.engines.convolution import cpu as short_convolution_cpu

        result: tuple[Tensor, Tensor] = short_convolution_cpu.step(x, weight, bias, state, silu)
        return result
    state = state.to(x.dtype)
    precise = torch.float64 if x.dtype == torch.float64 else torch.float32
    inputs = (x.to(precise), weight.to(precise), None if bias is None else bias.to(precise))
    # Compiled code pays from a few tokens on; recording a call of it costs more than one token.
    compiled = x.device.type == "cpu" and precise == torch.float32 and x.shape[0] * x.shape[1] > N
    convolve = _convolve_cpu if compiled and can_call_operators() else _convolve
    y = convolve(*inputs, state.to(precise), cu_seqlens, silu)
    return y.to(x.dtype), _next_state(x, state, cu_seqlens)


def _on_gpu(
    N: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    from subquad.engines.convolution import gpu as kernels

    state = None if state is None else state.to(x.dtype)
    if x.shape[0] * x.shape[1] == N and not records_gradient((x, weight, bias, state)):
        if state is not None and may_overwrite(state):
            return kernels.one_token_(x, weight, bias, state, silu), state
        y, new = kernels.one_token(x, weight, bias, state, silu)
        return y, new
    y = kernels.convolve(x, weight, bias, state, cu_seqlens, silu)
    keep = weight.shape[1] - 1
    if cu_seqlens is None and x.shape[1] >= keep:
        return y, _last(x, keep)
    if state is None:
        state = x.new_zeros(N, keep, x.shape[2])
    return y, _next_state(x, state, cu_seqlens)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> int:
    """Raise ValueError for arguments that do not fit; return the number of sequences."""
    check_tensor("x", x, 3, "[B,T,D]")
    B, T, D = x.shape
    if T < 1 or B < 1 or D < 1:
        raise fail("x", f"shape {(B, T, D)}", "B, T and D >= 1", "skip the call when nothing came")
    check_tensor("weight", weight, 2, "[D,W]", x)
    if weight.shape[1] < 1:
        raise fail("weight", "no taps", "[D,W] with W >= 1", "give one tap or more")
    check_shape("weight", weight, (D, weight.shape[1]), "[D,W]")
    if bias is not None:
        check_shape("bias", check_tensor("bias", bias, 1, "[D]", x), (D,), "[D]")
    if activation is not None:
        choose("activation", activation, ("silu",))
    N = B if cu_seqlens is None else check_cu_seqlens(cu_seqlens, T, B, x)
    if state is not None:
        check_tensor("state", state, 3, "[N,W-1,D]", x)
        check_shape("state", state, (N, weight.shape[1] - 1, D), "[N,W-1,D]")
    return N


def _convolve(
    x: Tensor,  # [B,T,D]
    weight: Tensor,  # [D,W]
    bias: Tensor | None,  # [D]
    state: Tensor,  # [N,W-1,D]
    cu_seqlens: Tensor | None,  # [N+1]
    silu: bool,
) -> Tensor:
    """The convolution in plain PyTorch: each sequence with its state laid before it, W shifts."""
    W = weight.shape[1]
    if cu_seqlens is None:
        T = x.shape[1]
        extended, places = torch.cat([state, x], 1), None  # [B,W-1+T,D]
    else:
        places = _places(x.shape[1], W, cu_seqlens)  # [T] of the tokens in the extended row
        T = x.shape[1] + state.shape[0] * (W - 1)
        starts = cu_seqlens[:-1, None] + (W - 1) * _arange(state.shape[0], cu_seqlens)[:, None]
        before = (starts + _arange(W - 1, cu_seqlens)).flatten()  # [N(W-1)] of the states
        extended = x.new_zeros(T, x.shape[2]).index_copy(0, places, x[0])
        extended = extended.index_copy(0, before, state.flatten(0, 1))[None]
        places, T = places - (W - 1), T - (W - 1)
    y = extended[:, W - 1 : W - 1 + T] * weight[:, W - 1]
    for w in range(W - 1):
        y = torch.addcmul(y, extended[:, w : w + T], weight[:, w])
    if bias is not None:
        y = y + bias
    if places is not None:
        y = y.index_select(1, places)
    return F.silu(y) if silu else y


def _arange(n: int, like: Tensor) -> Tensor:
    return torch.arange(n, device=like.device)


def _places(T: int, W: int, cu_seqlens: Tensor) -> Tensor:
    """Where packed token t goes once W-1 rows of state precede each sequence: [T] int64."""
    tokens = _arange(T, cu_seqlens)
    sequence = torch.searchsorted(cu_seqlens.to(torch.int64), tokens, right=True) - 1
    return tokens + (sequence + 1) * (W - 1)


def _next_state(x: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The last W-1 inputs of each sequence, from its state where it has fewer: [N,W-1,D]."""
    keep = state.shape[1]
    if cu_seqlens is None:
        if x.shape[1] >= keep:
            return _last(x, keep)
        return torch.cat([state, x], 1)[:, -keep:] if keep else state
    ends, starts = cu_seqlens[1:, None], cu_seqlens[:-1, None]
    position = ends - keep + _arange(keep, cu_seqlens)  # [N,W-1]
    inside = position >= starts
    # Held inside also where no one reads bounds: an empty last sequence begins behind all tokens.
    new = x[0, position.clamp(0, x.shape[1] - 1)]  # [N,W-1,D]
    row = (position - starts + keep).clamp(0, keep - 1)  # of the old state
    old = state.gather(1, row[:, :, None].expand(-1, -1, x.shape[2]))
    return torch.where(inside[:, :, None], new, old)


def _last(x: Tensor, keep: int) -> Tensor:
    """x's last tokens. A copy: a view would keep all of x alive."""
    return x[:, x.shape[1] - keep :].clone()


@operator("subquad::short_convolution")
def _convolve_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> Tensor:
    from subquad.engines.convolution import cpu as short_convolution_cpu

    return short_convolution_cpu.forward(x, weight, bias, state, cu_seqlens, silu)


@operator("subquad::short_convolution_backward")
def _convolve_cpu_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from subquad.engines.convolution import cpu as short_convolution_cpu

    return short_convolution_cpu.backward(dy, x, weight, bias, state, cu_seqlens, silu)


@_convolve_cpu.register_fake
def _(x, weight, bias, state, cu_seqlens, silu):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


@_convolve_cpu_backward.register_fake
def _(dy, x, weight, bias, state, cu_seqlens, silu):  # type: ignore[no-untyped-def]
    return tuple(x.new_empty(t.shape) for t in (x, weight, weight[:, 0], state))


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, bias, state, cu_seqlens, ctx.silu = inputs
    ctx.save_for_backward(x, weight, bias, state, cu_seqlens)


def _gradients(ctx, dy):  # type: ignore[no-untyped-def]
    x, weight, bias, state, cu_seqlens = ctx.saved_tensors
    if will_be_differentiated():

        def form(x, weight, bias, state):  # type: ignore[no-untyped-def]
            return (_convolve(x, weight, bias, state, cu_seqlens, ctx.silu),)

        return *recorded_gradients(form, (x, weight, bias, state), (dy,)), None, None
    dx, dweight, dbias, dstate = _convolve_cpu_backward(
        dy, x, weight, bias, state, cu_seqlens, ctx.silu
    )
    return dx, dweight, None if bias is None else dbias, dstate, None, None


_convolve_cpu.register_autograd(_gradients, _setup)
