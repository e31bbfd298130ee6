"""From x' = A x + B u in continuous time to x_{k+1} = A_bar x_k + B_bar u_k, a step dt apart.

With a share alpha of the slope taken at the end of the step, the classical methods are one formula,

    A_bar = (1 - alpha dt A)^-1 (1 + (1 - alpha) dt A)        B_bar = (1 - alpha dt A)^-1 dt B

alpha = 0 is forward Euler, 1 backward Euler, 1/2 the bilinear (Tustin, trapezoid) rule. Zero-order
hold is exact for an input that is constant during each step: A_bar = e^(dt A), B_bar its integral.
"""

import torch
from torch import Tensor

from subquad.errors import choose, fail
from subquad.ssm.matrix import DPLR, Dense, Diagonal, Singular, StateMatrix

ALPHAS = {"euler": 0.0, "bilinear": 0.5, "backward_euler": 1.0}
METHODS = ("zoh", *ALPHAS)


def expm1(z: Tensor) -> Tensor:
    """e^z - 1, accurate also where z is small; for complex z too.

    e^(x+iy) - 1 = (expm1(x) cos y - 2 sin^2(y/2)) + i e^x sin y: no two large numbers cancel.
    """
    if not z.is_complex():
        return torch.expm1(z)
    x, y = z.real, z.imag
    real = torch.expm1(x) * y.cos() - 2 * (y / 2).sin().square()
    return torch.complex(real, x.exp() * y.sin())


def phi1(z: Tensor) -> Tensor:
    """(e^z - 1) / z, with its limit 1 at z = 0; the gradients are right there, too."""
    small = z.abs() < 1e-2
    z_small, z_large = torch.where(small, z, 0), torch.where(small, 1, z)
    series = torch.ones_like(z)
    for n in range(8, 1, -1):  # 1 + z/2 (1 + z/3 (1 + ...)): the next term is below 1e-21
        series = 1 + z_small / n * series
    return torch.where(small, series, expm1(z_large) / z_large)


def exponential(M: Tensor) -> Tensor:
    """e^M of matrices [...,N,N], with gradients.

    A batch of one goes in twice: for a lone matrix of 1-norm between 0.007 and 0.05 PyTorch 2.13
    is off by up to 1.3e-10 in double precision, for one among others it is not. That is much for
    the step of a system, which takes millions of them.
    """
    if M.shape[:-2].numel() > 1:
        return torch.linalg.matrix_exp(M)
    return torch.linalg.matrix_exp(M.expand(2, *M.shape))[0]


def zero_order_hold(dt: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Hold the input for a step: A_bar = e^(dt A), B_bar = A^-1 (e^(dt A) - 1), for B = 1.

    Gu et al. 2022, "On the parameterization and initialization of diagonal state space models"
    (arXiv:2206.11893, section 3.1).

    Args:
        dt: [...] real.
        A: [...,N] real or complex; at A = 0 B_bar is its limit dt.

    Returns:
        log A_bar = dt A and B_bar, each [...,N].
    """
    log_A_bar = dt[..., None] * A
    return log_A_bar, dt[..., None] * phi1(log_A_bar)


def discretize(A: StateMatrix, B: Tensor, dt: Tensor, method: str) -> tuple[StateMatrix, Tensor]:
    """A_bar and B_bar. Diagonal stays diagonal; DPLR stays DPLR unless held, which makes it dense.

    Args:
        A: the state matrix, of batch shape [...].
        B: [...,N,I].
        dt: [...] real, positive.
        method: "zoh", "bilinear", "euler" (forward) or "backward_euler".

    Raises:
        ValueError: if I - alpha dt A has no inverse (bilinear, backward Euler).
    """
    choose("method", method, METHODS)
    if method == "zoh":
        return _hold(A, B, dt)
    if method == "euler":
        return A.affine(dt, 1.0), dt[..., None, None] * B
    alpha = ALPHAS[method]
    try:
        inverse = A.affine(-alpha * dt, 1.0).inverse()
    except Singular:
        what = "I - dt A" if alpha == 1 else f"I - {alpha:g} dt A"
        what += ", or its diagonal part, is" if isinstance(A, DPLR) else " is"
        raise fail(
            "dt",
            f"{dt.tolist()}, for which {what} singular",
            f"no eigenvalue of A at {1 / alpha:g} / dt (method={method!r} divides by it)",
            "take another dt, or method='zoh', which has no such step",
        ) from None
    # (1 + (1 - alpha) dt A) written without A, which is (1 - inverse^-1) / (alpha dt)
    return inverse.affine(1 / alpha, 1 - 1 / alpha), inverse @ (dt[..., None, None] * B)


def _hold(A: StateMatrix, B: Tensor, dt: Tensor) -> tuple[StateMatrix, Tensor]:
    if isinstance(A, Diagonal):
        log_A_bar, B_bar = zero_order_hold(dt, A.lam)
        return Diagonal(log_A_bar.exp()), B_bar[..., None] * B
    # exp [[A, B], [0, 0]] holds both, and never divides by A, which may be singular.
    N, dense = A.size, A.dense()
    batch = torch.broadcast_shapes(dense.shape[:-2], B.shape[:-2], dt.shape)
    both = torch.cat([dense.expand(*batch, N, N), B.expand(*batch, *B.shape[-2:])], -1)
    both = torch.nn.functional.pad(both, (0, 0, 0, B.shape[-1]))
    held = exponential(dt[..., None, None] * both)
    return Dense(held[..., :N, :N]), held[..., :N, N:]
