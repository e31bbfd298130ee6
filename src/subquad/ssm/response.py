"""C A^l B for all l < L, for millions of l, in memory for about sqrt(L) states.

l is written coarse f + fine with f about sqrt(L). The columns A^fine B and the rows C (A^f)^coarse
are each made by doubling, [X, A^m X] with A^m squared on the way, and their product is everything.
Only matrix products, for dense and diagonal A alike. Powers multiply rounding errors by l, so they
are taken in float64; the last product, which is most of the work, in the system's own precision.
"""

import math

import torch
from torch import Tensor

from subquad.ssm.matrix import DPLR, Dense, StateMatrix, cast


def response(A: StateMatrix, B: Tensor, C: Tensor, L: int) -> Tensor:
    """C A^l B for 0 <= l < L: B [...,N,I], C [...,O,N] -> [...,L,O,I]."""
    dtype = B.dtype
    wide = torch.promote_types(dtype, torch.float64)
    A, B, C = cast(Dense(A.dense()) if isinstance(A, DPLR) else A, wide), B.to(wide), C.to(wide)
    fine = 1 << math.ceil(math.log2(max(1, L)) / 2)
    coarse = -(-L // fine)
    columns, stride = _krylov(A, B, fine)
    rows, _ = _krylov(stride.mT, C.mT, coarse)
    table = rows.mT.to(dtype) @ columns.to(dtype)  # [...,coarse O,fine I]
    table = table.unflatten(-1, (fine, B.shape[-1])).unflatten(-3, (coarse, C.shape[-2]))
    return table.transpose(-3, -2).flatten(-4, -3)[..., :L, :, :]


def _krylov(A: StateMatrix, X: Tensor, count: int) -> tuple[Tensor, StateMatrix]:
    """[X, A X, A^2 X, ...], `count` blocks side by side, and A^count if count is a power of 2."""
    width, power = X.shape[-1], A
    while X.shape[-1] < count * width:
        later = power @ X
        X = torch.cat([X.expand(later.shape), later], -1)
        power = power.square()
    return X[..., : count * width], power
