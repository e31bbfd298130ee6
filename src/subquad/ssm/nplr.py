"""HiPPO's matrices as S4 uses them: normal plus low rank, hence diagonal plus low rank.

HiPPO's A is far from normal: its eigenvectors are so nearly dependent that diagonalising it loses
all digits. But A + p p^T is normal for a p of rank 1 (LegS) or 2 (LegT), so that with a unitary V

    A = V (diag(lam) - p p^*) V^*          (Gu et al. 2022, arXiv:2111.00396, theorem 1)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subquad.errors import choose
from subquad.ssm.continuous import StateSpace
from subquad.ssm.legendre import legs, legt
from subquad.ssm.matrix import DPLR, adjoint


@dataclass(frozen=True, eq=False)
class NPLR:
    """A = V (diag(lam) - p p^*) V^* and its input B, in the coordinates of V.

    Attributes:
        lam: [N] complex128, sorted by imaginary part; conjugate pairs.
        p: [N,r], V^* times the correction. r is 1 for LegS, 2 for LegT.
        B: [N,1], V^* times the input matrix.
        V: [N,N], unitary: a state x of HiPPO is V times the state here.
    """

    lam: Tensor
    p: Tensor
    B: Tensor
    V: Tensor

    @property
    def A(self) -> DPLR:
        """diag(lam) - p p^*, the matrix in the coordinates of V."""
        return DPLR(self.lam, self.p, self.p)

    def system(self, C: Tensor, D: Tensor | None = None) -> StateSpace:
        """The system that reads HiPPO's own state with C [O,N]: the same outputs, A structured."""
        return StateSpace(self.A, self.B, C.to(self.V.dtype) @ self.V, D)


def nplr(measure: str, N: int) -> NPLR:
    """The normal plus low-rank form of HiPPO-LegS ("legs") or LegT ("legt", for a window of 1)."""
    choose("measure", measure, ("legs", "legt"))
    A, B = legs(N) if measure == "legs" else legt(N)
    p = correction(measure, N)
    normal = A + p @ p.mT
    # Normal with a constant real part: i times a Hermitian matrix beside it. eigh gives a V that is
    # unitary to rounding, which eig would not.
    decay = normal.diagonal().mean()
    skew = normal - decay * torch.eye(N, dtype=A.dtype)
    w, V = torch.linalg.eigh(-1j * skew)
    lam = torch.complex(decay.expand(N), w)
    return NPLR(lam, adjoint(V) @ p.to(V.dtype), adjoint(V) @ B.to(V.dtype), V)


def correction(measure: str, N: int) -> Tensor:
    """p [N,r] such that A + p p^T is a multiple of I plus a skew-symmetric matrix.

    LegS: p_n = sqrt(n + 1/2). LegT: -A's symmetric part is sqrt((2n+1)(2k+1)) where n - k is even
    and 0 elsewhere, which is p p^T for sqrt(2n+1) split into its even and its odd entries.
    """
    n = torch.arange(N, dtype=torch.float64)
    if measure == "legs":
        return (n + 0.5).sqrt()[:, None]
    even = (n % 2 == 0).double()
    return (2 * n + 1).sqrt()[:, None] * torch.stack([even, 1 - even], -1)
