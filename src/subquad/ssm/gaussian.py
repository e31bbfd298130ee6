"""Linear systems with Gaussian noise: filtered, smoothed, judged by their likelihood.

x_{k+1} = A x_k + B u_k + w_k    w_k ~ N(0, Q)
y_k     = C x_k + D u_k + v_k    v_k ~ N(0, R)        x_0 ~ N(mean, cov)

... any batch   T time   N state size   I inputs   O outputs
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from subquad.errors import choose, fail, is_whole
from subquad.ssm import kalman, kalman_scan
from subquad.ssm.continuous import StateSpace
from subquad.ssm.discrete import DiscreteStateSpace
from subquad.ssm.discretize import exponential
from subquad.ssm.kalman import Filtered, Smoothed
from subquad.ssm.matrix import check_parameter
from subquad.ssm.system import check_batch, check_signal

FORMS = ("recurrent", "parallel")


@dataclass(frozen=True, eq=False)
class GaussianStateSpace:
    """A discrete system whose state and outputs are noisy.

        model = GaussianStateSpace(system, Q=[[1.0]], R=[[15.0]], cov=[[1e6]])
        model.log_likelihood(y)                # differentiable: fit Q and R by gradients
        past = model.smooth(y)                 # past.mean [...,T,N], past.cov [...,T,N,N]

    Args:
        system: a real `DiscreteStateSpace`. One without inputs has a B of zeros.
        Q: [...,N,N], the covariance of what disturbs the state in one step.
        R: [...,O,O], the covariance of what disturbs an observation.
        mean, cov: [...,N] and [...,N,N], the state before the first observation. A mean of None
            is zero. A cov of None is the stationary one, which only a stable system has; a large
            one says that nothing is known.

    Raises:
        ValueError: for shapes that do not fit, matrices that are no covariances, or no stationary
            state.
    """

    system: DiscreteStateSpace
    Q: Tensor
    R: Tensor
    mean: Tensor | None = None
    cov: Tensor | None = None

    def __post_init__(self) -> None:
        system = self.system
        if not isinstance(system, DiscreteStateSpace):
            fix = "GaussianStateSpace.sampled(system, dt, ...) for a continuous one"
            raise fail("system", type(system).__name__, "a DiscreteStateSpace", fix)
        if system.dtype.is_complex:
            raise fail("system", system.dtype, "a real system", "use its real form")
        N, O = system.state_size, system.outputs
        values = {"Q": self._covariance("Q", self.Q, N), "R": self._covariance("R", self.R, O)}
        if self.mean is None:
            values["mean"] = values["Q"].new_zeros(N)
        else:
            mean = self._numbers("mean", self.mean, 1)
            if mean.shape[-1] != N:
                raise fail("mean", f"shape {tuple(mean.shape)}", f"[...,{N}]", "one a state number")
            values["mean"] = mean
        if self.cov is None:
            values["cov"] = stationary_covariance(system, values["Q"])
        else:
            values["cov"] = self._covariance("cov", self.cov, N)
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def sampled(
        cls,
        system: StateSpace,
        dt: float | Tensor,
        Q: Tensor,
        R: Tensor,
        mean: Tensor | None = None,
        cov: Tensor | None = None,
    ) -> GaussianStateSpace:
        """x' = A x + B u + white noise, observed every dt; the input is held between.

        Args:
            Q: [...,N,N], the spectral density of the noise: its covariance a unit of time.
        """
        if not isinstance(system, StateSpace):
            raise fail("system", type(system).__name__, "a StateSpace", "GaussianStateSpace(...)")
        digital = system.discretize(dt)
        density = cls._checked("Q", Q, system.state_size, digital)
        return cls(digital, noise_in_a_step(system, density, dt), R, mean, cov)

    def filter(self, y: Tensor, u: Tensor | None = None, form: str = "auto") -> Filtered:
        """What is known of each state from the observations up to it (Kalman 1960).

        Args:
            y: [...,T,O]; NaN where there is no observation, also in some outputs only.
            u: [...,T,I]; None means zeros.
            form: "recurrent", step by step; "parallel", by an associative scan in log2(T) rounds
                (Särkkä and García-Fernández 2021, arXiv:1905.13002), which needs a C Q C^T + R that
                is not singular; "auto": parallel where it can. Equal up to rounding. All arithmetic
                is in float64.

        Returns:
            `Filtered`: mean, cov, predicted_mean, predicted_cov, log_likelihoods.

        Raises:
            ValueError: for arguments that do not fit, and if observations have no variance.
        """
        return self._filter(y, u, form).to(self._result_dtype(y))

    def smooth(self, y: Tensor, u: Tensor | None = None, form: str = "auto") -> Smoothed:
        """What is known of each state from all observations (Rauch, Tung and Striebel 1965).

        Arguments and errors as for `filter`.

        Returns:
            `Smoothed`: mean [...,T,N], cov [...,T,N,N] and the filter's result, `filtered`.
        """
        filtered = self._filter(y, u, form)
        run = kalman if self._choose_form(form) == "recurrent" else kalman_scan
        return run.smooth(self, filtered).to(self._result_dtype(y))

    def log_likelihood(self, y: Tensor, u: Tensor | None = None, form: str = "auto") -> Tensor:
        """log p(y), [...]: of the observations that are there. Differentiable in everything."""
        return self.filter(y, u, form).log_likelihood

    def sample(
        self, T: int, u: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw states [...,T,N] and observations [...,T,O]."""
        if not is_whole(T, 1):
            raise fail("T", repr(T), "a number of steps, at least 1", "sample(100)")
        system, batch = self.system, self.batch

        def draw(cov: Tensor, *shape: int) -> Tensor:
            noise = torch.randn(*batch, *shape, cov.shape[-1], generator=generator, dtype=cov.dtype)
            return (_root(cov) @ noise.to(cov.device)[..., None])[..., 0]

        assert self.mean is not None and self.cov is not None
        u = self.Q.new_zeros(T, system.inputs) if u is None else u
        u = check_signal("u", u, system, system.inputs, "[...,T,I]")
        if u.shape[-2] != T:
            raise fail("u", f"shape {tuple(u.shape)}", f"[...,{T},{system.inputs}]", "T of them")
        Q, R = self.Q[..., None, :, :], self.R[..., None, :, :]
        process, noise = draw(Q, T), draw(R, T)
        x, states, outputs = self.mean + draw(self.cov), [], []
        for k in range(T):
            states.append(x)
            y, x = system._step(u[..., k, :], x)
            outputs.append(y + noise[..., k, :])
            x = x + process[..., k, :]
        return torch.stack(states, -2), torch.stack(outputs, -2)

    @property
    def batch(self) -> torch.Size:
        """The shape [...] of models this is."""
        assert self.mean is not None and self.cov is not None
        noise = (self.Q.shape[:-2], self.R.shape[:-2], self.cov.shape[:-2], self.mean.shape[:-1])
        return torch.broadcast_shapes(self.system.batch, *noise)

    def _filter(self, y: Tensor, u: Tensor | None, form: str) -> Filtered:
        """In float64 for any input: a vague prior beside precise observations is more than float32
        can hold in one sum."""
        run = kalman if self._choose_form(form) == "recurrent" else kalman_scan
        return run.filter(self, *self._check_run(y, u))

    def _choose_form(self, form: str) -> str:
        """A step of the scan sees one observation with one step's noise: its variance must not be
        zero. The recurrent form sees it with all that is uncertain."""
        choose("form", form, ("auto", *FORMS))
        if form == "recurrent":
            return form
        C = self.system.C
        _, info = torch.linalg.cholesky_ex((C @ self.Q @ C.mT + self.R).detach().double())
        if bool((info == 0).all()):
            return "parallel"
        if form == "auto":
            return "recurrent"
        raise fail(
            "form",
            "'parallel' for a model whose C Q C^T + R is singular",
            "noise in every observation, or in what it observes",
            "form='recurrent', or a small R",
        )

    def _result_dtype(self, y: Tensor) -> torch.dtype:
        return torch.promote_types(y.dtype, self.Q.dtype)

    def _check_run(self, y: Tensor, u: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """y without its NaN, where it was observed, and u, both in float64."""
        O, I = self.system.outputs, self.system.inputs
        y = check_parameter("y", y, 2, "[...,T,O]")
        if y.is_complex() or y.shape[-1] != O:
            got = f"shape {tuple(y.shape)}, {y.dtype}"
            raise fail("y", got, f"[...,T,{O}] real", "one output is y[..., None]")
        check_batch("y", y.shape[:-2], self.batch)
        seen = ~y.isnan()
        if bool(y.isinf().any()):
            raise fail("y", "infinity", "finite numbers, or NaN where nothing was observed", "NaN")
        if u is None:
            u = y.new_zeros(y.shape[-2], I)
        u = check_parameter("u", u, 2, "[...,T,I]")
        check_batch("u", u.shape[:-2], torch.broadcast_shapes(self.batch, y.shape[:-2]))
        if tuple(u.shape[-2:]) != (y.shape[-2], I) or not bool(u.isfinite().all()):
            want = f"[...,{y.shape[-2]},{I}] finite: as long as y"
            raise fail("u", f"shape {tuple(u.shape)}", want, "check its layout and values")
        return torch.where(seen, y, 0).double(), seen, u.double()

    def _covariance(self, name: str, value: object, size: int) -> Tensor:
        return self._checked(name, value, size, self.system)

    @staticmethod
    def _checked(name: str, value: object, size: int, system: DiscreteStateSpace) -> Tensor:
        """[...,size,size], symmetric, without a negative eigenvalue, as the system's numbers."""
        cov = GaussianStateSpace._convert(name, value, system)
        if cov.ndim < 2 or tuple(cov.shape[-2:]) != (size, size):
            want = f"[...,{size},{size}]"
            raise fail(name, f"shape {tuple(cov.shape)}", want, "a variance v is [[v]]")
        with torch.no_grad():
            scale = cov.abs().amax((-1, -2), keepdim=True)
            tolerance = 1e3 * torch.finfo(cov.dtype).eps * scale
            if bool(((cov - cov.mT).abs() > tolerance).any()):
                raise fail(
                    name, "a matrix that is not symmetric", "a covariance", f"{name} @ {name}.mT"
                )
            least = torch.linalg.eigvalsh(cov)[..., :1, None]
            if bool((least < -size * tolerance).any()):
                got = f"an eigenvalue of {least.min().item():.3g}"
                raise fail(name, got, "a covariance, without negative ones", "L @ L.mT is one")
        return (cov + cov.mT) / 2

    def _numbers(self, name: str, value: object, ndim: int) -> Tensor:
        return check_parameter(name, self._convert(name, value, self.system), ndim, "[...,N]")

    @staticmethod
    def _convert(name: str, value: object, system: DiscreteStateSpace) -> Tensor:
        try:
            x = torch.as_tensor(value, dtype=system.dtype, device=system.device)
        except (TypeError, ValueError, RuntimeError):
            raise fail(name, repr(value)[:60], "numbers", "torch.tensor(...)") from None
        if not bool(x.isfinite().all()):
            raise fail(name, "NaN or infinity", "finite numbers", "look where it was made")
        return x


def stationary_covariance(system: DiscreteStateSpace, Q: Tensor) -> Tensor:
    """P = A P A^T + Q, the covariance that a stable system's state settles at: [...,N,N].

    By doubling, P <- P + F P F^T, F <- F F, which adds twice as many terms of sum A^k Q A^kT each
    time (Smith 1968).

    Raises:
        ValueError: if the system is not stable: its uncertainty grows without end.
    """
    radius = float(system.spectral_radius().detach().max())
    if not radius < 1:
        raise fail(
            "cov",
            f"None for a system of spectral radius {radius:.6g}, whose state never settles",
            "a prior covariance [...,N,N], or a stable system",
            "cov=1e6 * torch.eye(N) if nothing is known of the first state",
        )
    F, P = system.matrix.dense(), Q
    for _ in range(64):
        step = F @ P @ F.mT
        P, F = P + step, F @ F
        if float(step.detach().abs().max()) <= torch.finfo(P.dtype).eps * float(
            P.detach().abs().max()
        ):
            break
    return (P + P.mT) / 2


def noise_in_a_step(system: StateSpace, density: Tensor, dt: float | Tensor) -> Tensor:
    """int_0^dt e^(A s) Q e^(A^T s) ds, what white noise of density Q adds up to: [...,N,N].

    By Van Loan's exponential (1978) over a step so short that it has nothing to overflow, then by
    doubling the step.
    """
    A, N = system.matrix.dense(), system.state_size
    step = torch.as_tensor(dt, dtype=A.dtype, device=A.device)
    reach = float((A.detach().abs().sum(-1).amax(-1) * step.detach()).max())
    doublings = max(0, math.ceil(math.log2(max(reach, 1.0))))
    short = step[..., None, None] / 2**doublings
    batch = torch.broadcast_shapes(A.shape, density.shape, short.shape)
    above = torch.cat([-A.expand(batch), density.expand(batch)], -1)
    below = torch.cat([torch.zeros_like(A).expand(batch), A.mT.expand(batch)], -1)
    held = exponential(short * torch.cat([above, below], -2))
    F = held[..., N:, N:].mT
    Q = F @ held[..., :N, N:]
    for _ in range(doublings):
        Q, F = Q + F @ Q @ F.mT, F @ F
    return (Q + Q.mT) / 2


def _root(cov: Tensor) -> Tensor:
    """A matrix L with L L^T = cov, which may be singular."""
    values, vectors = torch.linalg.eigh(cov)
    return vectors * values.clamp(min=0).sqrt()[..., None, :]
