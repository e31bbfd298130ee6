"""RMS norms of a mixer's output, alone and in the two published orders with its gate.

The weights follow the dtype of what they scale: under autocast only then does torch's fused kernel
run (it computes in float32 whatever comes).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


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
        self.weight = nn.Parameter(torch.ones(head_dim)) if affine else None
        self.shape = (head_dim,)

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """x, gate [..., D] -> [..., D]."""
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, self.shape, weight, self.eps) * F.silu(gate)


class GateThenNorm(nn.Module):
    """y = RMSNorm(x * silu(gate)) * weight, in `groups` separate norms (Mamba-2).

    Args:
        size: the width of x; the weight has one entry for each of its channels.
        groups: how many equal parts of the channels are normalised each on its own.
        eps: added to the mean square.
    """

    def __init__(self, size: int, groups: int = 1, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(size))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """x, gate [..., size] -> [..., size]."""
        x = x * F.silu(gate)
        weight = self.weight.to(x.dtype)
        if self.groups == 1:
            return F.rms_norm(x, weight.shape, weight, self.eps)
        x = x.unflatten(-1, (self.groups, -1))
        return F.rms_norm(x, x.shape[-1:], None, self.eps).flatten(-2) * weight


def l2_normalise(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(|x|^2 + eps) over the last dimension: what keeps a delta rule's keys at norm 1.

    The eps stands inside the root, as in the published models: `F.normalize` clamps instead, and
    differs for short keys. The norm is float32 (float64 for float64): keys longer than 1 diverge.
    """
    norm = torch.linalg.vector_norm(at_least_float32(x), dim=-1, keepdim=True)
    return x * torch.rsqrt(norm * norm + eps).to(x.dtype)


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32 where its own dtype is shorter: gates and decays compound over all tokens."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
