"""How a plan is carried out: a call's arguments, cast and handed to what computes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from subquad.engines.matrix import forms, reference
from subquad.engines.matrix.call import Call
from subquad.engines.matrix.cpu import chunked as compiled
from subquad.engines.matrix.reference import Delta, Erase, LowRank, parts
from subquad.engines.runtime.autocast import no_autocast
from subquad.engines.runtime.overwrite import may_overwrite


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
        bonus = call.bonus.to(call.dtype)
        given = (q, k, v, gates, bonus, call.scale, state, call.cu_seqlens)
        o, final = compiled.chunked_with_bonus(*given)
    return o.to(call.v.dtype), final


def loop(call: Call) -> tuple[Tensor, Tensor]:
    """The specification, in float64."""
    with no_autocast(call.q.device.type):
        o, final = reference.loop(**_arguments(call, torch.float64))
    return o.to(call.v.dtype), final.to(call.dtype)


def recurrent_torch(call: Call) -> tuple[Tensor, Tensor]:
    """The same loop in the call's own precision."""
    with no_autocast(call.q.device.type):
        o, final = reference.loop(**_arguments(call, call.dtype))
    return o.to(call.v.dtype), final


def chunked_torch(call: Call, chunk: int) -> tuple[Tensor, Tensor]:
    """Matrix products, `chunk` tokens at a time."""
    with no_autocast(call.q.device.type):
        o, final = forms.chunked(**_arguments(call, call.dtype), chunk=chunk)
    return o.to(call.v.dtype), final


def parallel_torch(call: Call, chunk: int) -> tuple[Tensor, Tensor]:
    """All pairs at once."""
    # Erasing then solves a T x T system that amplifies rounding (by 1000 at T = 1000 where nothing
    # is forgotten, measured), which chunks of 64 do not.
    dtype = call.dtype if call.erase is None else torch.float64
    with no_autocast(call.q.device.type):
        o, final = forms.chunked(**_arguments(call, dtype), chunk=chunk)
    return o.to(call.v.dtype), final.to(call.dtype)


def _arguments(call: Call, dtype: torch.dtype) -> dict[str, Any]:
    """What the loop and the chunked form take, all in one type, q scaled."""
    along_values = call.value_log_decay
    return {
        "q": call.q.to(dtype) * call.scale,
        "k": call.k.to(dtype),
        "v": call.v.to(dtype),
        "log_decay": None if call.log_decay is None else call.log_decay.to(dtype),
        "erase": _cast(call.erase, dtype),
        "bonus": None if call.bonus is None else call.bonus.to(dtype),
        "state": _state(call, dtype),
        "cu_seqlens": call.cu_seqlens,
        "value_log_decay": None if along_values is None else along_values.to(dtype),
    }


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
