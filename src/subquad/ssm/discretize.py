"""From x' = A x + B u in continuous time to h_t = A_bar h_{t-1} + B_bar u_t, a step dt apart."""

import torch
from torch import Tensor


def expm1(z: Tensor) -> Tensor:
    """e^z - 1 for complex z, accurate also where z is small.

    e^(x+iy) - 1 = (expm1(x) cos y - 2 sin^2(y/2)) + i e^x sin y: no two large numbers cancel.
    """
    x, y = z.real, z.imag
    real = torch.expm1(x) * y.cos() - 2 * (y / 2).sin().square()
    return torch.complex(real, x.exp() * y.sin())


def zero_order_hold(dt: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Hold the input for a step: A_bar = e^(dt A), B_bar = A^-1 (e^(dt A) - 1), for B = 1.

    Gu et al. 2022, "On the parameterization and initialization of diagonal state space models"
    (arXiv:2206.11893, section 3.1).

    Args:
        dt: [D] real and positive.
        A: [D,N] complex, not zero.

    Returns:
        log A_bar = dt A and B_bar, each [D,N] complex.
    """
    log_A_bar = dt[:, None] * A
    return log_A_bar, expm1(log_A_bar) / A
