"""`linear_recurrence`: check the arguments, choose how to compute, compute. `explain`: say so."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.engines.matrix import forms, reference
from subquad.engines.matrix.call import Call, recurrence_of
from subquad.engines.matrix.cpu import chunked as compiled
from subquad.engines.matrix.plan import Plan, make_plan
from subquad.engines.matrix.reference import Delta, Erase, LowRank, parts
from subquad.engines.runtime.autocast import no_autocast
from subquad.engines.runtime.explanation import Explanation, tell, watched
from subquad.engines.runtime.overrides import overridable
from subquad.engines.runtime.overwrite import may_overwrite


@overridable
def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    erase: Erase = None,
    bonus: Tensor | None = None,
    scale: float | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    form: str = "auto",
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The matrix recurrence: each head keeps a state S [K,V], decays it, (erases,) writes, reads.

    Which recurrence it is follows from the tensors' shapes. With d_t = exp(log_decay_t):

        no erase        S_t = d_t * S_{t-1} + k_t v_t^T
        Delta(beta)     S' = d_t * S_{t-1};  S_t = S' + beta_t k_t (v_t - S'^T k_t)^T
        LowRank(a, b)   S_t = d_t * S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T
        read            o_t = scale * S_t^T q_t
        with bonus u    o_t = scale * (S_{t-1} + (u * k_t) v_t^T)^T q_t

    Legend: B batch, T tokens, H heads, Hk key heads (H a multiple of Hk: head h uses key head
    h // (H / Hk); keys are never expanded), K key size, V value size, N packed sequences.

    Args:
        q, k: [B,T,Hk,K], of one dtype with v.
        v: [B,T,H,V].
        log_decay: natural logarithm of the decay, <= 0 (0 keeps, -inf forgets all). None: no decay;
            [H] or [H,K]: fixed; [B,T,H]: one for each head and token; [B,T,H,K]: one for each key
            channel and token. Any floating dtype; prefer float32.
        erase: None, `Delta(beta)` with beta [B,T,H], or `LowRank(a, b)` with both [B,T,H,K].
        bonus: [H,K], RWKV-5/6's `u`; not with `erase`.
        scale: of the read; None means K**-0.5.
        state: [B,H,K,V] float32 (float64 for float64 inputs), [N,H,K,V] when packed. None: zeros.
        cu_seqlens: [N+1] int32 or int64, the boundaries 0 = c_0 < ... < c_N = T of N sequences laid
            end to end (B = 1). Each has its own state and none sees another. Their values are
            checked on the CPU only: on a GPU wrong ones silently give wrong results.
        form: "recurrent" (token by token), "chunked", "parallel" (all pairs, quadratic; not for
            packed sequences) or "auto". All give the same result.
        impl: "reference" (the recurrent form in float64, the specification), "torch", "numba" (on
            the CPU: chunks, but no LowRank; and one token without gradients, for decoding),
            "triton" (on a GPU) or "auto". One token without gradients has a GPU kernel of its own,
            also with `erase`.

    Returns:
        o [B,T,H,V] in v's dtype, and the final state, like `state`. Both are differentiable. The
        computation is in float32 for float16/bfloat16/float32 inputs, whatever autocast says. The
        GPU kernels take the operands of products in bfloat16 where the inputs are. "triton"
        has first derivatives only; "torch" has all, and "numba" takes those of "torch" where
        gradients are themselves differentiated.

    Raises:
        ValueError: what is wrong, what was expected and the fix, by the argument's name.

    Sources: fast weights and the delta rule, Schlag et al. 2021 (arXiv:2102.11174); decays and the
    chunked form, Yang et al. 2024 (GLA, arXiv:2312.06635); delta rule in chunks, Yang et al. 2024
    (arXiv:2406.06484); bonus, Peng et al. 2024 (RWKV-5/6, arXiv:2404.05892).
    """
    call = Call(q, k, v, log_decay, erase, bonus, scale, state, cu_seqlens)
    call.check()
    plan = make_plan(call, form, impl)
    if watched():
        tell(_explain(call, plan))
    return _run(call, plan)


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    erase: Erase = None,
    bonus: Tensor | None = None,
    scale: float | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    form: str = "auto",
    impl: str = "auto",
) -> Explanation:
    """What `linear_recurrence` would do with these arguments, where, and why. Prints as a page.

    Nothing is computed, so tensors on the "meta" device do. Raises what the call would raise.
    """
    call = Call(q, k, v, log_decay, erase, bonus, scale, state, cu_seqlens)
    call.check()
    return _explain(call, make_plan(call, form, impl))


def _explain(call: Call, plan: Plan) -> Explanation:
    kind = recurrence_of(call)
    N, H, K, V = call.state_shape
    return Explanation(
        recurrence=kind.write,
        read=kind.read,
        form=plan.form,
        impl=plan.impl,
        chunk=plan.chunk if plan.form == "chunked" else None,
        device=str(call.q.device),
        why=plan.why,
        forms=kind.forms,
        state_shape=(N, *kind.state_shape(H, K, V)),
        state_bytes=N * H * K * V * call.dtype.itemsize,
        flops_per_token=kind.flops_per_token(H, K, V, plan.form, plan.chunk, call.q.shape[1]),
    )


def _run(call: Call, plan: Plan) -> tuple[Tensor, Tensor]:
    if plan.impl == "triton":
        return _one_token_gpu(call) if plan.form == "recurrent" else _chunked_gpu(call)
    if plan.impl == "numba" and plan.form == "recurrent":
        return _one_token(call)
    with no_autocast(call.q.device.type):
        return _chunked_cpu(call) if plan.impl == "numba" else _in_torch(call, plan)


def _one_token_gpu(call: Call) -> tuple[Tensor, Tensor]:
    """Decoding: one launch, in place where the state's owner allows it."""
    from subquad.engines.matrix.gpu import step as matrix_step

    given = (call.q, call.k, call.v, call.log_decay, *parts(call.erase), call.bonus, call.factor)
    if call.state is not None and may_overwrite(call.state):
        return matrix_step.step_(*given, call.state), call.state
    o, new = matrix_step.step(*given, call.state)
    return o, new


def _chunked_gpu(call: Call) -> tuple[Tensor, Tensor]:
    from subquad.engines.matrix.gpu import scan as matrix

    given = (call.q, call.k, call.v, call.log_decay, call.bonus, call.scale)
    with no_autocast(call.q.device.type):
        o, final = matrix.linear_recurrence(*given, call.state, call.cu_seqlens)
        return o.to(call.v.dtype), final


def _one_token(call: Call) -> tuple[Tensor, Tensor]:
    """Decoding: plain float32 tensors as they are. Packed or not, each token is a sequence."""
    from subquad.engines.matrix.cpu import (
        step as matrix_step_cpu,  # compiles, and imports numba, when first used
    )

    result: tuple[Tensor, Tensor] = matrix_step_cpu.step(
        call.q, call.k, call.v, call.log_decay, *parts(call.erase), call.bonus, call.factor,
        _state(call, call.dtype),
    )  # fmt: skip
    return result


def _chunked_cpu(call: Call) -> tuple[Tensor, Tensor]:
    """Compiled chunks, in float32."""
    q, k, v = (x.to(call.dtype) for x in (call.q, call.k, call.v))
    gates = None if call.log_decay is None else call.log_decay.to(call.dtype)
    erase, state = _cast(call.erase, call.dtype), _state(call, call.dtype)
    if call.bonus is None:
        o, final = compiled.chunked(q, k, v, gates, erase, call.factor, state, call.cu_seqlens)
    else:
        bonus = call.bonus.to(call.dtype)
        given = (q, k, v, gates, bonus, call.factor, state, call.cu_seqlens)
        o, final = compiled.chunked_with_bonus(*given)
    return o.to(call.v.dtype), final


def _in_torch(call: Call, plan: Plan) -> tuple[Tensor, Tensor]:
    # Erasing with all pairs at once solves a T x T system that amplifies rounding (by 1000 at
    # T = 1000 where nothing is forgotten, measured); chunks of 64 do not.
    exact = plan.impl == "reference" or (plan.form == "parallel" and call.erase is not None)
    dtype = torch.float64 if exact else call.dtype
    arguments = (
        call.q.to(dtype) * call.factor,
        call.k.to(dtype),
        call.v.to(dtype),
        None if call.log_decay is None else call.log_decay.to(dtype),
        _cast(call.erase, dtype),
        None if call.bonus is None else call.bonus.to(dtype),
        _state(call, dtype),
        call.cu_seqlens,
    )
    if plan.form == "recurrent":
        o, final = reference.loop(*arguments)
    else:
        o, final = forms.chunked(*arguments, plan.chunk)
    return o.to(call.v.dtype), final.to(call.dtype)


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
