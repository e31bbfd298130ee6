"""Layer norms of groups of channels: of all, or of each head (RWKV's group norm)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from subquad.engines.runtime.overrides import overridable
from subquad.errors import fail


@overridable
def layer_norm(
    x: Tensor, size: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """y = (x - mean) / sqrt(var + eps) * weight + bias, over each `size` numbers of the last axis.

    Source: Ba et al. 2016 (arXiv:1607.06450, eq. 4); per group, Wu and He 2018 (arXiv:1803.08494).

    Args:
        x: [..., D], D a multiple of size.
        size: how many numbers are normalised together.
        weight, bias: [D] each, or None for ones and zeros.
        eps: added to the variance.

    Returns:
        [..., D] in x's dtype.

    Raises:
        ValueError: for a size that does not divide D, or a weight or bias of another length.
    """
    D = x.shape[-1]
    if size < 1 or D % size:
        raise fail("size", size, f"a divisor of the {D} channels", "change one of the two")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != (D,):
            raise fail(name, f"shape {tuple(parameter.shape)}", f"[{D}]", "one for each channel")
    if size == D:
        return F.layer_norm(x, (size,), weight, bias, eps)
    y = F.layer_norm(x.unflatten(-1, (-1, size)), (size,), None, None, eps).flatten(-2)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias
