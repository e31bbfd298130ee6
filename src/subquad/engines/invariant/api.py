"""Diagonal, time-invariant state space models: a recurrence, or the convolution it amounts to.

    Bt batch   T time   D channels   N complex state numbers a channel   S sequences

The convolution's kernel and the states at both ends are sums of powers e^{l log A_bar}. An exponent
is written l = c i + j with c about sqrt(T), so that sqrt(T) powers a pole are enough and a real
matrix product makes all T of them: nothing of size [D,N,T] is ever in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.engines.runtime.autocast import no_autocast
from subquad.engines.runtime.explanation import Explanation, tell, watched
from subquad.engines.runtime.validation import check_cu_seqlens, check_shape, check_tensor
from subquad.errors import choose, fail
from subquad.table.spec import Recurrence

FORMS = ("recurrent", "convolution")


def diagonal_ssm(
    u: Tensor,
    log_A_bar: Tensor,
    B_bar: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    form: str = "auto",
) -> tuple[Tensor, Tensor]:
    """A discretised diagonal SSM of conjugate pairs (Gu et al. 2022, S4D, arXiv:2206.11893).

        h_t = e^{log_A_bar} h_{t-1} + B_bar u_t        y_t = 2 Re(C . h_t) + D u_t

    Args:
        u: [Bt,T,D] real, T >= 1.
        log_A_bar, B_bar, C: [D,N] complex; log_A_bar (= dt A) with a real part below zero.
        D: [D] real, a skip from u; None means none.
        state: [S,D,N] complex, h before the first token; None means zeros.
        cu_seqlens: [S+1] int, the bounds of S sequences packed in u (then Bt is 1). They are
            convolved one after another, so `torch.compile` cannot trace them into one graph.
        form: "recurrent" (token by token), "convolution" (by FFT, zero-padded so that nothing
            wraps around) or "auto": recurrent for one token, otherwise convolution.

    Returns:
        y [Bt,T,D] in u's dtype and the last h [S,D,N], complex64 (complex128 if u is float64), as
        is all arithmetic. Gradients flow through both and into `state`.

    Raises:
        ValueError: naming the argument that does not fit, and the fix.
    """
    _check(u, log_A_bar, B_bar, C, D, state, cu_seqlens)
    choose("form", form, ("auto", *FORMS))
    real = torch.float64 if u.dtype == torch.float64 else torch.float32
    cplx = torch.complex128 if real == torch.float64 else torch.complex64
    log_A, B, C = (t.to(cplx) for t in (log_A_bar, B_bar, C))
    x, h = u.to(real), None if state is None else state.to(cplx)
    why = "asked for"
    if form == "auto":
        form = "recurrent" if u.shape[1] == 1 else "convolution"
        why = "one token: one step" if form == "recurrent" else "many tokens: one product of FFTs"
    if watched():
        tell(_explain(form, why, u, log_A, cu_seqlens))
    run = _recurrent if form == "recurrent" else _convolution
    # Autocast would take the powers, and the state with them, to half precision.
    with no_autocast(u.device.type):
        if cu_seqlens is None:
            y, last_state = run(x, log_A, B, C, h)
        else:
            y, last_state = _each(run, x, log_A, B, C, h, cu_seqlens)
        if D is not None:
            y = y + D.to(real) * x
    return y.to(u.dtype), last_state


def _explain(
    form: str, why: str, u: Tensor, log_A: Tensor, cu_seqlens: Tensor | None
) -> Explanation:
    kind = Recurrence("invariant", "fixed_element")
    D, N = log_A.shape
    rows = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    steps = math.log2(2 * u.shape[1])  # of an FFT; three of them, 5 operations each
    return Explanation(
        recurrence=kind.write,
        read=kind.read,
        form=form,
        impl="torch",
        chunk=None,
        device=str(u.device),
        why=why,
        forms=kind.forms,
        state_shape=(rows, D, N),
        state_bytes=rows * D * N * log_A.dtype.itemsize,
        flops_per_token=D * (16 * N if form == "recurrent" else round(2 * 3 * 5 * steps)),
    )


def step(
    u: Tensor,  # [Bt,D]
    A_bar: Tensor,  # [D,N]
    B: Tensor,  # [D,N]
    C: Tensor,  # [D,N]
    state: Tensor,  # [Bt,D,N]
) -> tuple[Tensor, Tensor]:
    """One token: the specification. Returns y [Bt,D], without the skip, and the next state."""
    state = A_bar * state + B * u[:, :, None]  # [Bt,D,N]
    return 2 * (C * state).sum(-1).real, state


def _recurrent(
    u: Tensor, log_A: Tensor, B: Tensor, C: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The loop over tokens."""
    A_bar, outputs = log_A.exp(), []
    if state is None:
        state = torch.zeros_like(log_A).expand(u.shape[0], -1, -1)
    for t in range(u.shape[1]):
        y, state = step(u[:, t], A_bar, B, C, state)
        outputs.append(y)
    return torch.stack(outputs, 1), state


def _convolution(
    u: Tensor, log_A: Tensor, B: Tensor, C: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """All tokens at once: u's convolution with the kernel, and what the first state still adds."""
    T, u = u.shape[1], u.transpose(1, 2)  # [Bt,D,T]
    kernel = _response(C * B, log_A, T)  # [D,T]
    n = _fast_length(2 * T - 1)
    y = torch.fft.irfft(torch.fft.rfft(u, n=n) * torch.fft.rfft(kernel, n=n), n=n)[..., :T]
    last_state = B * _weighted_sum(u, log_A)
    if state is not None:
        y = y + _response(C * log_A.exp() * state, log_A, T)
        last_state = last_state + (T * log_A).exp() * state
    return y.transpose(1, 2), last_state


def _each(
    run: Callable[..., tuple[Tensor, Tensor]],
    u: Tensor,
    log_A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor]:
    """`run` on each packed sequence, laid end to end again."""
    parts = [
        run(u[:, i:j], log_A, B, C, None if state is None else state[s : s + 1])
        for s, (i, j) in enumerate(pairwise(cu_seqlens.tolist()))
    ]
    return torch.cat([y for y, _ in parts], 1), torch.cat([h for _, h in parts])


def _powers(log_A: Tensor, count: int, stride: int) -> Tensor:
    """e^{stride i log_A} for i < count: [D,count,N]."""
    exponents = stride * torch.arange(count, device=log_A.device, dtype=log_A.real.dtype)
    return (exponents[:, None] * log_A[:, None, :]).exp()


def _split(T: int) -> tuple[int, int]:
    """(coarse, fine): l < T is fine * i + j with i < coarse and j < fine."""
    fine = max(1, round(T**0.5))
    return -(-T // fine), fine


def _response(weight: Tensor, log_A: Tensor, T: int) -> Tensor:
    """2 Re sum_n weight_n e^{l log_A_n} for l < T: weight [...,D,N] -> [...,D,T]."""
    coarse, fine = _split(T)
    left = weight[..., None, :] * _powers(log_A, coarse, fine)  # [...,D,coarse,N]
    right = _powers(log_A, fine, 1)  # [D,fine,N]
    left = torch.cat([left.real, -left.imag], -1)  # Re(l r) = Re l Re r - Im l Im r
    right = torch.cat([right.real, right.imag], -1)
    return 2 * torch.einsum("...din,djn->...dij", left, right).flatten(-2)[..., :T]


def _weighted_sum(u: Tensor, log_A: Tensor) -> Tensor:
    """sum_t e^{(T-1-t) log_A} u_t: what the tokens leave behind; u [Bt,D,T] -> [Bt,D,N]."""
    coarse, fine = _split(u.shape[2])
    u = F.pad(u.flip(2), (0, coarse * fine - u.shape[2])).unflatten(2, (coarse, fine))
    right = torch.view_as_real(_powers(log_A, fine, 1)).flatten(-2)  # [D,fine,2N]
    within = torch.einsum("bdij,djn->bdin", u, right).unflatten(-1, (-1, 2)).contiguous()
    return (torch.view_as_complex(within) * _powers(log_A, coarse, fine)).sum(2)


def _fast_length(n: int) -> int:
    """The smallest FFT length of at least n that is a power of two times 1, 3 or 5."""
    return min(m << max(0, (-(-n // m) - 1).bit_length()) for m in (1, 3, 5))


def _check(
    u: Tensor,
    log_A_bar: Tensor,
    B_bar: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Raise ValueError for arguments that do not fit."""
    Bt, T, channels = check_tensor("u", u, 3, "[Bt,T,D]").shape
    if 0 in (Bt, T, channels):
        raise fail("u", f"shape {tuple(u.shape)}", "Bt, T and D >= 1", "skip the call")
    _check_complex("log_A_bar", log_A_bar, 2, "[D,N]", u)
    shape = (channels, log_A_bar.shape[1])
    for name, t in (("log_A_bar", log_A_bar), ("B_bar", B_bar), ("C", C)):
        _check_complex(name, t, 2, "[D,N]", u)
        check_shape(name, t, shape, "[D,N]")
    if shape[1] < 1:
        raise fail("log_A_bar", f"shape {shape}", "[D,N] with N >= 1", "give it a pole")
    if D is not None:
        check_shape("D", check_tensor("D", D, 1, "[D]", u), (channels,), "[D]")
    S = Bt if cu_seqlens is None else check_cu_seqlens(cu_seqlens, T, Bt, u)
    if state is not None:
        _check_complex("state", state, 3, "[S,D,N]", u)
        check_shape("state", state, (S, *shape), "[S,D,N]")


def _check_complex(name: str, x: object, ndim: int, layout: str, like: Tensor) -> None:
    """`x` must be a complex tensor of `ndim` dimensions on the device of `like`."""
    if not isinstance(x, Tensor) or not x.is_complex():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise fail(name, got, f"a complex tensor {layout}", f"torch.complex({name}, zeros)")
    if x.ndim != ndim:
        raise fail(name, f"shape {tuple(x.shape)}", layout, "reorder its dimensions")
    if x.device != like.device:
        raise fail(name, f"device {x.device}", f"device {like.device}", f"move {name} there")
