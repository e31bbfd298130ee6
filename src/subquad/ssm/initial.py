"""Where the poles of a diagonal state space model start.

Gu et al. 2022, "On the parameterization and initialization of diagonal state space models"
(arXiv:2206.11893, section 4). Poles come in conjugate pairs; of each pair one is given, so a state
of N numbers has N/2 poles here and its read-out is twice a real part.
"""

import math

import torch
from torch import Tensor

from subquad.errors import choose, fail, is_whole
from subquad.ssm.nplr import nplr


def poles(init: str, N: int) -> Tensor:
    """N/2 poles, [N/2] complex128, all with a real part below zero.

    Args:
        init: "legs", the eigenvalues of HiPPO-LegS's normal part; "inv" and "lin", the closed forms
            that approximate these and the Fourier basis; "real", -1, -2, ... without oscillation.
        N: the size of the (real) state, even.
    """
    choose("init", init, ("legs", "inv", "lin", "real"))
    if not is_whole(N, 2) or N % 2:
        raise fail("N", repr(N), "an even number, at least 2", "poles come in pairs")
    n = torch.arange(N // 2, dtype=torch.float64)
    if init == "real":
        return torch.complex(-(n + 1), torch.zeros_like(n))
    if init == "lin":
        imaginary = math.pi * n
    elif init == "inv":
        imaginary = N / math.pi * (N / (2 * n + 1) - 1)
    else:
        imaginary = nplr("legs", N).lam.imag[N // 2 :]  # +-w in pairs, sorted
    return torch.complex(torch.full_like(n, -0.5), imaginary)
