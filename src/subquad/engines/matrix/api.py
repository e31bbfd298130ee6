"""`linear_recurrence`: check the arguments, choose how to compute, compute. `explain`: say so."""

from __future__ import annotations

from torch import Tensor

from subquad.backend.checks import are_checks_on
from subquad.engines.matrix.call import Call, recurrence_of
from subquad.engines.matrix.plan import Plan, make_plan
from subquad.engines.matrix.reference import Erase
from subquad.engines.matrix.values import check_values
from subquad.engines.runtime.explanation import Explanation, tell, watched
from subquad.engines.runtime.overrides import overridable


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
    value_log_decay: Tensor | None = None,
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

        value_log_decay: a decay along values, beside the other or alone: [H,V] fixed, [B,T,H,V] a
            number a value channel and token. S_t = d_t * S_{t-1} diag(e^value_log_decay_t) + ...
            Not with `erase` or `bonus`.

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
    call = Call.checked(q, k, v, log_decay, erase, bonus, scale, state, cu_seqlens, value_log_decay)
    if are_checks_on():
        check_values(call)
    plan = make_plan(call, form, impl)
    if watched():
        tell(explanation_of(call, plan))
    return plan.run(call)


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
    value_log_decay: Tensor | None = None,
) -> Explanation:
    """What `linear_recurrence` would do with these arguments, where, and why. Prints as a page.

    Nothing is computed, so tensors on the "meta" device do. Raises what the call would raise.
    """
    call = Call.checked(q, k, v, log_decay, erase, bonus, scale, state, cu_seqlens, value_log_decay)
    return explanation_of(call, make_plan(call, form, impl))


_NOTES = {
    "delta": "stable only where beta |k|^2 <= 2: give keys norm 1 (subquad.checks(True) looks)",
    "low_rank": "nothing keeps it stable but a and b",
}


def explanation_of(call: Call, plan: Plan) -> Explanation:
    """The plan in words."""
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
        note=_NOTES.get(kind.erase, ""),
        flops_per_token=kind.flops_per_token(H, K, V, plan.form, plan.chunk, call.q.shape[1]),
    )
