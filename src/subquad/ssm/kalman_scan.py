"""Filter and smoother for all times at once: Särkkä and García-Fernández 2021, arXiv:1905.13002.

A filter step is an element (A, b, C, eta, J): given the state before, the state after is
N(A x + b, C), and the observation's likelihood is proportional to N(eta, J) in information form.
Two steps in a row are one such element again; that operation is associative (section IV there), so
that all prefixes come from a scan. So do smoothers, backwards.

Time is the first dimension here.   T time   ... any batch   N state size   O outputs
"""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.ssm.kalman import (
    Filtered,
    Model,
    Smoothed,
    Terms,
    backward_terms,
    finish,
    gain,
    joseph,
    symmetric,
    update,
)
from subquad.ssm.scan import Elements, associative_scan


def filter(model: Model, y: Tensor, seen: Tensor, u: Tensor) -> Filtered:
    """Every filtered state, then every prediction and likelihood from these."""
    terms = Terms.of(model, y, seen, u)
    _, mean, cov, _, _ = associative_scan(_after, _steps(terms))
    mean, cov = mean.movedim(0, -2), cov.movedim(0, -3)
    A = terms.A[..., None, :, :]
    ahead_mean = (A @ mean[..., :-1, :, None])[..., 0] + terms.moved[..., :-1, :]
    ahead_cov = symmetric(A @ cov[..., :-1, :, :] @ A.mT + terms.Q[..., None, :, :])
    predicted_mean = _prepend(terms.mean[..., None, :], ahead_mean, -2)
    predicted_cov = _prepend(terms.cov[..., None, :, :], ahead_cov, -3)
    return finish(terms, mean, cov, predicted_mean, predicted_cov)


def _steps(terms: Terms) -> Elements:
    """The elements, [T,...] each. The first begins with the prior: its A is zero."""
    A, Q = terms.A[..., None, :, :], terms.Q[..., None, :, :]
    # Into step k moves the input of step k - 1; the first is replaced below.
    b = torch.cat([torch.zeros_like(terms.moved[..., :1, :]), terms.moved[..., :-1, :]], -2)
    C, R = terms.C, terms.R
    K = gain(Q, C, R)
    error = terms.y[..., None] - C @ b[..., None]
    factor, _ = torch.linalg.cholesky_ex(symmetric(C @ Q @ C.mT + R))
    white = torch.linalg.solve_triangular(factor, C @ A, upper=False)
    matrix = A - K @ (C @ A)
    offset = b[..., None] + K @ error
    eta = white.mT @ torch.linalg.solve_triangular(factor, error, upper=False)
    elements = [matrix, offset[..., 0], joseph(Q, K, C, R), eta[..., 0], white.mT @ white]
    first_mean, first_cov = update(terms.mean, terms.cov, *terms.at(0))
    return _begin(elements, first_mean, first_cov)


def _begin(elements: list[Tensor], mean: Tensor, cov: Tensor) -> Elements:
    """Time first, one batch for all, and the first element put in its place."""
    ranks = (2, 1, 2, 1, 2)
    T = max(x.shape[-rank - 1] for x, rank in zip(elements, ranks))
    batches = [x.shape[: -rank - 1] for x, rank in zip(elements, ranks)]
    batch = torch.broadcast_shapes(*batches, mean.shape[:-1], cov.shape[:-2])
    firsts = (torch.zeros_like(cov), mean, cov, torch.zeros_like(mean), torch.zeros_like(cov))
    rows = []
    for x, first, rank in zip(elements, firsts, ranks):
        shape = x.shape[-rank:]
        x = x.expand(*batch, T, *shape).movedim(-rank - 1, 0)
        rows.append(torch.cat([first.expand(*batch, *shape)[None], x[1:]]))
    return tuple(rows)


def _after(early: Elements, late: Elements) -> Elements:
    """Both steps as one."""
    A1, b1, C1, eta1, J1 = early
    A2, b2, C2, eta2, J2 = late
    eye = torch.eye(A1.shape[-1], dtype=A1.dtype, device=A1.device)
    # A2 (1 + C1 J2)^-1 and A1^T (1 + J2 C1)^-1, whose inverses are each other's transposes
    inner = eye + C1 @ J2
    forth = torch.linalg.solve_ex(inner, A2, left=False)[0]
    back = torch.linalg.solve_ex(inner, A1)[0].mT
    A = forth @ A1
    b = (forth @ (b1[..., None] + C1 @ eta2[..., None]))[..., 0] + b2
    C = symmetric(forth @ C1 @ A2.mT) + C2
    eta = (back @ (eta2[..., None] - J2 @ b1[..., None]))[..., 0] + eta1
    J = symmetric(back @ J2 @ A1) + J1
    return A, b, C, eta, J


def smooth(model: Model, filtered: Filtered) -> Smoothed:
    """The backward conditionals composed from the end: element (E, g, L) is x_k ~ N(E x + g, L)."""
    E, base, rest = backward_terms(model, filtered)
    last_mean, last_cov = filtered.mean[..., -1:, :], filtered.cov[..., -1:, :, :]
    elements = (
        torch.cat([E, torch.zeros_like(last_cov)], -3).movedim(-3, 0).flip(0),
        torch.cat([base, last_mean], -2).movedim(-2, 0).flip(0),
        torch.cat([rest, last_cov], -3).movedim(-3, 0).flip(0),
    )
    _, mean, cov = (x.flip(0) for x in associative_scan(_before, elements))
    return Smoothed(mean.movedim(0, -2), cov.movedim(0, -3), filtered)


def _before(later: Elements, earlier: Elements) -> Elements:
    """The earlier state given what the later one is given."""
    E2, g2, L2 = later
    E1, g1, L1 = earlier
    return E1 @ E2, (E1 @ g2[..., None])[..., 0] + g1, symmetric(E1 @ L2 @ E1.mT) + L1


def _prepend(first: Tensor, rest: Tensor, dim: int) -> Tensor:
    """first, its batch expanded to that of the rest, then the rest, along dim."""
    shape = list(
        torch.broadcast_shapes(first.shape, rest.narrow(dim, 0, min(1, rest.shape[dim])).shape)
    )
    shape[dim] = 1
    return torch.cat([first.expand(shape), rest], dim)
