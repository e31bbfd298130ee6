"""Where the poles of a diagonal state space model start.

Gu et al. 2022, "On the parameterization and initialization of diagonal state space models"
(arXiv:2206.11893, section 4). Poles come in conjugate pairs; of each pair one is given, so a state
of N numbers has N/2 poles here and its read-out is twice a real part.
"""

import math

import torch
from torch import Tensor

from subquad.recurrence.validate import choose, fail


def legs_normal_part(N: int) -> Tensor:
    """HiPPO-LegS plus its rank-one correction P P^T, P_n = sqrt(n + 1/2): [N,N] float64.

    HiPPO-LegS (Gu et al. 2020): A_nk = -sqrt((2n+1)(2k+1)) below the diagonal, -(n+1) on it. The
    sum is -I/2 plus a skew-symmetric matrix, hence normal, unlike A itself (Gu et al. 2022, S4).
    """
    n = torch.arange(N, dtype=torch.float64)
    root = (2 * n + 1).sqrt()
    A = -torch.tril(root[:, None] * root, -1) - torch.diag(n + 1)
    P = (n + 0.5).sqrt()
    return A + P[:, None] * P


def poles(init: str, N: int) -> Tensor:
    """N/2 poles, [N/2] complex128, all with a real part below zero.

    Args:
        init: "legs", the eigenvalues of HiPPO-LegS's normal part; "inv" and "lin", the closed forms
            that approximate these and the Fourier basis; "real", -1, -2, ... without oscillation.
        N: the size of the (real) state, even.
    """
    choose("init", init, ("legs", "inv", "lin", "real"))
    if not isinstance(N, int) or N < 2 or N % 2:
        raise fail("state_size", repr(N), "an even number, at least 2", "poles come in pairs")
    n = torch.arange(N // 2, dtype=torch.float64)
    if init == "real":
        return torch.complex(-(n + 1), torch.zeros_like(n))
    if init == "lin":
        imaginary = math.pi * n
    elif init == "inv":
        imaginary = N / math.pi * (N / (2 * n + 1) - 1)
    else:
        skew = legs_normal_part(N) + 0.5 * torch.eye(N, dtype=torch.float64)
        imaginary = torch.linalg.eigvalsh(-1j * skew)[N // 2 :]  # Hermitian; +-w in pairs
    return torch.complex(torch.full_like(n, -0.5), imaginary)
