"""The Kalman filter and the Rauch-Tung-Striebel smoother, step by step.

Covariances are updated as sums of squares X P X^T (Joseph's form), never as differences, and so
keep their eigenvalues positive. They depend on what was observed, not on the values: sequences that
share a model and have no gaps share their covariances.

    ... any batch   T time   N state size   O outputs
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from subquad.errors import fail
from subquad.ssm.discrete import DiscreteStateSpace


class Model(Protocol):
    """What of a `GaussianStateSpace` the filters read."""

    @property
    def system(self) -> DiscreteStateSpace: ...

    @property
    def Q(self) -> Tensor: ...

    @property
    def R(self) -> Tensor: ...

    @property
    def mean(self) -> Tensor | None: ...

    @property
    def cov(self) -> Tensor | None: ...


@dataclass(frozen=True, eq=False)
class Filtered:
    """The states given the observations up to each time, and up to just before it.

    Attributes:
        mean, cov: [...,T,N] and [...,T,N,N], given y_0 ... y_k.
        predicted_mean, predicted_cov: the same given y_0 ... y_{k-1}.
        log_likelihoods: [...,T], log p(y_k | y_0 ... y_{k-1}); 0 where nothing was observed.
    """

    mean: Tensor
    cov: Tensor
    predicted_mean: Tensor
    predicted_cov: Tensor
    log_likelihoods: Tensor

    @property
    def log_likelihood(self) -> Tensor:
        """log p(y), [...]."""
        return self.log_likelihoods.sum(-1)

    def to(self, dtype: torch.dtype) -> Filtered:
        return Filtered(*(getattr(self, field.name).to(dtype) for field in fields(self)))


@dataclass(frozen=True, eq=False)
class Smoothed:
    """The states given all observations: mean [...,T,N], cov [...,T,N,N]."""

    mean: Tensor
    cov: Tensor
    filtered: Filtered

    def to(self, dtype: torch.dtype) -> Smoothed:
        return Smoothed(self.mean.to(dtype), self.cov.to(dtype), self.filtered.to(dtype))


@dataclass(frozen=True, eq=False)
class Terms:
    """A model and its data, laid out for every step: what both forms of the filter start from.

    A row of C that was not observed is zero, its noise independent and of variance one: it then
    changes nothing and adds nothing to the likelihood but a constant, which is left out.
    """

    A: Tensor  # [...,N,N]
    Q: Tensor  # [...,N,N]
    C: Tensor  # [...,T or 1,O,N]
    R: Tensor  # [...,T or 1,O,O]
    y: Tensor  # [...,T,O], less D u; 0 where not observed
    moved: Tensor  # [...,T,N], B u
    count: Tensor  # [...,T or 1], how many outputs were observed
    mean: Tensor  # [...,N]
    cov: Tensor  # [...,N,N]

    @staticmethod
    def of(model: Model, y: Tensor, seen: Tensor, u: Tensor) -> Terms:
        system, dtype = model.system, y.dtype
        A, B, C, D = (
            x.to(dtype) for x in (system.matrix.dense(), system.B, system.C, system.through)
        )
        assert model.mean is not None and model.cov is not None
        C, R = C[..., None, :, :], model.R.to(dtype)[..., None, :, :]
        y = y - (D[..., None, :, :] @ u[..., None])[..., 0]
        moved = (B[..., None, :, :] @ u[..., None])[..., 0]
        if bool(seen.all()):
            count = torch.full((1,), float(seen.shape[-1]), dtype=dtype, device=y.device)
        else:
            here = seen.to(dtype)
            C, y, count = C * here[..., None], y * here, here.sum(-1)
            R = R * here[..., None] * here[..., None, :] + torch.diag_embed(1 - here)
        Q, mean, cov = (x.to(dtype) for x in (model.Q, model.mean, model.cov))
        return Terms(A, Q, C, R, y, moved, count, mean, cov)

    def at(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """C [...,O,N], R [...,O,O] and y [...,O] of step k."""
        j = k if self.C.shape[-3] > 1 else 0
        return (
            self.C[..., j, :, :],
            self.R[..., k if self.R.shape[-3] > 1 else 0, :, :],
            self.y[..., k, :],
        )


def filter(model: Model, y: Tensor, seen: Tensor, u: Tensor) -> Filtered:
    """Predict, update, predict, ... The arguments are those of `GaussianStateSpace._check_run`."""
    terms = Terms.of(model, y, seen, u)
    predicted_means, predicted_covs, means, covs = [], [], [], []
    m, P = terms.mean, terms.cov
    for k in range(y.shape[-2]):
        predicted_means.append(m)
        predicted_covs.append(P)
        m, P = update(m, P, *terms.at(k))
        means.append(m)
        covs.append(P)
        m = (terms.A @ m[..., None])[..., 0] + terms.moved[..., k, :]
        P = symmetric(terms.A @ P @ terms.A.mT + terms.Q)
    stacked = [_stack(x, -2) for x in (means, predicted_means)]
    covariances = [_stack(x, -3) for x in (covs, predicted_covs)]
    return finish(terms, stacked[0], covariances[0], stacked[1], covariances[1])


def update(m: Tensor, P: Tensor, C: Tensor, R: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """A state's mean [...,N] and covariance [...,N,N] once y [...,O] is seen."""
    K = gain(P, C, R)
    error = y[..., None] - C @ m[..., None]
    return m + (K @ error)[..., 0], joseph(P, K, C, R)


def gain(P: Tensor, C: Tensor, R: Tensor) -> Tensor:
    """P C^T (C P C^T + R)^-1: [...,N,O]."""
    factor, _ = torch.linalg.cholesky_ex(symmetric(C @ P @ C.mT + R))
    return torch.cholesky_solve(C @ P, factor).mT


def joseph(P: Tensor, K: Tensor, C: Tensor, R: Tensor) -> Tensor:
    """(1 - K C) P (1 - K C)^T + K R K^T: a sum of two squares, whatever K was rounded to."""
    rest = torch.eye(P.shape[-1], dtype=P.dtype, device=P.device) - K @ C
    return symmetric(rest @ P @ rest.mT + K @ R @ K.mT)


def finish(
    terms: Terms, mean: Tensor, cov: Tensor, predicted_mean: Tensor, predicted_cov: Tensor
) -> Filtered:
    """The result, with the likelihood of every step: all steps at once."""
    error = terms.y[..., None] - terms.C @ predicted_mean[..., None]  # [...,T,O,1]
    S = symmetric(terms.C @ predicted_cov @ terms.C.mT + terms.R)
    factor, info = torch.linalg.cholesky_ex(S)
    if bool((info != 0).any()):
        raise fail(
            "R",
            "observations that the model knows without any doubt (C P C^T + R is singular)",
            "noise in every observation",
            "a small R, such as 1e-6 of its signal's variance, on the diagonal",
        )
    white = torch.linalg.solve_triangular(factor, error, upper=False)[..., 0]
    logdet = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    likelihoods = -(white.square().sum(-1) + logdet + terms.count * math.log(2 * math.pi)) / 2
    batch = torch.broadcast_shapes(likelihoods.shape, mean.shape[:-1], cov.shape[:-2])
    N = mean.shape[-1]
    means = (x.expand(*batch, N) for x in (mean, predicted_mean))
    covs = (x.expand(*batch, N, N) for x in (cov, predicted_cov))
    (m, pm), (P, PP) = means, covs
    return Filtered(m, P, pm, PP, likelihoods.expand(batch))


def smooth(model: Model, filtered: Filtered) -> Smoothed:
    """Backwards from the last state: each given the whole future."""
    E, base, rest = backward_terms(model, filtered)
    m, P = filtered.mean[..., -1, :], filtered.cov[..., -1, :, :]
    means, covs = [m], [P]
    for k in range(E.shape[-3] - 1, -1, -1):
        m = base[..., k, :] + (E[..., k, :, :] @ m[..., None])[..., 0]
        P = symmetric(E[..., k, :, :] @ P @ E[..., k, :, :].mT + rest[..., k, :, :])
        means.append(m)
        covs.append(P)
    return Smoothed(torch.stack(means[::-1], -2), torch.stack(covs[::-1], -3), filtered)


def backward_terms(model: Model, filtered: Filtered) -> tuple[Tensor, Tensor, Tensor]:
    """x_k given x_{k+1} and the past is N(E x_{k+1} + base, rest), for k < T - 1.

    E = P_k A^T (A P_k A^T + Q)^-1: [...,T-1,N,N]; base [...,T-1,N]; rest [...,T-1,N,N], in Joseph's
    form. Where the prediction is singular (states known without doubt), by its pseudoinverse.
    """
    A = model.system.matrix.dense().double()[..., None, :, :]
    Q = model.Q.double()[..., None, :, :]
    P, ahead = filtered.cov[..., :-1, :, :], filtered.predicted_cov[..., 1:, :, :]
    factor, info = torch.linalg.cholesky_ex(ahead)
    if bool((info == 0).all()):
        E = torch.cholesky_solve(A @ P, factor).mT
    else:
        E = P @ A.mT @ torch.linalg.pinv(ahead, hermitian=True)
    base = filtered.mean[..., :-1, :] - (E @ filtered.predicted_mean[..., 1:, :, None])[..., 0]
    keep = torch.eye(P.shape[-1], dtype=P.dtype, device=P.device) - E @ A
    return E, base, symmetric(keep @ P @ keep.mT + E @ Q @ E.mT)


def symmetric(x: Tensor) -> Tensor:
    return (x + x.mT) / 2


def _stack(parts: list[Tensor], dim: int) -> Tensor:
    """Stacked, once all have the batch of the last (the first may be shared by more sequences)."""
    shape = torch.broadcast_shapes(*(x.shape for x in parts))
    return torch.stack([x.expand(shape) for x in parts], dim)
