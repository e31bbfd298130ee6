"""The matrix recurrence on a GPU: rows without erasing, as torch custom ops over Triton kernels.

    S_t = exp(log_decay_t) * S_{t-1} + k_t v_t^T
    o_t = scale * S_t^T q_t,  with a bonus u  scale * (S_{t-1} + (u * k_t) v_t^T)^T q_t

`supported` says whether these tensors can run here, `describe` what would run, and
`linear_recurrence` runs it. Triton is imported by the first launch, never by this module.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from subquad.backend.gpu.launch import Launch, launch, launch_of
from subquad.backend.gpu.launch_cache import replayed
from subquad.backend.gpu.tensors import DTYPES, triton_missing
from subquad.engines.matrix.gpu import shared_keys as shared
from subquad.engines.matrix.gpu.layout import KEY, Layout, Tiles, gate_kind, programs, share_out
from subquad.engines.matrix.gpu.passes import (
    Gate,
    add_slices,
    empty_states,
    join_segments,
    plan,
    scan_launches,
    segment_tokens,
    sliced,
    states_to_keep,
    strided,
)
from subquad.engines.matrix.kind import is_fixed
from subquad.engines.runtime.operator import operator

GATE_NAMES = ("no decay", "fixed decay per head", "decay per head", "decay per key channel")


def supported(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    bonus: Tensor | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> str | None:
    """None if the Triton kernels can run these (already validated) tensors, else the reason."""
    if not q.is_cuda:
        return f"the Triton kernels need CUDA tensors, and these are on {q.device}"
    for name, tensor in {"q": q, "k": k, "v": v, "log_decay": log_decay}.items():
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"{name} is {tensor.dtype}; the Triton kernels take bfloat16, float16, float32"
    for name, size in (("K", q.shape[-1]), ("V", v.shape[-1])):
        if size > 256:
            return f"{name} is {size}; the Triton kernels hold at most 256 channels of a head"
    return triton_missing()


def describe(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, bonus: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> str:  # fmt: skip
    """One line for `explain`: the kernel, its tile sizes, and how the sequence is split."""
    batch, tokens, heads, width = v.shape
    gate = gate_kind(log_decay)
    length = segment_tokens(q, v, gate)
    segments = batch * -(-tokens // length)
    if cu_seqlens is not None:  # as many as there could be
        segments += cu_seqlens.numel() - 2
    tiles = share_out(q.shape[-1], width, v.dtype, gate, False, segments * heads, v.device)
    slices = f", {tiles.slices} slices of the key channels" if tiles.slices > 1 else ""
    pieces = f"segments of {length} tokens" if length < tokens else "one pass over the sequence"
    shares = log_decay is not None and bonus is None and shared.takes(k, v, log_decay)
    back = f"; backward by chunks of {shared.CHUNK} for heads that share keys" if shares else ""
    return (
        f"scan ({GATE_NAMES[gate]}): chunks of {tiles.chunk} tokens, {tiles.columns} value columns "
        f"a program{slices}, {tiles.warps} warps, {tiles.stages} stages; {pieces}{back}"
    )


def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    bonus: Tensor | None = None,
    scale: float = 1.0,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence; arguments and results as `subquad.linear_recurrence`.

    q, k [B,T,Hk,K], v [B,T,H,V]; log_decay None | [H] | [H,K] | [B,T,H] | [B,T,H,K]; bonus [H,K];
    state [B,H,K,V] float32; cu_seqlens [N+1] with B = 1. Returns o [B,T,H,V] in the promoted type
    of q, k and v, and the final state, float32. Differentiable in all floating-point tensors.
    """
    if not q.dtype == k.dtype == v.dtype:
        dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if abs(scale) < 1e-18:  # the backward kernels divide by it, in float32
        o, final = linear_recurrence(q, k, v, log_decay, bonus, 1.0, state, cu_seqlens)
        return o * scale, final
    state = None if state is None else state.float()
    o, final, _ = scan_forward(q, k, v, log_decay, bonus, state, cu_seqlens, float(scale))
    return o, final


# ---- the ops --------------------------------------------------------------------------------


@operator("subquad::scan_forward")
@replayed
def scan_forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, bonus: Tensor | None,
    state: Tensor | None, cu_seqlens: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Outputs [B,T,H,V], the state [B,H,K,V] that leaves each sequence, those between segments.

    The last are for the backward pass, and none where the sequences are not split.
    """
    q, k, v = strided(q), strided(k), strided(v)
    heads = v.shape[2]
    queue: list[Launch] = []
    gate, layout, tiles, _ = plan(k, v, log_decay, cu_seqlens, queue)
    state = None if state is None else state.contiguous()
    bonus = None if bonus is None else bonus.contiguous()
    o = torch.empty(v.shape, device=v.device, dtype=v.dtype)
    final = empty_states(k, v, layout.sequences)
    walk = (gate, layout, tiles, heads)
    states = join_segments(k, v, *walk, state, False, 1.0, bonus, queue)
    parts = sliced(o, tiles)
    queue += scan_launches(q, k, v, parts, *walk, scale=scale, bonus=bonus, start=state,
                           states=states, finish=final)  # fmt: skip
    add_slices(parts, o, queue)
    launch(queue)
    return o, final, states


@scan_forward.register_fake
def _(q, k, v, log_decay, bonus, state, cu_seqlens, scale):
    sequences = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    kept = states_to_keep(k, v, log_decay, cu_seqlens)
    return v.new_empty(v.shape), empty_states(k, v, sequences), empty_states(k, v, kept)


@operator("subquad::scan_backward")
@replayed
def scan_backward(
    do: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None,
    bonus: Tensor | None, state: Tensor | None, states: Tensor, cu_seqlens: Tensor | None,
    scale: float, with_gate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, log_decay (empty unless with_gate), bonus and state (empty if none).

    states: those between segments, as the forward pass left them.
    """
    do, q, k, v = strided(do), strided(q), strided(k), strided(v)
    heads, width = v.shape[2], k.shape[-1]
    state = None if state is None else state.contiguous()
    dfinal = None if dfinal is None else dfinal.contiguous()
    if log_decay is not None and bonus is None and shared.takes(k, v, log_decay):
        dq, dk, dv, dslopes, dstate = shared.gradients(
            do, dfinal, q, k, v, log_decay, state, states, cu_seqlens, scale, with_gate
        )
        return dq, dk, dv, dslopes, v.new_empty(0), dstate
    queue: list[Launch] = []
    gate, layout, value_tiles, key_tiles = plan(k, v, log_decay, cu_seqlens, queue)
    bonus = None if bonus is None else bonus.contiguous()

    walk = (gate, layout, value_tiles, heads)
    dstates = join_segments(q, do, *walk, dfinal, True, scale, bonus, queue)
    first = None if state is None else empty_states(k, v, layout.sequences)  # its gradient
    dv = torch.empty(v.shape, device=v.device, dtype=v.dtype)
    dq = v.new_empty(*v.shape[:3], width)
    dk = torch.empty_like(dq)
    dv_parts, dq_parts = sliced(dv, value_tiles), sliced(dq, key_tiles)
    dk_parts = dk if dq_parts is dq else dq_parts  # one buffer: dq is added up before dk comes
    slopes, dbonus = _Slopes(), None
    if with_gate and log_decay is not None:
        slopes = _slopes(k, v, log_decay, dfinal, gate, layout, key_tiles)
    if bonus is not None:
        pieces = layout.segments * key_tiles.slices
        dbonus = v.new_empty(pieces, heads, width, dtype=torch.float32)
    run = partial(scan_launches, gate=gate, layout=layout, heads=heads, scale=scale, bonus=bonus)
    queue += [
        *run(k, q, do, dv_parts, tiles=value_tiles, reverse=True, start=dfinal, states=dstates,
             finish=first),
        *run(do, v, k, dq_parts, tiles=key_tiles, out=True, start=state, states=states,
             finish=slopes.lasts, ends=slopes.ends, partner=q, reads=slopes.reads),
    ]  # fmt: skip
    add_slices(dq_parts, dq, queue)
    queue += [
        *run(v, do, q, dk_parts, tiles=key_tiles, out=True, reverse=True, start=dfinal,
             states=dstates, ends=slopes.ends, lasts=slopes.lasts, partner=k, reads=slopes.writes,
             totals=slopes.tails, dgate=slopes.parts, dbonus=dbonus),
    ]  # fmt: skip
    add_slices(dv_parts, dv, queue)
    add_slices(dk_parts, dk, queue)
    if slopes.tails is not None:
        from subquad.engines.matrix.gpu.gates_kernel import sum_slopes

        queue.append(launch_of(
            sum_slopes, (layout.segments * heads,),
            slopes.reads, slopes.writes, slopes.tails, slopes.whole, *layout.walk(v), H=heads,
            SHARES=slopes.tails.shape[-1], C=1024, FIXED=gate.fixed, BONUS=bonus is not None,
            PACKED=layout.table is not None,
        ))  # fmt: skip
    elif not gate.fixed:
        add_slices(slopes.parts, slopes.whole, queue)
    launch(queue)
    return (
        _unshare(dq, q), _unshare(dk, k), dv, _fold(slopes.whole, log_decay, v),
        _fold(dbonus, bonus, v), v.new_empty(0) if first is None else first,
    )  # fmt: skip


class _Slopes(NamedTuple):
    """What dq and dk leave of a gate's gradient; `scan` says how it is made of that."""

    reads: Tensor | None = None  # q.dq
    writes: Tensor | None = None  # k.dk
    ends: Tensor | None = None  # states between segments
    lasts: Tensor | None = None  # states that leave the sequences, where those have gradients
    tails: Tensor | None = None  # products of states and their gradients
    parts: Tensor | None = None  # the gradient, of slices of the contracted channels
    whole: Tensor | None = None  # the gradient; a fixed gate's is summed over a segment's tokens


def _slopes(
    k: Tensor, v: Tensor, log_decay: Tensor, dfinal: Tensor | None, gate: Gate, layout: Layout,
    tiles: Tiles,
) -> _Slopes:  # fmt: skip
    token, (heads, width) = v.shape[:3], (v.shape[2], k.shape[-1])
    new = partial(v.new_empty, dtype=torch.float32)
    ends = empty_states(k, v, layout.boundaries)
    lasts = None if dfinal is None else empty_states(k, v, layout.sequences)
    if gate.kind == KEY:
        reads = new(tiles.slices, *token, width)
        if gate.fixed:
            whole = parts = new(layout.segments * tiles.slices, heads, width)
        else:
            whole = v.new_empty(log_decay.shape, dtype=log_decay.dtype)
            parts = sliced(whole, tiles)
        return _Slopes(reads, reads, ends, lasts, None, parts, whole)
    shares = programs(width, tiles)
    reads, writes = new(*token, shares), new(*token, shares)
    tails = new(layout.segments, heads, shares)
    if gate.fixed:
        whole = new(layout.segments, heads)
    else:
        whole = v.new_empty(log_decay.shape, dtype=log_decay.dtype)
    return _Slopes(reads, writes, ends, lasts, tails, None, whole)


def _fold(gradient: Tensor | None, parameter: Tensor | None, like: Tensor) -> Tensor:
    """Sum a gradient's first axis, segments, unless the parameter has a value for each token."""
    if gradient is None or parameter is None:
        return like.new_empty(0)
    return gradient.sum(0).to(parameter.dtype) if is_fixed(parameter) else gradient


def _unshare(gradient: Tensor, like: Tensor) -> Tensor:
    """Sum [B,T,H,K] over the heads that share a key head."""
    if gradient.shape == like.shape:
        return gradient
    return gradient.unflatten(2, (like.shape[2], -1)).sum(3)


@scan_backward.register_fake
def _(do, dfinal, q, k, v, log_decay, bonus, state, states, cu_seqlens, scale, with_gate):
    dgate = log_decay.new_empty(log_decay.shape) if with_gate else v.new_empty(0)
    dbonus = v.new_empty(0) if bonus is None else bonus.new_empty(bonus.shape)
    grads = (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
    dstate = v.new_empty(0) if state is None else state.new_empty(state.shape)
    return *grads, dgate, dbonus, dstate


def _save(ctx, inputs: tuple, output: tuple) -> None:
    *tensors, scale = inputs
    *_, states = output
    ctx.save_for_backward(*tensors, states)
    ctx.mark_non_differentiable(states)
    ctx.scale = scale
    ctx.set_materialize_grads(False)


def _gradients(ctx, do: Tensor | None, dfinal: Tensor | None, _: None) -> tuple:
    q, k, v, log_decay, bonus, state, cu_seqlens, states = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do
    with_gate = log_decay is not None and ctx.needs_input_grad[3]
    dq, dk, dv, dgate, dbonus, dstate = scan_backward(
        do, dfinal, q, k, v, log_decay, bonus, state, states, cu_seqlens, ctx.scale, with_gate
    )
    return (
        dq, dk, dv, dgate if with_gate else None, None if bonus is None else dbonus,
        None if state is None else dstate, None, None,
    )  # fmt: skip


scan_forward.register_autograd(_gradients, _save)
