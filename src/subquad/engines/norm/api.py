"""RMS and l2 norms, of one token or many, with and without a gate.

They stand with the engines because they are compiled like them: around a decoded token on the CPU
a layer's norms in PyTorch operations cost more than reading its state, and on a GPU a gated norm
reads and writes each number four times. The GPU kernels have first derivatives only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.engines.runtime.eager import can_call_compiled_code, can_call_operators
from subquad.engines.runtime.overrides import overridable
from subquad.errors import fail


@overridable
def rms_norm(
    x: Tensor, size: int, weight: Tensor | None, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight, the mean over each `size` numbers of x's last axis.

    Source: Zhang and Sennrich 2019 (arXiv:1910.07467, eq. 4).

    Args:
        x: [..., D], D a multiple of size.
        size: how many numbers are normalised together.
        weight: [D] or [size], in y's dtype; None means ones.
        eps: added to the mean square.
        dtype: y's; None means x's. A GPU kernel reads x as it is, elsewhere it is rounded first.

    Returns:
        [..., D]; the sums are float32 or wider.

    Raises:
        ValueError: for a size that does not divide D, or a weight of another length.
    """
    if x.is_cuda and _has_kernel(size, x.shape, x, weight):
        return _on_gpu(x, size, weight, None, False, eps, 1.0, dtype)
    x = x if dtype is None else x.to(dtype)
    if _compiles(size, x, weight):
        return _compiled(x, size, weight, None, False, eps, 1.0)
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
    if _compiles(size, x, weight, gate):
        return _compiled(x, size, weight, gate, gate_first, eps, 1.0)
    if x.is_cuda and _has_kernel(size, x.shape, x, weight, gate):
        return _on_gpu(x, size, weight, gate, gate_first, eps, 1.0)
    if gate_first:
        return _plain(x * F.silu(gate), size, weight, eps)
    return _plain(x, size, weight, eps) * F.silu(gate)


@overridable
def skipped_gated_rms_norm(
    y: Tensor, x: Tensor, skip: Tensor, gate: Tensor, size: int, weight: Tensor | None, eps: float
) -> Tensor:
    """rms_norm((y + D x) * silu(gate)): how Mamba-2 leaves its recurrence.

    Source: Dao and Gu 2024 (arXiv:2405.21060, eq. 1 for the skip D x, figure 6 for the norm).

    Args:
        y, x: [..., H, P], the recurrence's outputs and what it was to remember.
        skip: D [H].
        gate: [..., H*P].

    The others are `rms_norm`'s, over the H*P channels of all heads. Returns [..., H*P].
    """
    if y.is_cuda and y.shape == x.shape and skip.shape == y.shape[-2:-1]:
        *tokens, heads, width = y.shape
        if _has_kernel(size, (*tokens, heads * width), y, weight, gate, x, skip):
            from subquad.engines.norm import gpu as norm

            out: Tensor = norm.norm(y, gate, weight, x, skip, size, True, eps, 1.0, None)
            return out
    flat = torch.addcmul(y, x, skip[:, None].to(x.dtype)).flatten(-2)
    return gated_rms_norm(flat, gate, size, weight, eps, gate_first=True)


@overridable
def l2_norm(x: Tensor, size: int, eps: float = 1e-6) -> Tensor:
    """x / sqrt(|x|^2 + eps) over each `size` numbers: what keeps a delta rule's keys at norm 1.

    The eps stands inside the root, as in the published models: `F.normalize` clamps instead, and
    differs for short keys. The norm is float32 (float64 for float64): keys longer than 1 diverge.

    Args:
        x: [..., D], D a multiple of size.
    """
    if _compiles(size, x):
        return _compiled(x, size, None, None, False, eps / size, size**-0.5)
    if x.is_cuda and _has_kernel(size, x.shape, x):
        return _on_gpu(x, size, None, None, False, eps / size, size**-0.5)
    _check(x, size, None)
    x = x.unflatten(-1, (-1, size))
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return (x * torch.rsqrt(norm * norm + eps).to(x.dtype)).flatten(-2)


def _plain(x: Tensor, size: int, weight: Tensor | None, eps: float) -> Tensor:
    _check(x, size, weight)
    if size == x.shape[-1]:
        return F.rms_norm(x, (size,), weight, eps)
    parts = x.unflatten(-1, (-1, size))
    if weight is None or weight.shape[0] == size:
        return F.rms_norm(parts, (size,), weight, eps).flatten(-2)
    return F.rms_norm(parts, (size,), None, eps).flatten(-2) * weight


def _check(x: Tensor, size: int, weight: Tensor | None) -> None:
    """Asked where no kernel ran: kernels take nothing that does not fit."""
    D = x.shape[-1]
    if size < 1 or D % size:
        fix = "normalise the whole axis, or groups of equal size"
        raise fail("size", size, f"at least 1, and a divisor of x's last axis, {D}", fix)
    if weight is not None and weight.shape not in ((size,), (D,)):
        fix = "give a weight for each number that is normalised together, or for each channel"
        raise fail("weight", f"shape {tuple(weight.shape)}", f"[{size}] or [{D}]", fix)


def _fits(
    size: int, shape: tuple[int, ...], weight: Tensor | None, gate: Tensor | None
) -> bool:  # fmt: skip
    """Whether kernels, which trust shapes, may be given these. PyTorch broadcasts a gate."""
    D = shape[-1]
    fits = size > 0 and D % size == 0 and (gate is None or gate.shape == shape)
    return fits and (weight is None or weight.shape in ((size,), (D,)))


def _compiles(
    size: int, x: Tensor, weight: Tensor | None = None, gate: Tensor | None = None
) -> bool:
    given = (t for t in (x, weight, gate) if t is not None)
    return _fits(size, x.shape, weight, gate) and can_call_compiled_code(given)


def _compiled(
    x: Tensor,
    size: int,
    weight: Tensor | None,
    gate: Tensor | None,
    gate_first: bool,
    eps: float,
    scale: float,
) -> Tensor:
    from subquad.engines.norm import cpu as norm_cpu  # compiles, and imports numba, when first used

    y: Tensor = norm_cpu.norm(x, size, weight, gate, gate_first, eps, scale)
    return y


def _has_kernel(
    size: int,
    shape: tuple[int, ...],
    x: Tensor,
    weight: Tensor | None = None,
    gate: Tensor | None = None,
    *others: Tensor,
) -> bool:
    """shape: of the result."""
    from subquad.engines.norm import gpu as norm

    return (
        _fits(size, shape, weight, gate)
        and can_call_operators()
        and norm.supported(size, x, weight, gate, *others) is None
    )


def _on_gpu(
    x: Tensor,
    size: int,
    weight: Tensor | None,
    gate: Tensor | None,
    gate_first: bool,
    eps: float,
    scale: float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    from subquad.engines.norm import gpu as norm

    y: Tensor = norm.norm(x, gate, weight, None, None, size, gate_first, eps, scale, dtype)
    return y
