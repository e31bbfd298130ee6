"""Which form and implementation of the matrix recurrence run, and why.

The fastest is asked first: each says what it would do, or why it cannot take the call. That depends
on shapes, dtypes, devices and autograd's state, never on values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from subquad.engines.matrix import run
from subquad.engines.matrix.call import Call
from subquad.engines.matrix.cpu import chunked as compiled
from subquad.engines.matrix.reference import parts
from subquad.engines.runtime.eager import can_call_compiled_code, can_call_operators
from subquad.engines.runtime.overwrite import can_call_kernels, records_gradient
from subquad.errors import choose, fail
from subquad.table.spec import FORMS

IMPLS = ("reference", "torch", "numba", "triton")
CHUNK = 64  # on the CPU neither 32 nor 128 is better for all decays, at heads of 64 to 384


@dataclass(frozen=True)
class Plan:
    """What runs: `run(call)`; the rest says it in words.

    `chunk`: how many tokens meet at once. `reason`: a text, or what makes it when asked.
    """

    form: str
    impl: str
    chunk: int
    reason: str | Callable[[], str]
    run: Callable[[Call], tuple[Tensor, Tensor]]

    @property
    def why(self) -> str:
        return self.reason if isinstance(self.reason, str) else self.reason()


def make_plan(call: Call, form: str, impl: str) -> Plan:
    """For a checked call. ValueError for a form or an implementation that does not exist for it."""
    choose("form", form, ("auto", *FORMS["matrix"]))
    choose("impl", impl, ("auto", *IMPLS))
    if impl == "reference":
        return _reference(form)
    plan = None
    if impl in ("auto", "triton"):
        plan = _triton(call, form, must=impl == "triton")
    if plan is None and impl in ("auto", "numba"):
        plan = _numba(call, form, must=impl == "numba")
    return plan or _torch(call, form)


def _reference(form: str) -> Plan:
    if form not in ("auto", "recurrent"):
        fix = "use impl='torch' for it"
        raise fail("form", repr(form), "'recurrent' with impl='reference'", fix)
    return Plan("recurrent", "reference", 1, "the loop in float64: the specification", run.loop)


def _triton(call: Call, form: str, must: bool) -> Plan | None:
    """On a GPU. Kernels' modules import nothing of Triton, but even so wait until they may run."""
    if not (must or call.q.is_cuda):
        return None
    q, k, v, log_decay = call.q, call.k, call.v, call.log_decay
    along_values = call.value_log_decay is not None
    one_token = q.shape[1] == 1 and form in ("auto", "recurrent") and not along_values
    if one_token and _is_plain_on_gpu(call):
        from subquad.engines.matrix.gpu import step as matrix_step

        erased = [x for x in parts(call.erase) if x is not None]
        given = (v, k, log_decay, *erased, call.bonus, call.state)
        if matrix_step.supported(q, *given) is None:
            why = partial(matrix_step.describe, q, v, log_decay, len(erased))
            return Plan("recurrent", "triton", 1, why, run.one_token_gpu)
    if not must and form not in ("auto", "chunked"):
        return None
    from subquad.engines.matrix.gpu import layout
    from subquad.engines.matrix.gpu import scan as matrix

    reason = "no GPU kernel erases yet" if call.erase is not None else None
    if call.value_log_decay is not None:
        reason = "no GPU kernel decays along values yet"
    if not can_call_operators():
        reason = "the GPU kernels know neither forward derivatives nor vmap"
    if form not in ("auto", "chunked"):
        reason = f"the GPU kernels compute the chunked form, not form={form!r}"
    reason = reason or matrix.supported(q, k, v, log_decay, call.bonus, call.state, call.cu_seqlens)
    if reason is None:
        gate = layout.gate_kind(log_decay)
        chunk = layout.choose_tiles(q.shape[-1], v.shape[-1], v.dtype, gate, False).chunk
        why = partial(matrix.describe, q, k, v, log_decay, call.bonus, call.cu_seqlens)
        return Plan("chunked", "triton", chunk, why, run.chunked_gpu)
    if must:
        raise fail("impl", "'triton'", f"'auto' or 'torch': {reason}", "use impl='auto'")
    return None


def _is_plain_on_gpu(call: Call) -> bool:
    tensors = call.tensors
    return can_call_kernels(tensors) and not records_gradient(tensors)


def _numba(call: Call, form: str, must: bool) -> Plan | None:
    """Compiled code, on the CPU."""
    one_token = call.q.shape[1] == 1
    if one_token and form in ("auto", "recurrent") and can_call_compiled_code(call.tensors):
        why = "one token and no gradient: one pass over the state in compiled code"
        return Plan("recurrent", "numba", 1, why, run.one_token_cpu)
    reason = None
    if form == "chunked" or (form == "auto" and (must or not one_token)):
        reason = compiled.why_not(call.q, call.v, call.erase)
        if call.value_log_decay is not None:
            reason = "compiled chunks do not decay along values"
        if reason is None:
            why = "compiled code walks over the chunks, their state in cache"
            return Plan("chunked", "numba", compiled.CHUNK, why, run.chunked_cpu)
    if must:
        got = (
            f"'numba' with form={form!r}, T = {call.q.shape[1]}, {call.q.dtype} on {call.q.device}"
        )
        only = "form 'chunked', or one float32 token on the CPU without gradients"
        raise fail("impl", got, f"{only}: {reason}" if reason else only, "use impl='auto'")
    return None


def _torch(call: Call, form: str) -> Plan:
    """On any device."""
    T = call.q.shape[1]
    if form == "parallel":
        if call.cu_seqlens is not None:
            expected = "'chunked' or 'recurrent'"
            raise fail("form", "'parallel' with cu_seqlens", expected, "use form='chunked'")
        chunk = _power_of_two(T)
        return Plan(form, "torch", chunk, "asked for", partial(run.parallel_torch, chunk=chunk))
    if form == "recurrent":
        return Plan("recurrent", "torch", 1, "asked for", run.recurrent_torch)
    if form == "auto" and T == 1:
        why = "one token: one step of the recurrence"
        return Plan("recurrent", "torch", 1, why, run.recurrent_torch)
    longest = _power_of_two(-(-T // call.rows))  # on average, at least, where they are packed
    why = "asked for" if form == "chunked" else f"{T} tokens: chunks turn the loop into products"
    chunk = min(CHUNK, longest)
    return Plan("chunked", "torch", chunk, why, partial(run.chunked_torch, chunk=chunk))


def _power_of_two(n: int) -> int:
    """The smallest power of two >= n."""
    return 1 << (n - 1).bit_length()
