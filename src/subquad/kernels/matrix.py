"""The matrix recurrence on a GPU: rows without erasing, as torch custom ops over Triton kernels.

    S_t = exp(log_decay_t) * S_{t-1} + k_t v_t^T
    o_t = scale * S_t^T q_t,  with a bonus u  scale * (S_{t-1} + (u * k_t) v_t^T)^T q_t

`supported` says whether these tensors can run here, `describe` what would run, and
`linear_recurrence` runs it. Triton is imported by the first launch, never by this module.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from .launch import Launch, launch
from .layout import (
    HEAD,
    KEY,
    NONE,
    PIECE,
    Layout,
    Tiles,
    blocks,
    choose_tiles,
    gate_kind,
    lay_out,
    padded,
    segment_length,
)

GATE_NAMES = ("no decay", "fixed decay per head", "decay per head", "decay per key channel")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def supported(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    bonus: Tensor | None = None,
    scale: float | None = None,
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
    return _triton_missing()


@lru_cache(maxsize=1)
def _triton_missing() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError:
        return "Triton is not installed"
    return None


def describe(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None
) -> str:  # fmt: skip
    """One line for `explain`: the kernel, its tile sizes, and how the sequence is split."""
    batch, tokens, heads, width = v.shape
    gate = gate_kind(log_decay)
    tiles = choose_tiles(q.shape[-1], width, v.dtype, gate, False)
    length = segment_length(batch, tokens, heads * blocks(width, tiles) * tiles.warps, v.device)
    pieces = f"segments of {length} tokens" if length < tokens else "one pass over the sequence"
    return (
        f"scan ({GATE_NAMES[gate]}): chunks of {tiles.chunk} tokens, {tiles.columns} value columns "
        f"a program, {tiles.warps} warps, {tiles.stages} stages; {pieces}"
    )


def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    bonus: Tensor | None = None,
    scale: float | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence; arguments and results as `subquad.recurrence.linear_recurrence`.

    q, k [B,T,Hk,K], v [B,T,H,V]; log_decay None | [H] | [H,K] | [B,T,H] | [B,T,H,K]; bonus [H,K];
    state [B,H,K,V] float32; cu_seqlens [N+1] with B = 1. Returns o [B,T,H,V] in the promoted type
    of q, k and v, and the final state, float32. Differentiable in all floating-point tensors.
    """
    if scale is None:
        scale = q.shape[-1] ** -0.5
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    if scale == 0:  # the backward kernels divide by it
        o, final = linear_recurrence(q, k, v, log_decay, bonus, 1.0, state, cu_seqlens)
        return o * 0.0, final
    state = None if state is None else state.float()
    return scan_forward(
        q.to(dtype), k.to(dtype), v.to(dtype), log_decay, bonus, state, cu_seqlens, float(scale)
    )


# ---- launches -------------------------------------------------------------------------------


def _strided(x: Tensor) -> Tensor:
    """x with its channels adjacent and one stride for all tokens of the batch: a view if it is."""
    flat = x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
    return x if x.stride(-1) == 1 and flat else x.contiguous()


class _Gate(NamedTuple):
    kind: int
    fixed: bool  # the same at every token
    values: Tensor  # something to point at, if there is no gate
    token: int  # strides
    head: int
    sums: tuple[Tensor, ...] | None = None  # what the pre-pass made of it


def _prepare_gate(log_decay: Tensor | None, like: Tensor) -> _Gate:
    kind = gate_kind(log_decay)
    if log_decay is None:
        return _Gate(kind, False, like, 0, 0)
    if log_decay.ndim <= 2:
        log_decay = log_decay.contiguous()
        return _Gate(kind, True, log_decay, 0, log_decay.stride(0))
    if log_decay.ndim == 4:
        log_decay = _strided(log_decay)
    elif log_decay.shape[0] > 1 and log_decay.stride(0) != log_decay.shape[1] * log_decay.stride(1):
        log_decay = log_decay.contiguous()
    return _Gate(kind, False, log_decay, log_decay.stride(1), log_decay.stride(2))


def _sum_gate(gate: _Gate, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, chunk: int) -> _Gate:
    """Sums of the gates, made once and shared by the scans of o, dq, dk and dv."""
    if gate.kind not in (HEAD, KEY):
        return gate
    from .gates import sum_head_gates, sum_key_gates

    batch, tokens, heads, width = *v.shape[:3], k.shape[-1]
    pieces = lay_out(batch, tokens, PIECE, cu_seqlens, chunk)
    grid, packed = (pieces.segments * heads,), cu_seqlens is not None
    chunks = -(-tokens // chunk)
    chunks = batch * chunks if cu_seqlens is None else chunks + cu_seqlens.numel() - 1
    if gate.kind == HEAD:
        precise = v.dtype != torch.bfloat16
        wholes = torch.empty(heads, chunks, chunk, device=v.device, dtype=torch.float32)
        parts = torch.empty_like(wholes) if precise else wholes
        sum_head_gates[grid](
            gate.values, wholes, parts, *pieces.walk(wholes), chunks, gate.token, gate.head,
            H=heads, C=chunk, PACKED=packed, PRECISE=precise,
        )  # fmt: skip
        return gate._replace(sums=(wholes, parts, wholes))
    first = torch.empty(chunks, heads, width, device=v.device, dtype=torch.float32)
    last = torch.empty_like(first)
    fits = torch.empty(heads, chunks, device=v.device, dtype=torch.int32)
    sum_key_gates[grid](
        gate.values, first, last, fits, *pieces.walk(first), chunks, gate.token, gate.head,
        H=heads, K=width, BK=padded(width), C=chunk, PACKED=packed, num_warps=1,
    )  # fmt: skip
    return gate._replace(sums=(first, last, fits))


def _scan(
    r: Tensor | None, w: Tensor, x: Tensor, y: Tensor | None, gate: _Gate, layout: Layout,
    tiles: Tiles, heads: int, *, out: bool = False, reverse: bool = False, scale: float = 1.0,
    bonus: Tensor | None = None, start: Tensor | None = None, finish: Tensor | None = None,
    totals: Tensor | None = None, partner: Tensor | None = None, ends: Tensor | None = None,
    reads: Tensor | None = None, dgate: Tensor | None = None, dbonus: Tensor | None = None,
) -> list[Launch]:  # fmt: skip
    """The launches of one scan; r=None carries the state only. scan.py names the parts."""
    read = r is not None
    r = w if r is None else r
    partner = x if partner is None else partner
    absent = x  # a valid pointer that the kernel never follows
    dot, precision = _dot_type(x.dtype)
    common = {
        "H": heads, "R_SHARE": heads // r.shape[2], "W_SHARE": heads // w.shape[2],
        "X_SHARE": heads // x.shape[2], "M": w.shape[-1], "N": x.shape[-1],
        "BM": padded(w.shape[-1]), "BN": tiles.columns, "C": tiles.chunk, "OUT": out,
        "REVERSE": reverse, "BONUS": bonus is not None, "READ": read, "START": start is not None,
        "FINISH": finish is not None, "PACKED": layout.table is not None, "DOT": dot,
        "PREC": precision, "num_warps": tiles.warps, "r_token": r.stride(1),
        "w_token": w.stride(1), "x_token": x.stride(1), "partner_token": partner.stride(1),
    }  # fmt: skip
    slopes = reads is not None
    grid = (layout.segments * heads * blocks(x.shape[-1], tiles),)
    heads_apart = (r.stride(2), w.stride(2), x.stride(2), partner.stride(2), gate.head)
    tensors = [absent if z is None else z for z in (bonus, start, finish, totals, ends, reads)]
    dbonus = absent if dbonus is None else dbonus
    y = absent if y is None else y
    sums = gate.sums or (x, x, x)
    scales = (scale, 1 / scale, scale) if reverse else (scale, 1.0, 1.0)
    if gate.kind != KEY:
        from .scan import scan

        arguments = (
            r, w, x, y, partner, gate.values, *sums[:2], *tensors, dbonus, *layout.walk(x),
            sums[0].shape[1], *scales, 1.0, *heads_apart,
        )  # fmt: skip
        options = common | {"GATE": gate.kind, "SLOPES": slopes, "STAGES": tiles.stages}
        return [Launch(scan, grid, arguments, options)]
    from .scan_key import scan_key

    arguments = (
        r, w, x, y, partner, gate.values, *sums, *tensors, absent if dgate is None else dgate,
        dbonus, *layout.walk(x), sums[2].shape[-1], *scales, *heads_apart,
    )  # fmt: skip
    common |= {
        "gate_token": gate.token, "FIXED": gate.fixed, "KEEP_READS": slopes and not reverse,
        "GATE_GRAD": slopes and reverse,
        "PARTS": 1 if gate.values.dtype == torch.bfloat16 else 3,
    }  # fmt: skip
    near = common | {"FAR": False, "STAGES": tiles.stages}
    far = common | {"FAR": True, "STAGES": 1}
    return [Launch(scan_key, grid, arguments, options) for options in (near, far)]


def _dot_type(dtype: torch.dtype) -> tuple[object, str]:
    """Operand type and precision of the products. Float16 is widened: states outgrow its range."""
    import triton.language as tl

    return (tl.bfloat16, "tf32") if dtype == torch.bfloat16 else (tl.float32, "tf32x3")


def _enter_segments(
    w: Tensor, x: Tensor, gate: _Gate, layout: Layout, tiles: Tiles, heads: int,
    start: Tensor | None, reverse: bool, scale: float, bonus: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The state that enters each segment, and the one that leaves each sequence."""
    from .tiles import join

    width, columns = w.shape[-1], x.shape[-1]
    states = x.new_empty(layout.segments, heads, width, columns, dtype=torch.float32)
    totals = x.new_empty(layout.segments, heads, width, dtype=torch.float32)
    final = x.new_empty(layout.sequences, heads, width, columns, dtype=torch.float32)
    launch(_scan(None, w, x, None, gate, layout, tiles, heads, reverse=reverse, scale=scale,
                 finish=states, totals=totals, bonus=bonus))  # fmt: skip
    block = min(1024, padded(width * columns))
    join[(layout.sequences * heads * -(-width * columns // block),)](
        states, final if start is None else start, final, totals,
        totals if layout.offsets is None else layout.offsets, layout.per_row,
        H=heads, K=width, V=columns, BLOCK=block, GATED=gate.kind != NONE, REVERSE=reverse,
        START=start is not None, PACKED=layout.offsets is not None,
    )  # fmt: skip
    return states, final


class _Plan(NamedTuple):
    """What both directions of one call share."""

    gate: _Gate
    layout: Layout
    value_tiles: Tiles  # for o and dv
    key_tiles: Tiles  # for dq and dk


def _plan(k: Tensor, v: Tensor, log_decay: Tensor | None, cu_seqlens: Tensor | None) -> _Plan:
    batch, tokens, heads, columns = v.shape
    width = k.shape[-1]
    gate = _prepare_gate(log_decay, v)
    value_tiles = choose_tiles(width, columns, v.dtype, gate.kind, False)
    key_tiles = choose_tiles(columns, width, v.dtype, gate.kind, gate.kind != NONE)
    warps = heads * blocks(columns, value_tiles) * value_tiles.warps
    length = segment_length(batch, tokens, warps, v.device)
    layout = lay_out(batch, tokens, length, cu_seqlens, value_tiles.chunk)
    gate = _sum_gate(gate, k, v, cu_seqlens, value_tiles.chunk)
    return _Plan(gate, layout, value_tiles, key_tiles)


# ---- the ops --------------------------------------------------------------------------------


@torch.library.custom_op("subquad::scan_forward", mutates_args=())
def scan_forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, bonus: Tensor | None,
    state: Tensor | None, cu_seqlens: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs [B,T,H,V] and the state [B,H,K,V] that leaves each sequence."""
    q, k, v = _strided(q), _strided(k), _strided(v)
    heads = v.shape[2]
    gate, layout, tiles, _ = _plan(k, v, log_decay, cu_seqlens)
    state = None if state is None else state.contiguous()
    bonus = None if bonus is None else bonus.contiguous()
    o = torch.empty(v.shape, device=v.device, dtype=v.dtype)
    if layout.split:
        state, final = _enter_segments(k, v, gate, layout, tiles, heads, state, False, 1.0, bonus)
        finish = None
    else:
        finish = final = _empty_states(k, v, layout.sequences)
    launch(_scan(q, k, v, o, gate, layout, tiles, heads, scale=scale, bonus=bonus, start=state,
                 finish=finish))  # fmt: skip
    return o, final


def _empty_states(k: Tensor, v: Tensor, sequences: int) -> Tensor:
    return v.new_empty(sequences, v.shape[2], k.shape[-1], v.shape[-1], dtype=torch.float32)


@scan_forward.register_fake
def _(q, k, v, log_decay, bonus, state, cu_seqlens, scale):
    sequences = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return v.new_empty(v.shape), _empty_states(k, v, sequences)


@torch.library.custom_op("subquad::scan_backward", mutates_args=())
def scan_backward(
    do: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None,
    bonus: Tensor | None, state: Tensor | None, cu_seqlens: Tensor | None, scale: float,
    with_gate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, log_decay (empty unless with_gate), bonus (empty if none), state."""
    do, q, k, v = _strided(do), _strided(q), _strided(k), _strided(v)
    heads, width = v.shape[2], k.shape[-1]
    gate, layout, value_tiles, key_tiles = _plan(k, v, log_decay, cu_seqlens)
    state = None if state is None else state.contiguous()
    dfinal = None if dfinal is None else dfinal.contiguous()
    bonus = None if bonus is None else bonus.contiguous()

    if layout.split:
        walk = (gate, layout, value_tiles, heads)
        state, _ = _enter_segments(k, v, *walk, state, False, 1.0, bonus)
        dfinal, dstate = _enter_segments(q, do, *walk, dfinal, True, scale, bonus)
        finish = None
    else:
        finish = dstate = _empty_states(k, v, layout.sequences)

    dv = torch.empty(v.shape, device=v.device, dtype=v.dtype)
    dq = v.new_empty(*v.shape[:3], width)
    dk = torch.empty_like(dq)
    reads = writes = ends = tails = dgate = dbonus = None
    if with_gate and log_decay is not None:
        parts = blocks(width, key_tiles)
        channels = width if gate.kind == KEY else parts
        writes = reads = v.new_empty(*v.shape[:3], channels, dtype=torch.float32)
        ends = _empty_states(k, v, layout.segments)
        if gate.fixed:  # summed over the tokens of a segment
            size = (layout.segments, heads, width)[: 3 if gate.kind == KEY else 2]
            dgate = v.new_empty(size, dtype=torch.float32)
        else:
            dgate = v.new_empty(log_decay.shape, dtype=log_decay.dtype)
        if gate.kind != KEY:
            writes = torch.empty_like(reads)
            tails = v.new_empty(layout.segments, heads, parts, dtype=torch.float32)
    if bonus is not None:
        dbonus = v.new_empty(layout.segments, heads, width, dtype=torch.float32)
    run = partial(_scan, gate=gate, layout=layout, heads=heads, scale=scale, bonus=bonus)
    launch([
        *run(k, q, do, dv, tiles=value_tiles, reverse=True, start=dfinal, finish=finish),
        *run(do, v, k, dq, tiles=key_tiles, out=True, start=state, finish=ends, partner=q,
             reads=reads),
        *run(v, do, q, dk, tiles=key_tiles, out=True, reverse=True, start=dfinal, ends=ends,
             partner=k, reads=writes, totals=tails, dgate=dgate, dbonus=dbonus),
    ])  # fmt: skip
    if tails is not None:
        from .gates import sum_slopes

        sum_slopes[(layout.segments * heads,)](
            reads, writes, tails, dgate, *layout.walk(v), H=heads, BLOCKS=parts, C=1024,
            FIXED=gate.fixed, BONUS=bonus is not None, PACKED=layout.table is not None,
        )  # fmt: skip
    return (
        _unshare(dq, q), _unshare(dk, k), dv, _fold(dgate, log_decay, v), _fold(dbonus, bonus, v),
        dstate,
    )  # fmt: skip


def _fold(gradient: Tensor | None, parameter: Tensor | None, like: Tensor) -> Tensor:
    """Sum a gradient's first axis, segments, unless the parameter has a value for each token."""
    if gradient is None or parameter is None:
        return like.new_empty(0)
    return gradient.sum(0).to(parameter.dtype) if parameter.ndim <= 2 else gradient


def _unshare(gradient: Tensor, like: Tensor) -> Tensor:
    """Sum [B,T,H,K] over the heads that share a key head."""
    if gradient.shape == like.shape:
        return gradient
    return gradient.unflatten(2, (like.shape[2], -1)).sum(3)


@scan_backward.register_fake
def _(do, dfinal, q, k, v, log_decay, bonus, state, cu_seqlens, scale, with_gate):
    sequences = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dgate = log_decay.new_empty(log_decay.shape) if with_gate else v.new_empty(0)
    dbonus = v.new_empty(0) if bonus is None else bonus.new_empty(bonus.shape)
    grads = (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
    return *grads, dgate, dbonus, _empty_states(k, v, sequences)


def _save(ctx, inputs: tuple, output: tuple) -> None:
    *tensors, scale = inputs
    ctx.save_for_backward(*tensors)
    ctx.scale = scale
    ctx.set_materialize_grads(False)


def _gradients(ctx, do: Tensor | None, dfinal: Tensor | None) -> tuple:
    q, k, v, log_decay, bonus, state, cu_seqlens = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do
    with_gate = log_decay is not None and ctx.needs_input_grad[3]
    dq, dk, dv, dgate, dbonus, dstate = scan_backward(
        do, dfinal, q, k, v, log_decay, bonus, state, cu_seqlens, ctx.scale, with_gate
    )
    return (
        dq, dk, dv, dgate if with_gate else None, None if bonus is None else dbonus,
        None if state is None else dstate, None, None,
    )  # fmt: skip


scan_forward.register_autograd(_gradients, setup_context=_save)
