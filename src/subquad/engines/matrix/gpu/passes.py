"""What a pass of the scan is made of: gates prepared and summed, layouts, launches.

Launches go into a `queue`, to be run at once: what is new of them is then compiled side by side.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from subquad.backend.gpu.launch import Launch, launch_of
from subquad.engines.matrix.gpu.layout import (
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
    programs,
    segment_length,
    share_out,
)
from subquad.engines.matrix.kind import is_fixed, is_per_key


def strided(x: Tensor) -> Tensor:
    """x with its channels adjacent and one stride for all tokens of the batch: a view if it is."""
    last_head = (x.shape[2] - 1) * x.stride(2)  # whose place kernels tell by 32-bit numbers
    fits = x.stride(-1) == 1 and last_head < 2**31
    return x if fits and _is_one_row(x) else _laid_out(x)


def _is_one_row(x: Tensor) -> bool:
    """Whether one stride leads from each token of the batch to the next."""
    return x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)


def _laid_out(x: Tensor) -> Tensor:
    """A copy with the strides of its shape. x.contiguous() leaves a single token's as they are."""
    return x.clone(memory_format=torch.contiguous_format)


class Gate(NamedTuple):
    kind: int
    fixed: bool  # the same at every token
    values: Tensor  # something to point at, if there is no gate
    token: int  # strides
    head: int
    sums: tuple[Tensor, ...] | None = None  # what the pre-pass made of it


def prepare_gate(log_decay: Tensor | None, like: Tensor) -> Gate:
    kind = gate_kind(log_decay)
    if log_decay is None:
        return Gate(kind, False, like, 0, 0)
    if is_fixed(log_decay):
        log_decay = log_decay.contiguous()
        return Gate(kind, True, log_decay, 0, log_decay.stride(0))
    if is_per_key(log_decay):
        log_decay = strided(log_decay)
    elif not _is_one_row(log_decay):
        log_decay = _laid_out(log_decay)
    return Gate(kind, False, log_decay, log_decay.stride(1), log_decay.stride(2))


def sum_gate(
    gate: Gate, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, chunk: int, queue: list[Launch]
) -> Gate:
    """Sums of the gates, made once and shared by the scans of o, dq, dk and dv."""
    if gate.kind not in (HEAD, KEY):
        return gate
    from subquad.engines.matrix.gpu.gates_kernel import sum_head_gates, sum_key_gates

    batch, tokens, heads, width = *v.shape[:3], k.shape[-1]
    pieces = lay_out(batch, tokens, PIECE, cu_seqlens, chunk, queue)
    grid, packed = (pieces.segments * heads,), cu_seqlens is not None
    chunks = -(-tokens // chunk)
    chunks = batch * chunks if cu_seqlens is None else chunks + cu_seqlens.numel() - 1
    if gate.kind == HEAD:
        precise = v.dtype != torch.bfloat16
        wholes = torch.empty(heads, chunks, chunk, device=v.device, dtype=torch.float32)
        parts = torch.empty_like(wholes) if precise else wholes
        queue.append(launch_of(
            sum_head_gates, grid,
            gate.values, wholes, parts, *pieces.walk(wholes), chunks, gate.token, gate.head,
            H=heads, C=chunk, PACKED=packed, PRECISE=precise,
        ))  # fmt: skip
        return gate._replace(sums=(wholes, parts, wholes))
    first = torch.empty(chunks, heads, width, device=v.device, dtype=torch.float32)
    last = torch.empty_like(first)
    fits = torch.empty(heads, chunks, device=v.device, dtype=torch.int32)
    queue.append(launch_of(
        sum_key_gates, grid,
        gate.values, first, last, fits, *pieces.walk(first), chunks, gate.token, gate.head,
        H=heads, K=width, BK=padded(width), C=chunk, PACKED=packed, num_warps=1,
    ))  # fmt: skip
    return gate._replace(sums=(first, last, fits))


def scan_launches(
    r: Tensor | None, w: Tensor, x: Tensor, y: Tensor | None, gate: Gate, layout: Layout,
    tiles: Tiles, heads: int, *, out: bool = False, reverse: bool = False, scale: float = 1.0,
    bonus: Tensor | None = None, start: Tensor | None = None, states: Tensor | None = None,
    finish: Tensor | None = None, totals: Tensor | None = None, partner: Tensor | None = None,
    ends: Tensor | None = None, lasts: Tensor | None = None, reads: Tensor | None = None,
    dgate: Tensor | None = None, dbonus: Tensor | None = None,
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
        "BM": padded(-(-w.shape[-1] // tiles.slices)), "BN": tiles.columns,
        "SLICES": tiles.slices, "C": tiles.chunk, "OUT": out,
        "REVERSE": reverse, "BONUS": bonus is not None, "READ": read, "START": start is not None,
        "SPLIT": layout.split, "FINISH": finish is not None,
        "PACKED": layout.table is not None, "DOT": dot, "PREC": precision,
        "num_warps": tiles.warps, "r_token": r.stride(1),
        "w_token": w.stride(1), "x_token": x.stride(1), "partner_token": partner.stride(1),
    }  # fmt: skip
    slopes = reads is not None
    grid = (layout.segments * heads * programs(x.shape[-1], tiles),)
    all_tokens = x.shape[0] * x.shape[1]
    heads_apart = (r.stride(2), w.stride(2), x.stride(2), partner.stride(2), gate.head)
    given = (bonus, start, states, finish, totals, ends, lasts, reads)
    tensors = [absent if z is None else z for z in given]
    dbonus = absent if dbonus is None else dbonus
    y = absent if y is None else y
    sums = gate.sums or (x, x, x)
    scales = (scale, 1 / scale, scale) if reverse else (scale, 1.0, 1.0)
    if gate.kind != KEY:
        from subquad.engines.matrix.gpu.scan_kernel import scan

        arguments = (
            r, w, x, y, partner, gate.values, *sums[:2], *tensors, dbonus, *layout.walk(x),
            sums[0].shape[1], all_tokens, *scales, 1.0, *heads_apart,
        )  # fmt: skip
        options = common | {"GATE": gate.kind, "SLOPES": slopes, "STAGES": tiles.stages}
        return [Launch(scan, grid, arguments, options)]
    from subquad.engines.matrix.gpu.scan_key_kernel import scan_key

    arguments = (
        r, w, x, y, partner, gate.values, *sums, *tensors, absent if dgate is None else dgate,
        dbonus, *layout.walk(x), sums[2].shape[-1], all_tokens, *scales, *heads_apart,
    )  # fmt: skip
    common |= {
        "gate_token": gate.token, "FIXED": gate.fixed, "KEEP_READS": slopes and not reverse,
        "GATE_GRAD": slopes and reverse,
        "PARTS": _gate_parts(gate.values.dtype, x.dtype),
    }  # fmt: skip
    near = common | {"FAR": False, "STAGES": tiles.stages}
    far = common | {"FAR": True, "STAGES": 1}
    return [Launch(scan_key, grid, arguments, options) for options in (near, far)]


def _gate_parts(gate: torch.dtype, x: torch.dtype) -> int:
    """How many bfloat16 numbers a gate is summed as. Beside rounded operands two are enough: a gate
    is then a number of 16 bits, the same in all sums, so that what stands in two still cancels."""
    if gate == torch.bfloat16:
        return 1
    return 2 if x == torch.bfloat16 else 3


def _dot_type(dtype: torch.dtype) -> tuple[object, str]:
    """Operand type and precision of the products. Float16 is widened: states outgrow its range."""
    import triton.language as tl

    return (tl.bfloat16, "tf32") if dtype == torch.bfloat16 else (tl.float32, "tf32x3")


def join_segments(
    w: Tensor, x: Tensor, gate: Gate, layout: Layout, tiles: Tiles, heads: int,
    start: Tensor | None, reverse: bool, scale: float, bonus: Tensor | None, queue: list[Launch],
) -> Tensor:  # fmt: skip
    """The states between the segments of a sequence, [boundaries, H, K, V]."""
    states = empty_states(w, x, layout.boundaries)
    if not layout.split:
        return states
    from subquad.engines.matrix.gpu.tiles import join

    width, columns = w.shape[-1], x.shape[-1]
    totals = x.new_empty(layout.boundaries, heads, width, dtype=torch.float32)
    packed = layout.offsets is not None
    if packed:  # the sequences may have fewer: a result must not be what memory held
        states.zero_()
    queue += scan_launches(None, w, x, None, gate, layout, tiles, heads, reverse=reverse,
                           scale=scale, states=states, totals=totals, bonus=bonus)  # fmt: skip
    # Of many packed sequences most have nothing to join: few programs each.
    block = min(4096 if packed else 1024, padded(width * columns))
    queue.append(launch_of(
        join, (layout.sequences * heads * -(-width * columns // block),),
        states, states if start is None else start, totals,
        layout.offsets if packed else totals, layout.per_row,
        H=heads, K=width, V=columns, BLOCK=block, GATED=gate.kind != NONE, REVERSE=reverse,
        START=start is not None, PACKED=packed,
    ))  # fmt: skip
    return states


def sliced(like: Tensor, tiles: Tiles) -> Tensor:
    """Where the programs that share out the contracted channels write: [slices, ...] if several.

    In float32, as a sum of rounded numbers is less than a rounded sum.
    """
    if tiles.slices == 1:
        return like
    return like.new_empty(tiles.slices, *like.shape, dtype=torch.float32)


def add_slices(parts: Tensor | None, whole: Tensor | None, queue: list[Launch]) -> None:
    """Add what `sliced` has made up to `whole`; nothing to do where they are the same."""
    if parts is None or whole is None or parts is whole:
        return
    from subquad.engines.matrix.gpu.tiles import add_slices

    size, block = whole.numel(), 1024
    queue.append(launch_of(
        add_slices, (-(-size // block),),
        parts, whole, size, SLICES=parts.shape[0], BLOCK=block,
    ))  # fmt: skip


def segment_tokens(k: Tensor, v: Tensor, kind: int) -> int:
    """Tokens of a segment. Forward and backward pass cut alike: one leaves states for the other."""
    batch, tokens, heads, columns = v.shape
    tiles = choose_tiles(k.shape[-1], columns, v.dtype, kind, False)
    return segment_length(batch, tokens, heads * blocks(columns, tiles) * tiles.warps, v.device)


def states_to_keep(
    k: Tensor, v: Tensor, log_decay: Tensor | None, cu_seqlens: Tensor | None
) -> int:  # fmt: skip
    """How many states the forward pass leaves for the backward pass: those between segments."""
    batch, tokens = v.shape[:2]
    per_row = -(-tokens // segment_tokens(k, v, gate_kind(log_decay)))
    return (batch if cu_seqlens is None else 1) * (per_row - 1)


class Plan(NamedTuple):
    """What both directions of one call share."""

    gate: Gate
    layout: Layout
    value_tiles: Tiles  # for o and dv
    key_tiles: Tiles  # for dq and dk


def plan(
    k: Tensor, v: Tensor, log_decay: Tensor | None, cu_seqlens: Tensor | None, queue: list[Launch]
) -> Plan:
    batch, tokens, heads, columns = v.shape
    width = k.shape[-1]
    gate = prepare_gate(log_decay, v)
    length = segment_tokens(k, v, gate.kind)
    chunk = choose_tiles(width, columns, v.dtype, gate.kind, False).chunk
    layout = lay_out(batch, tokens, length, cu_seqlens, chunk, queue)
    rest = (layout.segments * heads, v.device)
    value_tiles = share_out(width, columns, v.dtype, gate.kind, False, *rest)
    key_tiles = share_out(columns, width, v.dtype, gate.kind, gate.kind != NONE, *rest)
    gate = sum_gate(gate, k, v, cu_seqlens, chunk, queue)
    return Plan(gate, layout, value_tiles, key_tiles)


def empty_states(k: Tensor, v: Tensor, sequences: int) -> Tensor:
    return v.new_empty(sequences, v.shape[2], k.shape[-1], v.shape[-1], dtype=torch.float32)
