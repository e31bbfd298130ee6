"""The backward pass of heads that share their keys: its launches. `shared_keys.py` explains it."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.backend.gpu.launch import Launch, launch
from subquad.engines.matrix.gpu.layout import Layout, Tiles, lay_out, padded, processors, roomy
from subquad.engines.matrix.gpu.passes import (
    Gate,
    empty_states,
    join_segments,
    prepare_gate,
    segment_tokens,
    sum_gate,
)
from subquad.engines.matrix.kind import is_per_key

CHUNK = 64
WALK = Tiles(CHUNK, 64, 4, 3)  # of the walks over the sequence
VALUES = Tiles(CHUNK, 64, 4, 3)  # of value_gradients
KEYS = Tiles(CHUNK, 64, 8, 3)  # of key_gradients
PROGRAMS_PER_PROCESSOR = 2  # what sharing out the heads aims at where chunks are few


def takes(k: Tensor, v: Tensor, log_decay: Tensor) -> bool:
    """Whether these kernels have tiles for such tensors (bfloat16, gates per head, small heads)."""
    return (
        roomy(v.device)
        and not is_per_key(log_decay)
        and v.dtype == torch.bfloat16
        and k.shape[2] < v.shape[2]
        and k.shape[-1] <= 128
        and v.shape[-1] <= 64
    )


def gradients(
    do: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor,
    state: Tensor | None, entering: Tensor, cu_seqlens: Tensor | None, scale: float,
    with_gate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, log_decay (empty unless with_gate) and state (empty if none).

    entering: the states between the segments of the forward pass.
    """
    batch, tokens, heads, width = v.shape
    queue: list[Launch] = []
    gate = sum_gate(prepare_gate(log_decay, v), k, v, cu_seqlens, CHUNK, queue)
    length = segment_tokens(k, v, gate.kind)
    walk = lay_out(batch, tokens, length, cu_seqlens, CHUNK, queue)
    leaving = join_segments(q, do, gate, walk, WALK, heads, dfinal, True, scale, None, queue)
    dstate = None if state is None else empty_states(k, v, walk.sequences)
    cut = lay_out(batch, tokens, CHUNK, cu_seqlens, CHUNK, queue)
    states, dstates = (v.new_empty(cut.segments, heads, width, k.shape[-1]) for _ in range(2))

    shared = k.shape[2]
    programs = cut.segments * shared
    parts = PROGRAMS_PER_PROCESSOR * processors(v.device) // programs
    parts = max(1, min(heads // shared, parts))
    each = -(-heads // shared // parts)
    dq, dk = (v.new_empty(*k.shape[:3], parts, k.shape[-1]) for _ in range(2))
    dv = torch.empty(v.shape, device=v.device, dtype=v.dtype)
    dgate = v.new_empty(v.shape[:3] if with_gate else 0, dtype=torch.float32)
    queue += [
        _walk(k, v, gate, walk, state, entering, states, None, 1.0, False),
        _walk(q, do, gate, walk, dfinal, leaving, dstates, dstate, scale, True),
        *_chunks(q, k, v, do, gate, cut, states, dstates, dq, dk, dv, dgate, scale, parts, each),
    ]
    launch(queue)
    if parts > 1:
        dq, dk = dq.sum(3), dk.sum(3)
    if with_gate and gate.fixed:
        dgate = dgate.sum((0, 1))
    dgate = dgate.to(log_decay.dtype) if with_gate else v.new_empty(0)
    dstate = v.new_empty(0) if dstate is None else dstate
    return dq.view(k.shape), dk.view(k.shape), dv, dgate, dstate


def _common(k: Tensor, v: Tensor, gate: Gate, layout: Layout) -> dict:
    import triton.language as tl

    return {
        "H": v.shape[2], "SHARE": v.shape[2] // k.shape[2], "K": k.shape[-1], "V": v.shape[-1],
        "BK": padded(k.shape[-1]), "C": CHUNK, "GATE": gate.kind,
        "PACKED": layout.table is not None, "DOT": tl.bfloat16,
    }  # fmt: skip


def _walk(
    w: Tensor, x: Tensor, gate: Gate, layout: Layout, start: Tensor | None, entering: Tensor,
    states: Tensor, finish: Tensor | None, scale: float, reverse: bool,
) -> Launch:  # fmt: skip
    from subquad.engines.matrix.gpu.shared_keys_kernel import chunk_states

    sums = x if gate.sums is None else gate.sums[0]
    arguments = (
        w, x, gate.values, sums, x if start is None else start, entering, states,
        x if finish is None else finish, *layout.walk(x), sums.shape[1], scale,
        w.stride(2), x.stride(2), gate.head,
    )  # fmt: skip
    options = _common(w, x, gate, layout) | {
        "w_token": w.stride(1), "x_token": x.stride(1), "REVERSE": reverse,
        "START": start is not None, "SPLIT": layout.split, "FINISH": finish is not None,
        **_of(WALK),
    }  # fmt: skip
    return Launch(chunk_states, (layout.segments * x.shape[2],), arguments, options)


def _chunks(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, gate: Gate, layout: Layout, states: Tensor,
    dstates: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, dgate: Tensor, scale: float,
    parts: int, each: int,
) -> list[Launch]:  # fmt: skip
    from subquad.engines.matrix.gpu.shared_keys_kernel import key_gradients, value_gradients

    sums = v if gate.sums is None else gate.sums[0]
    inputs = (q, k, v, do, gate.values, sums, states, dstates)
    walk = (
        *layout.walk(v), sums.shape[1], parts, each, scale,
        q.stride(2), k.stride(2), v.stride(2), do.stride(2), gate.head,
    )  # fmt: skip
    grid = (layout.segments * k.shape[2] * parts,)
    options = _common(k, v, gate, layout) | {
        "q_token": q.stride(1), "k_token": k.stride(1), "v_token": v.stride(1),
        "do_token": do.stride(1),
    }  # fmt: skip
    slopes = {"SLOPES": dgate.numel() > 0}
    return [
        Launch(value_gradients, grid, (*inputs, dv, dgate, *walk), options | slopes | _of(VALUES)),
        Launch(key_gradients, grid, (*inputs, dq, dk, *walk), options | _of(KEYS)),
    ]


def _of(tiles: Tiles) -> dict[str, int]:
    return {"BV": tiles.columns, "STAGES": tiles.stages, "num_warps": tiles.warps}
