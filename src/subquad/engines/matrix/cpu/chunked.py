"""The compiled chunked form of the CPU as an operator: autograd and `torch.compile` see one node.

Its backward pass is compiled, too; higher derivatives are those of `forms.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from subquad.engines.matrix import forms
from subquad.engines.matrix.kind import is_per_key
from subquad.engines.matrix.reference import Delta, Erase, LowRank
from subquad.engines.runtime.derivatives import recorded_gradients, will_be_differentiated
from subquad.engines.runtime.eager import can_call_operators
from subquad.engines.runtime.operator import operator

CHUNK = 64


def why_not(
    q: Tensor,
    v: Tensor,
    erase: Erase,
) -> str | None:
    """What keeps the compiled chunks from serving these arguments; None if nothing does."""
    if q.device.type != "cpu":
        return f"compiled chunks run on the CPU, not on {q.device}"
    if v.dtype == torch.float64:
        return "compiled chunks compute in float32, not in float64"
    if isinstance(erase, LowRank):
        return "compiled chunks know no LowRank"
    if not can_call_operators():
        return "compiled chunks know neither forward derivatives nor vmap"
    return None


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    erase: Erase,
    scale: float,
    state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`forms.chunked` for what `why_not` allows, in float32; q as it came, not scaled."""
    beta = erase.beta if isinstance(erase, Delta) else None
    if log_decay is not None:
        channels = q.shape[3:] if is_per_key(log_decay) else ()
        log_decay = log_decay.expand(*v.shape[:3], *channels)
    inputs = (q, k, v, log_decay, beta, state)
    recorded = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    kept = _most_chunks(q, cu_seqlens) if recorded else 0
    o, final, _ = _chunked(q, k, v, log_decay, beta, scale, state, cu_seqlens, kept)
    return o, final


def chunked_with_bonus(
    q: Tensor,  # [B,T,Hk,K]
    k: Tensor,  # [B,T,Hk,K]
    v: Tensor,  # [B,T,H,V]
    log_decay: Tensor | None,
    bonus: Tensor,  # [H,K]
    scale: float,
    state: Tensor,  # [B,H,K,V], or [N,H,K,V] for N packed sequences
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`chunked` for reads before the write: what t's query reads there is what it would read as the
    query of t - 1, after that. So queries go one token ahead, and outputs one back; a sequence's
    first query reads its initial state. Tokens read themselves by the bonus alone."""
    Hk = q.shape[2]
    ahead = pad(q[:, 1:], (0, 0, 0, 0, 0, 1))
    if cu_seqlens is not None:  # a sequence's last token has no query of the next one's
        ahead = ahead.index_fill(1, cu_seqlens[1:].long() - 1, 0.0)
    o, final = chunked(ahead, k, v, log_decay, None, scale, state, cu_seqlens)
    begins = None if cu_seqlens is None else cu_seqlens[:-1].long()
    first = q[:, 0] if begins is None else q[0].index_select(0, begins)  # [B|N,Hk,K]
    first = (scale * first[:, :, None, None] @ state.unflatten(1, (Hk, -1))).flatten(1, 3)
    first = first.view(-1, *v.shape[2:])  # [B|N,H,V]
    if begins is None:
        o = torch.cat([first[:, None], o[:, :-1]], 1)
    else:
        o = pad(o[:, :-1], (0, 0, 0, 0, 1, 0)).index_copy(1, begins, first[None])
    own = torch.einsum("bthk,hgk->bthg", q * k, scale * bonus.unflatten(0, (Hk, -1))).flatten(2)
    return torch.addcmul(o, own.unsqueeze(-1), v), final


def _most_chunks(q: Tensor, cu_seqlens: Tensor | None) -> int:
    """How many chunks there can be, known from shapes alone: each sequence has one ragged one."""
    B, T = q.shape[:2]
    if cu_seqlens is None:
        return B * -(-T // CHUNK)
    sequences = cu_seqlens.shape[0] - 1
    return (T + sequences * (CHUNK - 1)) // CHUNK


@operator("subquad::chunked")
def _chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    state: Tensor,
    cu_seqlens: Tensor | None,
    kept: int,  # chunks whose starting states the backward pass will want; 0 for no such pass
) -> tuple[Tensor, Tensor, Tensor]:
    # Compiles, and imports numba, when first used.
    from subquad.engines.matrix.cpu import walk as chunked_cpu

    return chunked_cpu.forward(q, k, v, log_decay, beta, scale, state, cu_seqlens, kept)


@operator("subquad::chunked_backward")
def _chunked_backward(
    do: Tensor,
    dfinal: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    starts: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from subquad.engines.matrix.cpu import walk_backward as chunked_backward_cpu

    gradients: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor] = (
        chunked_backward_cpu.backward(
            do, dfinal, q, k, v, log_decay, beta, scale, starts, cu_seqlens
        )
    )
    return gradients


@_chunked.register_fake
def _(q, k, v, log_decay, beta, scale, state, cu_seqlens, kept):  # type: ignore[no-untyped-def]
    starts = state.new_empty(kept, *state.shape[1:])
    return v.new_empty(v.shape), state.new_empty(state.shape), starts


@_chunked_backward.register_fake
def _(do, dfinal, q, k, v, log_decay, beta, scale, starts, cu_seqlens):  # type: ignore[no-untyped-def]
    gates = (v.new_empty(0) if x is None else x.new_empty(x.shape) for x in (log_decay, beta))
    like = (x.new_empty(x.shape) for x in (q, k, v))
    return *like, *gates, dfinal.new_empty(dfinal.shape)


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, log_decay, beta, ctx.scale, state, cu_seqlens, _ = inputs
    ctx.save_for_backward(q, k, v, log_decay, beta, state, output[2], cu_seqlens)
    ctx.set_materialize_grads(False)  # the starts' would be as large as the starts


def _gradients(ctx, do, dfinal, _):  # type: ignore[no-untyped-def]
    q, k, v, log_decay, beta, state, starts, cu_seqlens = ctx.saved_tensors
    if will_be_differentiated():

        def form(q, k, v, log_decay, beta, state):  # type: ignore[no-untyped-def]
            erase = None if beta is None else Delta(beta)
            return forms.chunked(
                q * ctx.scale, k, v, log_decay, erase, None, state, cu_seqlens, CHUNK
            )

        found = recorded_gradients(form, (q, k, v, log_decay, beta, state), (do, dfinal))
        return *found[:5], None, found[5], None, None
    if starts.shape[0] == 0:  # traced or exported where no gradient was to be asked for
        kept = _most_chunks(q, cu_seqlens)
        given = (q, k, v, log_decay, beta, ctx.scale, state, cu_seqlens, kept)
        starts = _chunked(*given)[2]
    do = torch.zeros_like(v) if do is None else do
    dfinal = torch.zeros_like(state) if dfinal is None else dfinal
    dq, dk, dv, dlog_decay, dbeta, dstate = _chunked_backward(
        do, dfinal, q, k, v, log_decay, beta, ctx.scale, starts, cu_seqlens
    )
    dlog_decay = None if log_decay is None else dlog_decay
    dbeta = None if beta is None else dbeta
    return dq, dk, dv, dlog_decay, dbeta, None, dstate, None, None


_chunked.register_autograd(_gradients, _setup)
