"""One token of the matrix recurrence on a GPU, for decoding: every decay, every erase, no gradient.

`step` leaves the state it is given as it is and returns the next one; `step_` writes the next one
over it, half the memory traffic of a copy and the same addresses at every token, as a captured
graph needs. Both are operators over one Triton kernel; Triton is imported by the first
launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.backend.gpu.launch import launch_one
from subquad.backend.gpu.launch_cache import replayed
from subquad.backend.gpu.tensors import reason_to_decline
from subquad.engines.matrix.gpu.layout import gate_kind, padded
from subquad.engines.matrix.gpu.scan import GATE_NAMES
from subquad.engines.matrix.kind import is_fixed, is_per_key
from subquad.engines.runtime.operator import operator

TILE = 8192  # cells of the state a program: 64 in the registers of each of its threads
WARPS = 4
ERASES = ("nothing erased", "delta rule", "low-rank erase")


def supported(q: Tensor, *others: Tensor | None) -> str | None:
    """None if the kernel can take these (already validated) tensors, else why not."""
    if q.shape[-1] > 256:
        return f"K is {q.shape[-1]}; the Triton kernels hold at most 256 channels of a head"
    return reason_to_decline(q, *others)


def describe(q: Tensor, v: Tensor, log_decay: Tensor | None, erase: int) -> str:
    """One line for `explain`; `erase` is the number of its tensors."""
    programs = v.shape[0] * v.shape[2] * -(-v.shape[3] // columns_at_once(q.shape[3], v.shape[3]))
    return (
        f"one token and no gradient: step ({GATE_NAMES[gate_kind(log_decay)]}, {ERASES[erase]}), "
        f"one pass over the state by {programs} programs"
    )


@operator("subquad::matrix_step")
@replayed
def step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None,
    a: Tensor | None, b: Tensor | None, bonus: Tensor | None, scale: float,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `subquad.linear_recurrence` with T = 1: o [B,1,H,V] and the next state.

    q, k [B,1,Hk,K]; v [B,1,H,V]; log_decay None | [H] | [H,K] | [B,1,H] | [B,1,H,K]; beta [B,1,H];
    a, b [B,1,H,K]; bonus [H,K]; state [B,H,K,V] float32.
    """
    new = _empty_state(k, v)
    state = None if state is None else state.contiguous()
    return _launch(q, k, v, log_decay, beta, a, b, bonus, scale, state, new), new


@step.register_fake
def _(q, k, v, log_decay, beta, a, b, bonus, scale, state):
    return v.new_empty(v.shape), _empty_state(k, v)


@operator("subquad::matrix_step_", mutates=("state",))
@replayed
def step_(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None,
    a: Tensor | None, b: Tensor | None, bonus: Tensor | None, scale: float, state: Tensor,
) -> Tensor:  # fmt: skip
    """`step`, the next state written over `state`, which must be contiguous."""
    return _launch(q, k, v, log_decay, beta, a, b, bonus, scale, state, state)


@step_.register_fake
def _(q, k, v, log_decay, beta, a, b, bonus, scale, state):
    return v.new_empty(v.shape)


def columns_at_once(width: int, columns: int) -> int:
    """Value columns a program: measured at K = V = 128, figures in docs/kernels.md."""
    return min(TILE // padded(width), padded(columns), 64)


def _empty_state(k: Tensor, v: Tensor) -> Tensor:
    batch, _, heads, columns = v.shape
    return v.new_empty(batch, heads, k.shape[-1], columns, dtype=torch.float32)


def _launch(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None,
    a: Tensor | None, b: Tensor | None, bonus: Tensor | None, scale: float,
    state: Tensor | None, new: Tensor,
) -> Tensor:  # fmt: skip
    from subquad.engines.matrix.gpu.step_kernel import step as kernel

    batch, _, heads, columns = v.shape
    width = k.shape[-1]
    block = columns_at_once(width, columns)
    o = torch.empty(v.shape, device=v.device, dtype=v.dtype)
    q, k, v = _adjacent(q), _adjacent(k), _adjacent(v)
    a, b = None if a is None else _adjacent(a), None if b is None else _adjacent(b)
    bonus = None if bonus is None else bonus.contiguous()
    gate_strides = (0, 0)
    if log_decay is not None and is_fixed(log_decay):
        log_decay = log_decay.contiguous()
        gate_strides = (0, log_decay.stride(0))
    elif log_decay is not None:
        log_decay = _adjacent(log_decay) if is_per_key(log_decay) else log_decay
        gate_strides = _strides(log_decay)
    absent = q  # a valid pointer that the kernel never follows
    erase = sum(x is not None for x in (beta, a, b))
    launch_one(
        kernel, (batch * heads * -(-columns // block),),
        q, k, v,
        *(absent if x is None else x for x in (log_decay, beta, a, b, bonus, state)),
        o, new, *_strides(q), *_strides(k), *_strides(v), *gate_strides,
        *_strides(beta), *_strides(a), *_strides(b), scale,
        H=heads, SHARE=heads // k.shape[2], K=width, V=columns, BK=padded(width), BV=block,
        GATE=gate_kind(log_decay), ERASE=erase, BONUS=bonus is not None, START=state is not None,
        num_warps=WARPS,
    )  # fmt: skip
    return o


def _adjacent(x: Tensor) -> Tensor:
    """x with its last axis adjacent in memory: a view if it is."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(x: Tensor | None) -> tuple[int, int]:
    """Of the batch and the heads in [B,1,H] or [B,1,H,K]."""
    return (0, 0) if x is None else (x.stride(0), x.stride(2))
