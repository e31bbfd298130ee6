"""The selective scan: a diagonal recurrence whose step size, input and output depend on the token.

Bt batch   T time   D channels   N state numbers a channel   S sequences (of the batch, or packed)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from subquad.backend.gpu.tensors import triton_missing
from subquad.engines.runtime.eager import can_call_compiled_code, can_call_operators
from subquad.engines.runtime.explanation import Explanation, tell, watched
from subquad.engines.runtime.overrides import overridable
from subquad.engines.runtime.validation import (
    check_cu_seqlens,
    check_shape,
    check_state,
    check_tensor,
)
from subquad.engines.selective import operator as scan_operator
from subquad.engines.selective import pytorch as scan
from subquad.engines.selective import reference as diagonal_reference
from subquad.errors import choose, fail
from subquad.table.spec import Recurrence

GPU_STATES = 256  # N up to which a channel's tile of the GPU kernel is of a sensible size
# How each form is computed, best first: "numba" walks over the tokens in compiled CPU code.
FORMS = {"recurrent": ("numba", "reference"), "scan": ("triton", "torch")}
IMPLS = ("reference", "torch", "numba", "triton")


@overridable
def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    form: str = "auto",
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Mamba's recurrence (Gu and Dao 2023, section 3.3, algorithm 2; the B-bar = dt B of its code).

        h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t        y_t = C_t . h_t + D x_t

    Args:
        x: [Bt,T,D], T >= 1.
        dt: [Bt,T,D], the step sizes, positive (after the softplus).
        A: [D,N], negative.
        B, C: [Bt,T,N], shared by all channels.
        D: [D], a skip from x; None means none.
        state: [S,D,N] float32 (float64 if x is), h before the first token; None means zeros.
        cu_seqlens: [S+1] int, the bounds of S sequences packed in x (then Bt is 1).
        form: "recurrent" (token by token), "scan" (parallel within chunks) or "auto".
        impl: "reference" (recurrent), "numba" (recurrent, float32 on the CPU), "triton" (scan,
            float32 on a GPU), "torch" (scan, any device) or "auto". One token is one step:
            compiled on the CPU where no gradient is recorded, in PyTorch elsewhere.

    Returns:
        y [Bt,T,D] in x's dtype and the last h [S,D,N] in float32 (float64 if x is float64), as is
        all arithmetic. Gradients flow through both and into `state`.

    Raises:
        ValueError: naming the argument that does not fit, and the fix.
    """
    S = _check(x, dt, A, B, C, D, state, cu_seqlens)
    impl = _choose_impl(form, impl, x, A.shape[1])
    precise = torch.float64 if x.dtype == torch.float64 else torch.float32
    if D is None:
        D = x.new_zeros(x.shape[2])
    if state is None:
        state = torch.zeros(S, *A.shape, dtype=precise, device=x.device)
    inputs: Any = tuple(
        t if t.dtype == precise else t.to(precise) for t in (x, dt, A, B, C, D, state)
    )
    one_token = x.shape[1] == 1 and impl != "reference"
    if one_token:
        impl = "numba" if can_call_compiled_code(inputs) else "torch"
    if watched():
        tell(_explain(impl, x, A, S))
    if impl == "reference":
        y, last_state = diagonal_reference.loop(*(*inputs, cu_seqlens))
    elif one_token:
        y, last_state = _one_token(impl, *inputs)
    elif not can_call_operators():
        y, last_state, _ = scan.forward(*(*inputs, cu_seqlens, False))
    else:
        y, last_state = scan_operator.selective_scan(*(*inputs, cu_seqlens, impl))
    return y.to(x.dtype), last_state


def explain_token(x: Tensor, A: Tensor) -> Explanation:
    """What `selective_scan` does with one float32 token x [Bt,1,D] on the CPU."""
    return _explain("numba", x, A, x.shape[0])


def _explain(impl: str, x: Tensor, A: Tensor, S: int) -> Explanation:
    kind = Recurrence("selective", "token_element")
    why = {
        "numba": "float32 on the CPU: one compiled pass over the tokens",
        "triton": "float32 on a GPU: the scan in Triton kernels",
        "torch": "a parallel scan within chunks, in PyTorch operations",
        "reference": "the loop over tokens, as asked for",
    }
    if impl == "torch" and x.shape[1] == 1:
        form, why = "recurrent", {impl: "one token: one step, in PyTorch operations"}
    else:
        form = "scan" if impl in FORMS["scan"] else "recurrent"
    D, N = A.shape
    return Explanation(
        recurrence=kind.write,
        read=kind.read,
        form=form,
        impl=impl,
        chunk=None,
        device=str(x.device),
        why=why[impl],
        forms=kind.forms,
        state_shape=(S, D, N),
        state_bytes=S * D * N * (8 if x.dtype == torch.float64 else 4),
        flops_per_token=D * (7 * N + 2),  # exp(dt A) counted as one, h, C.h, and the skip
    )


def _one_token(
    impl: str, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Decoding: one step, in compiled code or in PyTorch."""
    if impl == "numba":
        from subquad.engines.selective import cpu as selective_scan_cpu

        result: tuple[Tensor, Tensor] = selective_scan_cpu.step(x, dt, A, B, C, D, state)
        return result
    y, last_state = diagonal_reference.step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, state)
    return y[:, None], last_state


def _choose_impl(form: str, impl: str, x: Tensor, N: int) -> str:
    """The implementation to run, or ValueError if it does not exist for these arguments."""
    choose("form", form, ("auto", *FORMS))
    choose("impl", impl, ("auto", *IMPLS))
    fits = x.dtype != torch.float64 and can_call_operators()
    got = f"{impl!r} with x of {x.dtype} on {x.device}, N = {N}"
    within = "outside forward derivatives and torch.func"
    compiled = x.device.type == "cpu" and fits
    if impl == "numba" and not compiled:
        expected = f"float32 or less on the CPU, {within}"
        raise fail("impl", got, expected, "use impl='torch' or 'auto'")
    kernels = x.is_cuda and fits and N <= GPU_STATES and triton_missing() is None
    if impl == "triton" and not kernels:
        limit = f"N <= {GPU_STATES}"
        expected = f"float32 or less on a GPU, {limit}, {within}, and Triton installed"
        raise fail("impl", got, expected, "use impl='torch' or 'auto'")
    if impl != "auto":
        if form != "auto" and impl not in FORMS[form]:
            raise fail("impl", repr(impl), f"one of {FORMS[form]} for form={form!r}", "form='auto'")
        return impl
    if form == "recurrent":
        return "numba" if compiled else "reference"
    if form == "auto" and compiled:
        return "numba"
    return "triton" if kernels else "torch"


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> int:
    """Raise ValueError for arguments that do not fit; return the number of sequences."""
    Bt, T, channels = check_tensor("x", x, 3, "[Bt,T,D]").shape
    if 0 in (Bt, T, channels):
        raise fail("x", f"shape {tuple(x.shape)}", "Bt, T and D >= 1", "skip the call")
    check_shape("dt", check_tensor("dt", dt, 3, "[Bt,T,D]", x), (Bt, T, channels), "[Bt,T,D]")
    N = check_tensor("A", A, 2, "[D,N]", x).shape[1]
    if N < 1:
        raise fail("A", f"shape {tuple(A.shape)}", "[D,N] with N >= 1", "give a state of some size")
    check_shape("A", A, (channels, N), "[D,N]")
    check_shape("B", check_tensor("B", B, 3, "[Bt,T,N]", x), (Bt, T, N), "[Bt,T,N]")
    check_shape("C", check_tensor("C", C, 3, "[Bt,T,N]", x), (Bt, T, N), "[Bt,T,N]")
    if D is not None:
        check_shape("D", check_tensor("D", D, 1, "[D]", x), (channels,), "[D]")
    S = Bt if cu_seqlens is None else check_cu_seqlens(cu_seqlens, T, Bt, x)
    if state is not None:
        precise = torch.float64 if x.dtype == torch.float64 else torch.float32
        check_state(state, (S, channels, N), "[S,D,N]", precise, x)
    return S
