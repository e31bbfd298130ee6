"""The short causal convolution on a GPU, as operators over Triton kernels.

`convolve` is differentiable in x, weight, bias and state; `one_token` and `one_token_` decode.
Sums are float32, results in x's dtype. The gradients of weight and bias are summed program by
program in a fixed order: they repeat to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.backend.gpu.launch import launch_one
from subquad.backend.gpu.launch_cache import replayed
from subquad.backend.gpu.tensors import reason_to_decline
from subquad.engines.runtime.operator import operator

WIDEST = 8  # taps, unrolled
CHANNELS = 128  # of a program, four to a thread
WARPS = 1
AT_ONCE = 8  # tokens loaded at once
LENGTH, BACK_LENGTH, LEAST = 64, 128, 16  # tokens of a program: LEAST where programs were too few
ENOUGH = 2048  # programs


def supported(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None) -> str | None:
    """None if the kernels can take these (already validated) tensors, else why not."""
    if weight.shape[1] > WIDEST:
        return f"{weight.shape[1]} taps; the Triton kernels take at most {WIDEST}"
    return reason_to_decline(x, weight, bias, state)


@operator("subquad::convolve")
@replayed
def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None,
    cu_seqlens: Tensor | None, silu: bool,
) -> Tensor:  # fmt: skip
    """y [B,T,D] of x [B,T,D], weight [D,W], bias [D], state [N,W-1,D], cu_seqlens [N+1]."""
    from subquad.engines.convolution.kernels import forward

    batch, tokens, channels = x.shape
    x, weight, bias, state = _laid_out(x, weight, bias, state)
    y = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    pieces, length = _pieces(batch, tokens, channels, LENGTH)
    launch_one(
        forward, (pieces * -(-channels // CHANNELS),),
        x, weight, *_or(x, bias, state, *_sequences(tokens, cu_seqlens)), y, tokens, length,
        _stride(x), D=channels, W=weight.shape[1], BD=CHANNELS, AT_ONCE=AT_ONCE,
        BIAS=bias is not None, STATE=state is not None, SILU=silu, PACKED=cu_seqlens is not None,
        num_warps=WARPS,
    )  # fmt: skip
    return y


@convolve.register_fake
def _(x, weight, bias, state, cu_seqlens, silu):
    return x.new_empty(x.shape)


@operator("subquad::convolve_backward")
@replayed
def convolve_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None,
    cu_seqlens: Tensor | None, silu: bool, with_state: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of x, weight and of what is there of bias and, with_state, state."""
    from subquad.engines.convolution.kernels import backward, backward_state

    (batch, tokens, channels), taps = x.shape, weight.shape[1]
    (dy,) = _laid_out(dy)
    x, weight, bias, state = _laid_out(x, weight, bias, state)
    own, bounds = _or(x, *_sequences(tokens, cu_seqlens))
    shared = {"D": channels, "W": taps, "BD": CHANNELS, "PACKED": cu_seqlens is not None}
    blocks = -(-channels // CHANNELS)
    pieces, length = _pieces(batch, tokens, channels, BACK_LENGTH)
    with_state = with_state and state is not None
    dx = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    dz = torch.empty(x.shape, device=x.device, dtype=dy.dtype) if with_state and silu else dy
    parts = torch.empty(pieces, taps + 1, channels, device=x.device, dtype=torch.float32)
    launch_one(
        backward, (pieces * blocks,),
        dy, x, weight, *_or(x, bias, state), own, bounds, dx, dz, parts, tokens, length,
        _stride(dy), _stride(x), AT_ONCE=AT_ONCE, BIAS=bias is not None,
        STATE=state is not None, SILU=silu, KEEP=dz is not dy, num_warps=WARPS, **shared,
    )  # fmt: skip
    dbias = dstate = None
    if with_state and state is not None:
        dstate = torch.empty(state.shape, device=x.device, dtype=state.dtype)
        launch_one(
            backward_state, (state.shape[0] * blocks,),
            dz, weight, bounds, dstate, tokens, _stride(dz), **shared,
        )  # fmt: skip
    sums = parts.sum(0)  # [taps, then the bias; channels]
    dweight = torch.empty_like(weight).copy_(sums[:taps].t())
    if bias is not None:
        dbias = sums[taps].to(bias.dtype)
    return [g for g in (dx, dweight, dbias, dstate) if g is not None]


@convolve_backward.register_fake
def _(dy, x, weight, bias, state, cu_seqlens, silu, with_state):
    found = (x, weight, bias, state if with_state else None)
    return [t.new_empty(t.shape) for t in found if t is not None]


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, dy: Tensor) -> tuple:
    x, weight, bias, state, cu_seqlens = ctx.saved_tensors
    with_state = state is not None and ctx.needs_input_grad[3]
    found = iter(
        convolve_backward(dy, x, weight, bias, state, cu_seqlens, ctx.silu, with_state)
    )  # fmt: skip
    wanted = (x, weight, bias, state if with_state else None)
    return *(None if t is None else next(found) for t in wanted), None, None


convolve.register_autograd(_gradients, setup=_save)


@operator("subquad::convolve_one_token")
@replayed
def one_token(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """y and the next state [N,W-1,D], for x [N,1,D] or, packed, [1,N,D]. No gradient."""
    rows = x.shape[0] * x.shape[1]
    new = x.new_empty(rows, weight.shape[1] - 1, x.shape[2])
    return _launch_one_token(x, weight, bias, state, silu, new), new


@one_token.register_fake
def _(x, weight, bias, state, silu):
    rows = x.shape[0] * x.shape[1]
    return x.new_empty(x.shape), x.new_empty(rows, weight.shape[1] - 1, x.shape[2])


@operator("subquad::convolve_one_token_", mutates=("state",))
@replayed
def one_token_(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, silu: bool) -> Tensor:
    """`one_token`, the next state written over `state`: contiguous, in x's dtype."""
    return _launch_one_token(x, weight, bias, state, silu, state)


@one_token_.register_fake
def _(x, weight, bias, state, silu):
    return x.new_empty(x.shape)


def _launch_one_token(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, silu: bool, new: Tensor
) -> Tensor:
    from subquad.engines.convolution.kernels import one_token as kernel

    x, weight, bias, state = _laid_out(x, weight, bias, state)
    y = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    channels, block = x.shape[2], 256
    launch_one(
        kernel, (x.shape[0] * x.shape[1] * -(-channels // block),),
        x, weight, *_or(x, bias, state), y, new, _stride(x), D=channels, W=weight.shape[1],
        BD=block, BIAS=bias is not None, STATE=state is not None, SILU=silu, num_warps=2,
    )  # fmt: skip
    return y


def _pieces(batch: int, tokens: int, channels: int, length: int) -> tuple[int, int]:
    """How many pieces the rows are cut into, and the tokens of each."""
    if batch * -(-tokens // length) * -(-channels // CHANNELS) < ENOUGH:
        length = LEAST
    return batch * -(-tokens // length), length


def _laid_out(x: Tensor, *others: Tensor | None) -> tuple:
    """x with adjacent channels and one stride for all its tokens, the others contiguous."""
    flat = x.shape[0] == 1 or x.shape[1] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
    x = x if x.stride(2) == 1 and flat else x.contiguous()
    return x, *(None if other is None else other.contiguous() for other in others)


def _stride(x: Tensor) -> int:
    """From one token to the next, of this row or the next row."""
    return x.stride(0) if x.shape[1] == 1 else x.stride(1)


def _or(absent: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Each tensor, or for None a valid pointer that the kernel never follows."""
    return tuple(absent if t is None else t for t in tensors)


def _sequences(tokens: int, cu_seqlens: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The number of each packed token's sequence, and the sequences' bounds."""
    if cu_seqlens is None:
        return None, None
    bounds = cu_seqlens.contiguous()
    index = torch.arange(tokens, device=bounds.device, dtype=bounds.dtype)
    # Not by the last bound: where it is wrong, the tokens after it are the last sequence's.
    return torch.searchsorted(bounds[1:-1], index, right=True, out_int32=True), bounds
