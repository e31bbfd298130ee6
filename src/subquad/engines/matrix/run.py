"""How a plan is carried out: a call's arguments, cast and handed to what computes them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from subquad.engines.matrix import forms, reference
from subquad.engines.matrix.call import Call
from subquad.engines.matrix.cpu import chunked as compiled
from subquad.engines.matrix.reference import Delta, Erase, LowRank, parts
from subquad.engines.runtime.autocast import no_autocast
from subquad.engines.runtime.overwrite import may_overwrite
from subquad.engines.runtime.shield import without_autocast


def one_token_gpu(call: Call) -> tuple[Tensor, Tensor]:
    """Decoding: one launch, in place where the state's owner allows it."""
    from subquad.engines.matrix.gpu import step

    given = (call.q, call.k, call.v, call.log_decay, *parts(call.erase), call.bonus, call.scale)
    if call.state is not None and may_overwrite(call.state):
        return step.step_(*given, call.state), call.state
    o, new = step.step(*given, call.state)
    return o, new


def chunked_gpu(call: Call) -> tuple[Tensor, Tensor]:
    from subquad.engines.matrix.gpu import scan

    given = (call.q, call.k, call.v, call.log_decay, call.bonus, call.scale)
    with no_autocast(call.q.device.type):
        o, final = scan.linear_recurrence(*given, call.state, call.cu_seqlens)
        return o.to(call.v.dtype), final


def one_token_cpu(call: Call) -> tuple[Tensor, Tensor]:
    """Decoding: plain float32 tensors as they are. Packed or not, a token is a row of its own."""
    from subquad.engines.matrix.cpu import step  # compiles, and imports numba, when first used

    result: tuple[Tensor, Tensor] = step.step(
        call.q, call.k, call.v, call.log_decay, *parts(call.erase), call.bonus, call.scale,
        _state(call, call.dtype), call.value_log_decay,
    )  # fmt: skip
    return result


def chunked_cpu(call: Call) -> tuple[Tensor, Tensor]:
    """Compiled chunks, in float32."""
    q, k, v = (x.to(call.dtype) for x in (call.q, call.k, call.v))
    gates = None if call.log_decay is None else call.log_decay.to(call.dtype)
    erase, state = _cast(call.erase, call.dtype), _state(call, call.dtype)
    if call.bonus is None:
        o, final = compiled.chunked(q, k, v, gates, erase, call.scale, state, call.cu_seqlens)
    else:

        def run(
            q: Tensor, k: Tensor, v: Tensor, gates: Tensor | None, bonus: Tensor, state: Tensor
        ) -> tuple[Tensor, Tensor]:
            given = (q, k, v, gates, bonus, call.scale, state, call.cu_seqlens)
            return compiled.chunked_with_bonus(*given)

        # Beside the compiled chunks it has products in PyTorch.
        inputs = (q, k, v, gates, call.bonus.to(call.dtype), state)
        o, final = without_autocast(run, inputs, q.device.type)
    return o.to(call.v.dtype), final


def loop(call: Call) -> tuple[Tensor, Tensor]:
    """The specification, in float64."""
    o, final = _in_torch(call, reference.loop, torch.float64)
    return o.to(call.v.dtype), final.to(call.dtype)


def recurrent_torch(call: Call) -> tuple[Tensor, Tensor]:
    """The same loop in the call's own precision."""
    o, final = _in_torch(call, reference.loop, call.dtype)
    return o.to(call.v.dtype), final


def chunked_torch(call: Call, chunk: int) -> tuple[Tensor, Tensor]:
    """Matrix products, `chunk` tokens at a time."""
    o, final = _in_torch(call, partial(forms.chunked, chunk=chunk), call.dtype)
    return o.to(call.v.dtype), final


def parallel_torch(call: Call, chunk: int) -> tuple[Tensor, Tensor]:
    """All pairs at once."""
    # Erasing then solves a T x T system that amplifies rounding (by 1000 at T = 1000 where nothing
    # is forgotten, measured), which chunks of 64 do not.
    dtype = call.dtype if call.erase is None else torch.float64
    o, final = _in_torch(call, partial(forms.chunked, chunk=chunk), dtype)
    return o.to(call.v.dtype), final.to(call.dtype)


def _in_torch(
    call: Call, form: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`form` of the call's arguments, all in one type, q scaled; no autocast, either way."""

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        value_log_decay: Tensor | None,
        beta: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        bonus: Tensor | None,
        state: Tensor,
    ) -> tuple[Tensor, Tensor]:
        given = (log_decay, value_log_decay, beta, a, b, bonus)
        log_decay, value_log_decay, beta, a, b, bonus = (
            x if x is None else x.to(dtype) for x in given
        )
        erase: Erase = None
        if beta is not None:
            erase = Delta(beta)
        elif a is not None and b is not None:
            erase = LowRank(a, b)
        return form(
            q=q.to(dtype) * call.scale,
            k=k.to(dtype),
            v=v.to(dtype),
            log_decay=log_decay,
            erase=erase,
            bonus=bonus,
            state=state.to(dtype),
            cu_seqlens=call.cu_seqlens,
            value_log_decay=value_log_decay,
        )

    gates = (call.log_decay, call.value_log_decay, *parts(call.erase), call.bonus)
    inputs = (call.q, call.k, call.v, *gates, _state(call, call.dtype))
    o, final = without_autocast(run, inputs, call.q.device.type)
    return o, final


def _state(call: Call, dtype: torch.dtype) -> Tensor:
    if call.state is None:
        return torch.zeros(call.state_shape, dtype=dtype, device=call.q.device)
    return call.state.to(dtype)


def _cast(erase: Erase, dtype: torch.dtype) -> Erase:
    if isinstance(erase, Delta):
        return Delta(erase.beta.to(dtype))
    if isinstance(erase, LowRank):
        return LowRank(erase.a.to(dtype), erase.b.to(dtype))
    return None
