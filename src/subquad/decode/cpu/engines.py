"""What a tape knows of our engines: how a call of each, for one token, goes on it.

Kernels trust the shapes on a tape, so each shape is asked for here. Signatures are the engines'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.decode.cpu.operations import OPERATIONS, Recorder, Untraceable
from subquad.engines.convolution.api import short_convolution
from subquad.engines.matrix import api
from subquad.engines.matrix.call import Call
from subquad.engines.matrix.plan import make_plan
from subquad.engines.matrix.reference import Erase, parts
from subquad.engines.norm.api import gated_rms_norm, l2_norm, rms_norm, skipped_gated_rms_norm
from subquad.engines.norm.layer import layer_norm
from subquad.engines.projection.api import linear
from subquad.engines.selective import api as diagonal


def _linear(r: Recorder, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    from subquad.engines.projection import cpu as kernels

    N, K = weight.shape[0], x.shape[-1]
    _expect("x", x, (*[1] * (x.ndim - 1), K))
    _expect("weight", weight, (N, K))
    _expect("bias", bias, (N,))
    y = r.new((*x.shape[:-1], N))
    kernels.record(r.tape, r.flat(x), r.flat(weight), _flat(r, bias), y)
    r.weights.append(weight)
    return y


def _rms_norm(r: Recorder, x: Tensor, size: int, weight: Tensor | None, eps: float) -> Tensor:
    return _norm(r, x, None, size, weight, eps)


def _gated_rms_norm(
    r: Recorder,
    x: Tensor,
    gate: Tensor,
    size: int,
    weight: Tensor | None,
    eps: float,
    *,
    gate_first: bool,
) -> Tensor:
    return _norm(r, x, gate, size, weight, eps, gate_first)


def _skipped_gated_rms_norm(
    r: Recorder,
    y: Tensor,
    x: Tensor,
    skip: Tensor,
    gate: Tensor,
    size: int,
    weight: Tensor | None,
    eps: float,
) -> Tensor:
    _expect("x", x, y.shape)
    _expect("skip", skip, y.shape[-2:-1])
    skipped: Tensor = OPERATIONS[torch.addcmul](r, y, x, skip[:, None])
    return _norm(r, skipped.flatten(-2), gate, size, weight, eps, gate_first=True)


def _layer_norm(
    r: Recorder, x: Tensor, size: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    from subquad.engines.norm import layer_cpu as kernels

    D = x.shape[-1]
    if size < 1 or D % size:
        raise Untraceable(f"a norm of {size} numbers each of {D}")
    _expect("weight", weight, (D,))
    _expect("bias", bias, (D,))
    y = r.new(x.shape)
    kernels.record(r.tape, r.flat(x), size, _flat(r, weight), _flat(r, bias), eps, y)
    return y


def _l2_norm(r: Recorder, x: Tensor, size: int, eps: float = 1e-6) -> Tensor:
    return _norm(r, x, None, size, None, eps / size, scale=size**-0.5)


def _norm(
    r: Recorder,
    x: Tensor,
    gate: Tensor | None,
    size: int,
    weight: Tensor | None,
    eps: float,
    gate_first: bool = False,
    scale: float = 1.0,
) -> Tensor:
    from subquad.engines.norm import cpu as kernels

    D = x.shape[-1]
    if size < 1 or D % size:
        raise Untraceable(f"a norm of {size} numbers each of {D}")
    if weight is not None and weight.numel() != size:
        _expect("weight", weight, (D,))
    _expect("gate", gate, x.shape)
    y = r.new(x.shape)
    x, weight, gate = r.flat(x), _flat(r, weight), _flat(r, gate)
    kernels.record(r.tape, x, size, weight, gate, gate_first, eps, scale, y)
    return y


def _short_convolution(
    r: Recorder,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    from subquad.engines.convolution import cpu as kernels

    if state is None or cu_seqlens is not None or activation not in (None, "silu"):
        raise Untraceable(f"a convolution from no state, or with activation={activation!r}")
    rows, (D, W) = x.shape[0], weight.shape
    _expect("x", x, (rows, 1, D))
    _expect("bias", bias, (D,))
    _expect("state", state, (rows, W - 1, D))
    y, new, silu = r.new(x.shape), r.new(state.shape), activation == "silu"
    x, weight, state = r.flat(x), r.flat(weight), r.flat(state)
    kernels.record(r.tape, x, weight, _flat(r, bias), state, silu, y, new)
    return y, new


def _linear_recurrence(
    r: Recorder,
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
    from subquad.engines.matrix.cpu import step as kernels

    if state is None or cu_seqlens is not None:
        raise Untraceable("a recurrence from no state")
    call = Call.checked(q, k, v, log_decay, erase, bonus, scale, state, cu_seqlens, value_log_decay)
    explanation = api.explanation_of(call, make_plan(call, form, impl))
    if (explanation.form, explanation.impl) != ("recurrent", "numba"):
        raise Untraceable(f"a recurrence: {explanation.form}, impl={explanation.impl!r}")
    r.told.append(explanation)
    o, new = r.new(v.shape), r.new(state.shape)
    beta, a, b = (_flat(r, x) for x in parts(erase))
    log_decay, bonus = _flat(r, log_decay), _flat(r, bonus)
    q, k, v, state = r.flat(q), r.flat(k), r.flat(v), r.flat(state)
    along = _flat(r, value_log_decay)
    given = (q, k, v, log_decay, beta, a, b, bonus, call.scale, state, along)
    kernels.record(r.tape, *given, o, new)
    return o, new


def _selective_scan(
    r: Recorder,
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
    from subquad.engines.selective import cpu as kernels

    if state is None or cu_seqlens is not None:
        raise Untraceable("a scan from no state")
    if form not in ("auto", "scan") or impl not in ("auto", "numba"):
        raise Untraceable(f"a scan with form={form!r}, impl={impl!r}")
    rows, (channels, N) = x.shape[0], A.shape
    _expect("x", x, (rows, 1, channels))
    _expect("dt", dt, (rows, 1, channels))
    _expect("B", B, (rows, 1, N))
    _expect("C", C, (rows, 1, N))
    _expect("D", D, (channels,))
    _expect("state", state, (rows, channels, N))
    r.told.append(diagonal.explain_token(x, A))
    y, new = r.new(x.shape), r.new(state.shape)
    D = torch.zeros(channels, dtype=torch.float32, device="cpu") if D is None else D
    x, dt, A, B, C, D, state = (r.flat(tensor) for tensor in (x, dt, A, B, C, D, state))
    kernels.record(r.tape, x, dt, A, B, C, D, state, y, new)
    return y, new


def _flat(r: Recorder, x: Tensor | None) -> Tensor | None:
    return None if x is None else r.flat(x)


def _expect(name: str, x: Tensor | None, shape: Sequence[int]) -> None:
    if x is not None and tuple(x.shape) != tuple(shape):
        raise Untraceable(f"{name} {tuple(x.shape)} where one token has {tuple(shape)}")


ENGINES: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    linear: _linear,
    rms_norm: _rms_norm,
    gated_rms_norm: _gated_rms_norm,
    skipped_gated_rms_norm: _skipped_gated_rms_norm,
    l2_norm: _l2_norm,
    layer_norm: _layer_norm,
    short_convolution: _short_convolution,
    api.linear_recurrence: _linear_recurrence,
    diagonal.selective_scan: _selective_scan,
}
