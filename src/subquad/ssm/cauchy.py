"""S4's kernel: Cauchy sums at the roots of unity (Gu et al. 2022, arXiv:2111.00396, section 3).

The kernel K_l = C A_bar^l B_bar (l < L) is the inverse FFT of its generating function

    sum_l K_l z^l = C (1 - A_bar^L) (1 - z A_bar)^-1 B_bar        at the roots z^L = 1

For the bilinear A_bar the inverse is one of A itself. S4 writes it with (1-z)/(1+z), which has a
pole at the root z = -1 of every even L. Multiplied out, that root is one like any other:

    (1 - z A_bar)^-1 B_bar = [(1 - z) - (1 + z) dt/2 A]^-1 dt B

With A = diag(lam) - p q^* what is inverted is a diagonal plus low rank again, and what there is to
do are sums over the poles, sum_n c_n b_n / ((1-z) - (1+z) dt/2 lam_n), of (C, q^*) against (B, p).
"""

import math

import torch
from torch import Tensor

from subquad.errors import fail, is_whole
from subquad.ssm.continuous import StateSpace
from subquad.ssm.matrix import DPLR

CHUNK = 4096  # roots at a time: [CHUNK,N] numbers


def s4_kernel(system: StateSpace, dt: float, L: int) -> Tensor:
    """K_l = C A_bar^l B_bar for l < L, bilinear: `discretize(dt, "bilinear", "after")`, without D.

    O(N L) for the sums, O(N^3 log L) for A_bar^L; in float64, in memory for a chunk of roots. This
    is S4 as published; on a CPU `discretize(...).kernel(L)` is faster for tens of states, because
    it is a few matrix products.

    Args:
        system: of A = DPLR(lam, p, q), one system or a batch [...].
        dt: the step.
        L: lags, at least 1.

    Returns:
        [...,L,O,I] complex, in the system's precision.

    Raises:
        ValueError: if A is not a DPLR, or the kernel overflows.
    """
    A = system.A
    if not isinstance(A, DPLR):
        raise fail("system.A", type(A).__name__, "DPLR(lam, p, q)", "system.discretize().kernel(L)")
    if not is_whole(L, 1):
        raise fail("L", repr(L), "a number of steps, at least 1", "s4_kernel(system, dt, 1000)")
    wide = system.to(torch.complex128)
    stepped = wide.discretize(dt, "bilinear")
    reach = torch.linalg.matrix_power(stepped.matrix.dense(), L)
    C = wide.C - wide.C @ reach
    assert isinstance(wide.A, DPLR)
    half = torch.as_tensor(dt, dtype=torch.float64, device=system.device)[..., None, None] / 2
    parts = [
        _generating(wide.A, wide.B, C, half, k, L)
        for k in torch.arange(L, device=system.device).split(CHUNK)
    ]
    kernel = torch.fft.ifft(torch.cat(parts, -3), dim=-3)
    if not bool(kernel.isfinite().all()):
        raise fail("system.A", "a kernel that overflows", "one that stays finite", "a shorter L")
    return kernel.to(torch.promote_types(system.dtype, torch.complex64))


def _generating(A: DPLR, B: Tensor, C: Tensor, half: Tensor, k: Tensor, L: int) -> Tensor:
    """C~ [(1 - z) - (1 + z) dt/2 A]^-1 dt B at z = e^(-2 pi i k / L): [...,K,O,I]."""
    # With a = pi k / L: 1 - z = 2i sin(a) e^(-ia) and 1 + z = 2 cos(a) e^(-ia), neither of which
    # cancels near z = 1 or z = -1.
    angle = math.pi * k.double() / L
    turn = torch.exp(-1j * angle)
    minus, plus = 2j * angle.sin() * turn, 2 * angle.cos() * turn
    gain = half * plus[:, None]  # [...,K,1]: (1 + z) dt/2
    cauchy = 1 / (minus[:, None] - gain * A.lam[..., None, :])  # [...,K,N]

    rows, columns = _beside(C.mT, A.q.conj()), _beside(B, A.p)  # [...,N,O+r] and [...,N,I+r]
    weights = rows[..., :, None] * columns[..., None, :]
    sums = (cauchy @ weights.flatten(-2)).unflatten(-1, weights.shape[-2:])
    O, inputs = C.shape[-2], B.shape[-1]
    direct, to_p = sums[..., :O, :inputs], sums[..., :O, inputs:]
    from_q, loop = sums[..., O:, :inputs], sums[..., O:, inputs:]
    eye = torch.eye(loop.shape[-1], dtype=loop.dtype, device=loop.device)
    back = torch.linalg.solve(eye + gain[..., None] * loop, from_q)
    return 2 * half[..., None] * (direct - gain[..., None] * (to_p @ back))


def _beside(x: Tensor, y: Tensor) -> Tensor:
    """Columns of both, their batches broadcast."""
    batch = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    return torch.cat([t.expand(*batch, *t.shape[-2:]) for t in (x, y)], -1)
