"""RMS norms of a mixer's output, alone and in the two published orders with its gate.

The weights follow the dtype of what they scale: under autocast only then does torch's fused kernel
run (it computes in float32 whatever comes).
"""

from typing import Any

import torch
from torch import Tensor, nn

from subquad.engines.norm.api import gated_rms_norm, rms_norm, skipped_gated_rms_norm
from subquad.engines.norm.layer import layer_norm
from subquad.layers.traceable import traceable


@traceable
class RMSNorm(nn.RMSNorm):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

    def __init__(self, size: int, eps: float = 1e-5) -> None:
        super().__init__(size, eps)
        self.size = size

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """x [..., D] -> [..., D], in `dtype` if one is given, else in x's."""
        if dtype is None or dtype == x.dtype:
            return rms_norm(x, self.size, self.weight.to(x.dtype), self.eps)  # type: ignore[arg-type]
        return rms_norm(x, self.size, self.weight.to(dtype), self.eps, dtype)  # type: ignore[arg-type]


@traceable
class LayerNorm(nn.LayerNorm):
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last dimension."""

    def __init__(self, size: int, eps: float = 1e-5) -> None:
        super().__init__(size, eps)
        self.size = size

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """x [..., D] -> [..., D], in `dtype` if one is given, else in x's."""
        wide = at_least_float32(x)
        weight, bias = self.weight.to(wide.dtype), self.bias.to(wide.dtype)
        return layer_norm(wide, self.size, weight, bias, self.eps).to(dtype or x.dtype)


@traceable
class NormThenGate(nn.Module):
    """y = RMSNorm(x) * weight * silu(gate), one norm a head (RetNet, GLA, Gated DeltaNet).

    Args:
        head_dim: the size D of what is normalised together; the weight is shared by the heads.
        eps: added to the mean square.
        affine: False leaves the weight out, as RetNet does.
    """

    def __init__(self, head_dim: int, eps: float = 1e-5, *, affine: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.head_dim = head_dim
        self.weight = nn.Parameter(torch.ones(head_dim)) if affine else None

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """x, gate [..., H*D], the heads side by side -> [..., H*D]."""
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return gated_rms_norm(x, gate, self.head_dim, weight, self.eps, gate_first=False)


@traceable
class GateThenNorm(nn.Module):
    """RMSNorm((y + skip x) * silu(gate)) * weight, in `groups` separate norms (Mamba-2).

    Args:
        size: the width of all heads of y; the weight has one entry for each of its channels.
        groups: how many equal parts of the channels are normalised each on its own.
        eps: added to the mean square.
    """

    def __init__(self, size: int, groups: int = 1, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.group_size = size // groups
        self.weight = nn.Parameter(torch.ones(size))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, y: Tensor, x: Tensor, skip: Tensor, gate: Tensor) -> Tensor:
        """y, x [..., H, P], skip [H], gate [..., size] with size = H P -> [..., size]."""
        weight = self.weight.to(y.dtype)
        return skipped_gated_rms_norm(y, x, skip, gate, self.group_size, weight, self.eps)


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32 where its own dtype is shorter: gates and decays compound over all tokens."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    """The norm of a residual that may be wider (float32) than the weights (bfloat16), in theirs."""
    dtype: Any = norm.weight.dtype
    if x.dtype != dtype and type(norm) in (RMSNorm, LayerNorm):
        return norm(x, dtype)  # rounds what it returns, not what it reads, where it can
    return norm(x.to(dtype))
