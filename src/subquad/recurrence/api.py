"""`linear_recurrence`: check the arguments, choose how to compute, compute. `explain`: say so."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from subquad.recurrence import compiled, forms, reference
from subquad.recurrence.eager import can_call_compiled_code
from subquad.recurrence.explanation import Explanation, tell, watched
from subquad.recurrence.gpu import can_call_kernels, may_overwrite, records_gradient
from subquad.recurrence.overrides import overridable
from subquad.recurrence.reference import Delta, Erase, LowRank, parts
from subquad.recurrence.spec import FORMS, Recurrence
from subquad.recurrence.validate import (
    check_cu_seqlens,
    check_shape,
    check_tensor,
    choose,
    fail,
)

IMPLS = ("reference", "torch", "numba", "triton")
_NUMBERS = (int, float)  # not a union: torch.compile before 2.7 cannot see through that
CHUNK = 64  # on the CPU neither 32 nor 128 is better for all decays, at heads of 64 to 384


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
    """The matrix recurrence: keep a state S [K,V] a head, decay it, (erase,) write, read.

    What kind of recurrence it is, is read from the tensors given. With d_t = exp(log_decay_t):

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
            [H] or [H,K]: fixed; [B,T,H]: a number a head and token; [B,T,H,K]: a number a key
            channel and token. Any floating dtype; float32 is wise.
        erase: None, `Delta(beta)` with beta [B,T,H], or `LowRank(a, b)` with both [B,T,H,K].
        bonus: [H,K], RWKV-5/6's `u`; not with `erase`.
        scale: of the read; None means K**-0.5.
        state: [B,H,K,V] float32 (float64 for float64 inputs), [N,H,K,V] when packed. None: zeros.
        cu_seqlens: [N+1] int32 or int64, the boundaries 0 = c_0 < ... < c_N = T of N sequences laid
            end to end in one row (B = 1). Each has its own state and none sees another.
        form: "recurrent" (token by token), "chunked", "parallel" (all pairs, quadratic; not for
            packed sequences) or "auto". All give the same result.
        impl: "reference" (the recurrent form in float64, the specification), "torch", "numba" (on
            the CPU: chunks without an erase, or with a Delta and at most a decay a head; and one
            token without gradients, for decoding), "triton" (on a GPU) or "auto".
            One token without gradients has a GPU kernel of its own, also with `erase`.

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
    _check(q, k, v, log_decay, erase, bonus, scale, state, cu_seqlens)
    plan = _plan(q, k, v, log_decay, erase, bonus, state, cu_seqlens, form, impl)
    if watched():
        tell(_explain(plan, q, v, log_decay, erase, bonus, cu_seqlens))
    if plan.form == "recurrent" and plan.impl == "triton":
        return _one_token_gpu(q, k, v, log_decay, erase, bonus, scale, state)
    if plan.impl == "numba" and plan.form == "recurrent":
        return _one_token(q, k, v, log_decay, erase, bonus, scale, state, cu_seqlens)
    with _no_autocast(q.device.type):
        return _run(plan, q, k, v, log_decay, erase, bonus, scale, state, cu_seqlens)


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
    _check(q, k, v, log_decay, erase, bonus, scale, state, cu_seqlens)
    plan = _plan(q, k, v, log_decay, erase, bonus, state, cu_seqlens, form, impl)
    return _explain(plan, q, v, log_decay, erase, bonus, cu_seqlens)


def _explain(
    plan: _Plan,
    q: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    erase: Erase,
    bonus: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Explanation:
    kind = Recurrence.of(log_decay, erase, bonus)
    H, K, V = v.shape[2], q.shape[3], v.shape[3]
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return Explanation(
        recurrence=kind.write,
        read=kind.read,
        form=plan.form,
        impl=plan.impl,
        chunk=plan.chunk if plan.form == "chunked" else None,
        device=str(q.device),
        why=plan.why,
        forms=kind.forms,
        state_shape=(rows, *kind.state_shape(H, K, V)),
        state_bytes=rows * H * K * V * _computing_dtype(q.dtype).itemsize,
        flops_per_token=kind.flops_per_token(H, K, V, plan.form, plan.chunk, q.shape[1]),
    )


@dataclass(frozen=True)
class _Plan:
    form: str
    impl: str
    chunk: int
    why: str


def _plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    erase: Erase,
    bonus: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    form: str,
    impl: str,
) -> _Plan:
    """Which form and implementation run. Looks at shapes and devices only."""
    choose("form", form, ("auto", *FORMS["matrix"]))
    choose("impl", impl, ("auto", *IMPLS))
    T = q.shape[1]
    if T == 1 and q.is_cuda and impl in ("auto", "triton") and form in ("auto", "recurrent"):
        given = (q, v, k, log_decay, *_tensors(erase), bonus, state)
        if can_call_kernels(given) and not records_gradient(given):
            from subquad.kernels import matrix_step

            if matrix_step.supported(q, *given[1:]) is None:
                why = matrix_step.describe(q, v, log_decay, len(_tensors(erase)))
                return _Plan("recurrent", "triton", 1, why)
    if impl == "triton" or (impl == "auto" and q.is_cuda and form in ("auto", "chunked")):
        # Asked only where it may run: the module imports nothing of Triton, but costs a little.
        from subquad.kernels import matrix

        reason = "no GPU kernel erases yet" if erase is not None else None
        if form not in ("auto", "chunked"):
            reason = f"the GPU kernels compute the chunked form, not form={form!r}"
        reason = reason or matrix.supported(q, k, v, log_decay, bonus, None, state, cu_seqlens)
        if reason is None:
            gate = matrix.gate_kind(log_decay)
            chunk = matrix.choose_tiles(q.shape[-1], v.shape[-1], v.dtype, gate, False).chunk
            return _Plan("chunked", "triton", chunk, matrix.describe(q, k, v, log_decay))
        if impl == "triton":
            raise fail("impl", "'triton'", f"'auto' or 'torch': {reason}", "use impl='auto'")
    if impl == "reference":
        if form not in ("auto", "recurrent"):
            raise fail(
                "form", repr(form), "'recurrent' with impl='reference'", "use impl='torch' for it"
            )
        return _Plan("recurrent", "reference", 1, "the reference is the recurrent form in float64")
    if impl == "numba" or (impl == "auto" and form in ("auto", "recurrent") and T == 1):
        given = (q, k, v, log_decay, *_tensors(erase), bonus, state)
        plain = T == 1 and can_call_compiled_code(x for x in given if x is not None)
        if plain and form in ("auto", "recurrent"):
            why = "one token and no gradient: one pass over the state in compiled code"
            return _Plan("recurrent", "numba", 1, why)
    if impl == "numba" or (impl == "auto" and (form == "chunked" or (form == "auto" and T > 1))):
        reason = compiled.why_not(q, v, log_decay, erase, bonus)
        if reason is None and form in ("auto", "chunked"):
            why = "compiled code walks over the chunks, their state in cache"
            return _Plan("chunked", "numba", compiled.CHUNK, why)
        if impl == "numba":
            got = f"'numba' with form={form!r}, T = {T}, {q.dtype} on {q.device}"
            only = "form 'chunked', or one float32 token on the CPU without gradients"
            raise fail("impl", got, f"{only}: {reason}" if reason else only, "use impl='auto'")
    if form == "parallel" and cu_seqlens is not None:
        raise fail(
            "form", "'parallel' with cu_seqlens", "'chunked' or 'recurrent'", "use form='chunked'"
        )
    sequences = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    longest = _power_of_two(-(-T // sequences))
    if form == "auto" and T == 1:
        return _Plan("recurrent", "torch", 1, "one token: one step of the recurrence")
    if form == "recurrent":
        return _Plan("recurrent", "torch", 1, "asked for")
    if form == "parallel":
        return _Plan("parallel", "torch", _power_of_two(T), "asked for")
    why = "asked for" if form == "chunked" else f"{T} tokens: chunks turn the loop into products"
    return _Plan("chunked", "torch", min(CHUNK, longest), why)


def _run(
    plan: _Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    erase: Erase,
    bonus: Tensor | None,
    scale: float | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if plan.impl == "triton":
        from subquad.kernels import matrix

        o, final = matrix.linear_recurrence(q, k, v, log_decay, bonus, scale, state, cu_seqlens)
        return o.to(v.dtype), final
    kept = _computing_dtype(v.dtype)
    # Erasing with all pairs at once solves a T x T system that amplifies rounding (by 1000 at
    # T = 1000 where nothing is forgotten, measured); chunks of 64 do not.
    exact = plan.impl == "reference" or (plan.form == "parallel" and erase is not None)
    dtype = torch.float64 if exact else kept
    if state is None:
        rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        shape = (rows, v.shape[2], q.shape[3], v.shape[3])
        state = torch.zeros(shape, dtype=dtype, device=q.device)
    if isinstance(erase, Delta):
        erase = Delta(erase.beta.to(dtype))
    elif isinstance(erase, LowRank):
        erase = LowRank(erase.a.to(dtype), erase.b.to(dtype))
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    if plan.impl == "numba":
        gates = None if log_decay is None else log_decay.to(dtype)
        given = (q.to(dtype), k.to(dtype), v.to(dtype), gates, erase, scale, state, cu_seqlens)
        o, final = compiled.chunked(*given)
        return o.to(v.dtype), final
    arguments = (
        q.to(dtype) * scale,
        k.to(dtype),
        v.to(dtype),
        None if log_decay is None else log_decay.to(dtype),
        erase,
        None if bonus is None else bonus.to(dtype),
        state.to(dtype),
        cu_seqlens,
    )
    if plan.form == "recurrent":
        o, final = reference.loop(*arguments)
    else:
        o, final = forms.chunked(*arguments, plan.chunk)
    return o.to(v.dtype), final.to(kept)


def _one_token_gpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    erase: Erase,
    bonus: Tensor | None,
    scale: float | None,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Decoding: one launch, in place where the state's owner allows it."""
    from subquad.kernels import matrix_step

    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    given = (q, k, v, log_decay, *parts(erase), bonus, scale, state)
    if state is not None and may_overwrite(state):
        return matrix_step.step_(*given), state
    o, new = matrix_step.step(*given)
    return o, new


def _one_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    erase: Erase,
    bonus: Tensor | None,
    scale: float | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Decoding: plain float32 tensors as they are. Packed or not, a token is a row of its own."""
    from subquad.kernels import matrix_step_cpu  # compiles, and imports numba, when first used

    if state is None:
        state = torch.zeros(q.shape[0], v.shape[2], q.shape[3], v.shape[3])
    if scale is None:
        scale = q.shape[3] ** -0.5
    result: tuple[Tensor, Tensor] = matrix_step_cpu.step(
        q, k, v, log_decay, *parts(erase), bonus, scale, state
    )
    return result


def _tensors(erase: Erase) -> tuple[Tensor, ...]:
    """Those of an erase."""
    return tuple(x for x in parts(erase) if x is not None)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    erase: Erase,
    bonus: Tensor | None,
    scale: float | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    check_tensor("q", q, 4, "[B,T,Hk,K]")
    check_tensor("k", k, 4, "[B,T,Hk,K]", q)
    check_tensor("v", v, 4, "[B,T,H,V]", q)
    B, T, Hk, K = q.shape
    H, V = v.shape[2:]
    if 0 in q.shape or 0 in v.shape:
        empty = "q" if 0 in q.shape else "v"
        raise fail(
            empty,
            f"shape {tuple({'q': q, 'v': v}[empty].shape)}",
            "no empty dimension",
            "drop the call",
        )
    check_shape("k", k, (B, T, Hk, K), "the shape of q, [B,T,Hk,K]")
    check_shape("v", v, (B, T, H, V), "[B,T,H,V] with q's B and T")
    if H % Hk:
        raise fail("v", f"{H} heads", f"a multiple of the {Hk} key heads", "change H or Hk")
    if not q.dtype == k.dtype == v.dtype and not torch.is_autocast_enabled(q.device.type):
        raise fail("q, k, v", f"{q.dtype}, {k.dtype}, {v.dtype}", "one dtype", "cast them to one")

    if log_decay is not None:
        shapes = {1: (H,), 2: (H, K), 3: (B, T, H), 4: (B, T, H, K)}
        layout = "[H], [H,K], [B,T,H] or [B,T,H,K]"
        if isinstance(log_decay, Tensor) and log_decay.ndim not in shapes:
            raise fail("log_decay", f"shape {tuple(log_decay.shape)}", layout, "reshape it")
        ndim = log_decay.ndim if isinstance(log_decay, Tensor) else 4
        check_tensor("log_decay", log_decay, ndim, layout, q)
        check_shape("log_decay", log_decay, shapes[ndim], layout)
    if isinstance(erase, Delta):
        check_tensor("erase.beta", erase.beta, 3, "[B,T,H]", q)
        check_shape("erase.beta", erase.beta, (B, T, H), "[B,T,H]")
    elif isinstance(erase, LowRank):
        for name, x in (("erase.a", erase.a), ("erase.b", erase.b)):
            check_tensor(name, x, 4, "[B,T,H,K]", q)
            check_shape(name, x, (B, T, H, K), "[B,T,H,K]")
    elif erase is not None:
        raise fail(
            "erase", type(erase).__name__, "None, Delta(beta) or LowRank(a, b)", "wrap the tensors"
        )
    if bonus is not None:
        if erase is not None:
            raise fail(
                "bonus", "a bonus and an erase", "one of them", "pass bonus=None or erase=None"
            )
        check_tensor("bonus", bonus, 2, "[H,K]", q)
        check_shape("bonus", bonus, (H, K), "[H,K]")
    if scale is not None and not (isinstance(scale, _NUMBERS) and math.isfinite(scale)):
        raise fail("scale", repr(scale), "a finite number, or None for K**-0.5", "pass a float")
    rows, layout = B, "[B,H,K,V]"
    if cu_seqlens is not None:
        rows, layout = check_cu_seqlens(cu_seqlens, T, B, q), "[N,H,K,V]"
    if state is not None:
        check_tensor("state", state, 4, layout, q)
        check_shape("state", state, (rows, H, K, V), layout)
        if state.dtype != _computing_dtype(v.dtype):
            raise fail(
                "state",
                state.dtype,
                f"{_computing_dtype(v.dtype)}: it adds up over all tokens",
                "cast it",
            )


def _computing_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _power_of_two(n: int) -> int:
    """The smallest power of two >= n."""
    return 1 << (n - 1).bit_length()


def _no_autocast(device_type: str) -> torch.autocast | nullcontext[None]:
    """Decays and states lose their meaning in bfloat16: leave autocast for the call."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
