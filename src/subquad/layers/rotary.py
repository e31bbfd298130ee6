"""Positions as rotations of queries and keys (Su et al. 2021, eq. 34), counted from the state.

B batch   T time   H heads   D head size   N sequences
"""

import torch
from torch import Tensor


def positions(length: Tensor | None, x: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """The position of each token of `x` in its own sequence, and the length of each afterwards.

    Args:
        length: [B] (or [N] when packed) int64, the tokens each sequence had before; None for 0.
        x: [B,T,...], of which only the shape and the device are used.
        cu_seqlens: [N+1] when packed.

    Returns:
        [B,T] int64 positions and [B] (or [N]) int64 new lengths.
    """
    B, T = x.shape[:2]
    arange = torch.arange(T, device=x.device)
    if cu_seqlens is None:
        if length is None:
            return arange.expand(B, T), torch.full((B,), T, device=x.device)
        return length[:, None] + arange, length + T
    added = cu_seqlens.diff().long()
    first = -cu_seqlens[:-1].long() if length is None else length - cu_seqlens[:-1]
    start = first.repeat_interleave(added, output_size=T)  # so that the position is start + index
    return (start + arange)[None], added if length is None else length + added


def angles(position: Tensor, inverse_wavelength: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [B,T,1,D/2] float32 of position [B,T] times inverse wavelength [D/2]."""
    angle = (position.float()[..., None] * inverse_wavelength)[:, :, None]
    return angle.cos(), angle.sin()


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2) of x [B,T,H,D]: the layout of Llama and its relatives."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (2i, 2i + 1) of x [B,T,H,D]: the layout of the paper and of RetNet."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).to(x.dtype)
