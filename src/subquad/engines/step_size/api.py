"""Selective step sizes: the token decides how far it moves the state.

    dt = softplus(raw + dt_bias)      log_decay = -exp(A_log) dt      v = dt x

In the words of a continuous system h' = A h + x, held over a step dt: Mamba-2 (Dao and Gu 2024,
arXiv:2405.21060, section 7), whose decay Gated DeltaNet took over. One GPU kernel, with first
derivatives only; in PyTorch these are nine, which a decoded token waits for one by one.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from subquad.engines.runtime.eager import can_call_operators


def step_decay(dt: Tensor, dt_bias: Tensor, A_log: Tensor) -> Tensor:
    """log_decay [B,T,H], float32 or wider, of raw steps dt [B,T,H], dt_bias [H], A_log [H]."""
    if dt.is_cuda and _has_kernel(None, dt, dt_bias, A_log):
        from subquad.engines.step_size import gpu as timestep

        log_decay: Tensor = timestep.discretise(None, dt, dt_bias, A_log)[1]
        return log_decay
    return -_softplus(dt, dt_bias) * _at_least_float32(A_log).exp()


def discretize(x: Tensor, dt: Tensor, dt_bias: Tensor, A_log: Tensor) -> tuple[Tensor, Tensor]:
    """(v [B,T,H,P] in x's dtype, log_decay [B,T,H]) of x [B,T,H,P] and raw steps dt [B,T,H]."""
    if x.is_cuda and _has_kernel(x, dt, dt_bias, A_log):
        from subquad.engines.step_size import gpu as timestep

        v, log_decay = timestep.discretise(x, dt, dt_bias, A_log)
        return v, log_decay
    step = _softplus(dt, dt_bias)
    return (x * step[..., None]).to(x.dtype), -step * _at_least_float32(A_log).exp()


def _softplus(dt: Tensor, dt_bias: Tensor) -> Tensor:
    return F.softplus(_at_least_float32(dt) + dt_bias)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype.itemsize >= 4 else x.float()


def _has_kernel(x: Tensor | None, dt: Tensor, dt_bias: Tensor, A_log: Tensor) -> bool:
    from subquad.engines.step_size import gpu as timestep

    given = (x, dt, dt_bias, A_log)
    return _fits(*given) and can_call_operators() and timestep.supported(*given) is None


def _fits(x: Tensor | None, dt: Tensor, dt_bias: Tensor, A_log: Tensor) -> bool:
    """Whether kernels, which trust shapes, may be given these. PyTorch broadcasts."""
    fits = dt.ndim == 3 and dt_bias.shape == A_log.shape == dt.shape[2:]
    return fits and (x is None or (x.ndim == 4 and x.shape[:3] == dt.shape))
