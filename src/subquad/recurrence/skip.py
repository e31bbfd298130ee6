"""A skip around the recurrence: what a head lets through of its values beside the state."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.recurrence.gpu import can_call_kernels


def add_skip(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """y + D_h x: the feed-through of a state space (Dao and Gu 2024, arXiv:2405.21060, eq. 1).

    Args:
        y, x: [B,T,H,P], of one dtype.
        weight: D [H].

    Returns:
        [B,T,H,P] in y's dtype. The GPU kernel has first derivatives only.
    """
    if x.is_cuda and can_call_kernels((y, x, weight)):
        from subquad.kernels import skip

        if skip.supported(y, x, weight) is None:
            out: Tensor = skip.add_skip(y, x, weight)
            return out
    return torch.addcmul(y, x, weight[:, None].to(x.dtype))
