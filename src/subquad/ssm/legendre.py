"""HiPPO's matrices, and the Legendre polynomials from which they come.

Gu, Dao, Ermon, Rudra and Re 2020 (arXiv:2008.07669): which past is weighed how gives A and B.
Everything is float64: the matrices have entries of size N.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from subquad.errors import fail, is_whole


def legs(N: int) -> tuple[Tensor, Tensor]:
    """HiPPO-LegS, A [N,N] and B [N,1] (float64), in c' = (A c + B f) / t.

    A_nk = -sqrt((2n+1)(2k+1)) below the diagonal, -(n+1) on it, 0 above; B_n = sqrt(2n+1)
    (arXiv:2008.07669, theorem 2, with the sign inside A).
    """
    root = _roots(N)
    n = torch.arange(N, dtype=torch.float64)
    return -torch.tril(root[:, None] * root, -1) - torch.diag(n + 1), root[:, None]


def legt(N: int) -> tuple[Tensor, Tensor]:
    """HiPPO-LegT for a window of 1, A [N,N] and B [N,1]; divide both by the window's length.

    A_nk = -sqrt((2n+1)(2k+1)) times 1 for k <= n and (-1)^(n-k) above; B_n = sqrt(2n+1)
    (arXiv:2008.07669, appendix D.1, orthonormal scaling). The S4 code base halves both: a window
    of 2.
    """
    root = _roots(N)
    return -root[:, None] * _signs(N) * root, root[:, None]


def lmu(N: int) -> tuple[Tensor, Tensor]:
    """LegT as the Legendre Memory Unit scales it: c_n is (-1)^n sqrt(2n+1) times that of `legt`.

    A_nk = (2n+1) times -1 for n < k and (-1)^(n-k+1) otherwise; B_n = (2n+1)(-1)^n (Voelker,
    Kajic and Eliasmith 2019, equations 1 and 2; arXiv:2008.07669, theorem 1).
    """
    A, B = legt(N)
    scale = lmu_scale(N)
    return scale[:, None] * A / scale, scale[:, None] * B


def lmu_scale(N: int) -> Tensor:
    """(-1)^n sqrt(2n+1): coefficients of "lmu" over those of "legt", [N]."""
    return _alternating(N) * _roots(N)


def legendre(position: Tensor, N: int) -> Tensor:
    """sqrt(2n+1) P_n(2 position - 1) for n < N, orthonormal on [0, 1]: [...] -> [...,N] float64."""
    z = 2 * position.double() - 1
    values = [torch.ones_like(z), z]
    for n in range(1, N - 1):  # Bonnet's recursion
        values.append(((2 * n + 1) * z * values[-1] - n * values[-2]) / (n + 1))
    return torch.stack(values[:N], -1) * _roots(N).to(z.device)


def stretch(k: Tensor, N: int) -> tuple[Tensor, Tensor]:
    """The exact LegS step from time k to k+1, e^(A log((k+1)/k)), without an exponential.

    Without new input the past is stretched: with r = k/(k+1) the step maps a polynomial p on [0, 1]
    to the projection of p(y/r) on [0, r], 0 beyond. Its matrix r int p_n(r y) p_k(y) dy is what N
    Gauss-Legendre nodes integrate exactly, in less than half an exponential's time, and at k = 0,
    too, where the exponent is infinite. A constant signal keeps its coefficients, e_0 = A_bar e_0 +
    B_bar, which gives B_bar.
    """
    y, w = (torch.from_numpy(x).to(k.device) for x in _gauss(N))
    r = (k / (k + 1))[..., None]
    after = legendre(r * y, N)  # [...,nodes,N]
    A_bar = r[..., None] * (after.mT * w) @ legendre(y, N)
    B_bar = -A_bar[..., 0]
    B_bar[..., 0] += 1
    return A_bar, B_bar


@lru_cache
def _gauss(N: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of Gauss-Legendre quadrature on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(N)
    return (nodes + 1) / 2, weights / 2


def _roots(N: int) -> Tensor:
    """sqrt(2n+1), [N]."""
    check_size(N)
    return (2 * torch.arange(N, dtype=torch.float64) + 1).sqrt()


def _alternating(N: int) -> Tensor:
    return 1 - 2 * (torch.arange(N) % 2).double()


def _signs(N: int) -> Tensor:
    """1 on and below the diagonal, (-1)^(n-k) above: [N,N]."""
    ones = torch.ones(N, N, dtype=torch.float64)
    sign = _alternating(N)
    return torch.tril(ones) + torch.triu(sign[:, None] * sign, 1)


def check_size(N: object) -> None:
    if not is_whole(N, 1):
        raise fail("N", repr(N), "a whole number of coefficients, at least 1", "e.g. 64")
