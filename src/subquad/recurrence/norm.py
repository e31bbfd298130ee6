"""Norms of one token or many: what every layer does beside its recurrence.

They stand with the engines because they are compiled like them: around a decoded token on the CPU
a layer's norms in PyTorch operations cost more than reading its state, and on a GPU a gated norm
reads and writes each number four times. The GPU kernels have first derivatives only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.recurrence.eager import can_call_compiled_code
from subquad.recurrence.gpu import can_call_kernels
from subquad.recurrence.overrides import overridable


@overridable
def rms_norm(x: Tensor, size: int, weight: Tensor | None, eps: float) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight, the mean over each `size` numbers of x's last axis.

    Source: Zhang and Sennrich 2019 (arXiv:1910.07467, eq. 4).

    Args:
        x: [..., D], D a multiple of size.
        size: how many numbers are normalised together.
        weight: [D] or [size], in x's dtype; None means ones.
        eps: added to the mean square.

    Returns:
        [..., D] in x's dtype; the sums are float32 or wider.
    """
    if _compiles(x, weight):
        return _compiled(x, size, weight, None, False, eps, 1.0)
    if x.is_cuda and _has_kernel(x, size, weight):
        return _on_gpu(x, size, weight, None, False, eps, 1.0)
    return _plain(x, size, weight, eps)


@overridable
def gated_rms_norm(
    x: Tensor, gate: Tensor, size: int, weight: Tensor | None, eps: float, *, gate_first: bool
) -> Tensor:
    """rms_norm(x * silu(gate)) if gate_first, else rms_norm(x) * silu(gate).

    Args:
        gate: like x, in its dtype.
        gate_first: whether the mean square is taken after gating, as in Mamba-2, or before.

    The others are `rms_norm`'s.
    """
    if _compiles(x, weight, gate):
        return _compiled(x, size, weight, gate, gate_first, eps, 1.0)
    if x.is_cuda and _has_kernel(x, size, weight, gate):
        return _on_gpu(x, size, weight, gate, gate_first, eps, 1.0)
    if gate_first:
        return _plain(x * F.silu(gate), size, weight, eps)
    return _plain(x, size, weight, eps) * F.silu(gate)


@overridable
def l2_norm(x: Tensor, size: int, eps: float = 1e-6) -> Tensor:
    """x / sqrt(|x|^2 + eps) over each `size` numbers: what keeps a delta rule's keys at norm 1.

    The eps stands inside the root, as in the published models: `F.normalize` clamps instead, and
    differs for short keys. The norm is float32 (float64 for float64): keys longer than 1 diverge.

    Args:
        x: [..., D], D a multiple of size.
    """
    if _compiles(x):
        return _compiled(x, size, None, None, False, eps / size, size**-0.5)
    if x.is_cuda and _has_kernel(x, size):
        return _on_gpu(x, size, None, None, False, eps / size, size**-0.5)
    x = x.unflatten(-1, (-1, size))
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return (x * torch.rsqrt(norm * norm + eps).to(x.dtype)).flatten(-2)


def _plain(x: Tensor, size: int, weight: Tensor | None, eps: float) -> Tensor:
    if size == x.shape[-1]:
        return F.rms_norm(x, (size,), weight, eps)
    parts = x.unflatten(-1, (-1, size))
    if weight is None or weight.shape[0] == size:
        return F.rms_norm(parts, (size,), weight, eps).flatten(-2)
    return F.rms_norm(parts, (size,), None, eps).flatten(-2) * weight


def _compiles(x: Tensor, *others: Tensor | None) -> bool:
    return can_call_compiled_code(t for t in (x, *others) if t is not None)


def _compiled(
    x: Tensor,
    size: int,
    weight: Tensor | None,
    gate: Tensor | None,
    gate_first: bool,
    eps: float,
    scale: float,
) -> Tensor:
    from subquad.kernels import norm_cpu  # compiles, and imports numba, when first used

    y: Tensor = norm_cpu.norm(x, size, weight, gate, gate_first, eps, scale)
    return y


def _has_kernel(
    x: Tensor, size: int, weight: Tensor | None = None, gate: Tensor | None = None
) -> bool:
    from subquad.kernels import norm

    return can_call_kernels((x, weight, gate)) and norm.supported(x, size, weight, gate) is None


def _on_gpu(
    x: Tensor,
    size: int,
    weight: Tensor | None,
    gate: Tensor | None,
    gate_first: bool,
    eps: float,
    scale: float,
) -> Tensor:
    from subquad.kernels import norm

    y: Tensor = norm.norm(x, gate, weight, size, gate_first, eps, scale)
    return y
