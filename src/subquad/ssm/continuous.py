"""Systems in continuous time.

... any batch   T time   W frequencies   N state size   I inputs   O outputs
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from subquad.errors import choose, fail
from subquad.ssm.discrete import DiscreteStateSpace, check_frequencies, finite_response
from subquad.ssm.discretize import ALPHAS, discretize, exponential
from subquad.ssm.matrix import Dense, Diagonal, unsqueeze
from subquad.ssm.system import LinearSystem, check_signal

GAPS = 256  # steps of `solve` whose exponentials are held at a time


@dataclass(frozen=True, eq=False)
class StateSpace(LinearSystem):
    """x' = A x + B u, y = C x + D u.

        plant = StateSpace(A, B, C)                  # tensors, arrays or nested lists
        digital = plant.discretize(0.01)             # zero-order hold
        y, x = digital.simulate(u)                   # u [T,I] -> y [T,O]

    Batched, differentiable in every argument, real or complex; A may be `Diagonal` or `DPLR`.
    Arguments and errors as in `LinearSystem`.
    """

    def discretize(
        self, dt: float | Tensor, method: str = "zoh", read: str = "before"
    ) -> DiscreteStateSpace:
        """The system that steps from one sample to the next.

        Args:
            dt: seconds (or whatever unit) a step, positive: a number, or one a system [...].
            method: "zoh" (exact for inputs that are held), "bilinear" (Tustin), "euler" (forward)
                or "backward_euler".
            read: "before": y_k belongs to time k dt, before u_k acts. Equal to
                scipy.signal.cont2discrete. "after": y_k = C h_k + D u_k with h_k = A_bar h_{k-1} +
                B_bar u_k, the state after u_k was written; the convention of S4, S4D and Mamba.

        Raises:
            ValueError: if dt is not positive, or I - dt/2 A (backward Euler: I - dt A) is singular.
        """
        step = self._check_dt(dt)
        choose("read", read, ("before", "after"))
        A_bar, B_bar = discretize(self.matrix, self.B, step, method)
        if read == "after":
            C = (A_bar.mT @ self.C.mT).mT
            D = self.through + self.C @ B_bar
        elif ALPHAS.get(method, 0.0) == 0:
            C, D = self.C, self.through
        else:  # of the slope a share alpha is taken at the end, where the input has acted
            alpha = ALPHAS[method]
            inverse = A_bar.affine(alpha, 1 - alpha)  # (1 - alpha dt A)^-1
            C = (inverse.mT @ self.C.mT).mT
            D = self.through + alpha * self.C @ B_bar
        A = A_bar.matrix if isinstance(A_bar, Dense) else A_bar
        return DiscreteStateSpace(A, B_bar, C, D, dt=step if isinstance(dt, Tensor) else dt)

    def solve(self, u: Tensor, times: Tensor, x0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The continuous solution at any times, for an input that is held from one to the next.

            x(t) = e^(A (t - t_0)) x_0 + int e^(A (t - s)) B u(s) ds

        Args:
            u: [...,T,I]; u_k holds from times[k] to times[k+1].
            times: [T] real, rising, in any steps.
            x0: [...,N], the state at times[0]; None means zeros.

        Returns:
            y [...,T,O] at the times, and the state at the last of them [...,N].
        """
        u = check_signal("u", u, self, self.inputs, "[...,T,I]")
        times = _check_times(times, u).to(self.device)
        x = u.new_zeros(self.state_size) if x0 is None else x0
        x = check_signal("x0", x, self, self.state_size, "[...,N]")
        dtype = torch.promote_types(u.dtype, x.dtype)
        u, x = u.to(dtype), x.to(dtype)[..., None]
        A, B, states = unsqueeze(self.matrix), self.B[..., None, :, :], [x]
        for k, gap in enumerate(times.diff().split(GAPS)):
            A_bar, B_bar = discretize(A, B, gap.to(self.real_dtype), "zoh")
            powers = A_bar.dense().to(dtype)
            moved = B_bar.to(dtype) @ u[..., k * GAPS : k * GAPS + len(gap), :, None]
            for j in range(len(gap)):
                states.append(powers[..., j, :, :] @ states[-1] + moved[..., j, :, :])
        batch = torch.broadcast_shapes(*(s.shape for s in states))
        xs = torch.stack([s.expand(batch) for s in states], -3)  # [...,T,N,1]
        C, D = (m[..., None, :, :].to(dtype) for m in (self.C, self.through))
        return (C @ xs + D @ u[..., None])[..., 0], states[-1].expand(batch)[..., 0]

    def impulse_response(self, times: Tensor) -> Tensor:
        """C e^(A t) B at times t [T] >= 0: [...,T,O,I]; without D, which is an impulse at 0."""
        fitting = isinstance(times, Tensor) and times.ndim == 1 and not times.is_complex()
        if not fitting or not bool(((times >= 0) & times.isfinite()).all()):
            got = (
                f"shape {tuple(times.shape)}" if isinstance(times, Tensor) else type(times).__name__
            )
            raise fail("times", got, "a real tensor [T] of times from 0 on", "torch.linspace(...)")
        times = times.to(self.device, self.real_dtype)
        A = unsqueeze(self.matrix)
        B, C = self.B[..., None, :, :], self.C[..., None, :, :]
        if isinstance(A, Diagonal):
            return C @ ((times[:, None] * A.lam).exp()[..., None] * B)
        return C @ exponential(times[:, None, None] * A.dense()) @ B

    def frequency_response(self, w: Tensor) -> Tensor:
        """C (i w - A)^-1 B + D: gain and phase of a sinusoid, once settled.

        Args:
            w: [W] real, angular frequencies, radians per unit of time.

        Returns:
            [...,W,O,I] complex.

        Raises:
            ValueError: if a frequency meets a pole.
        """
        w = check_frequencies(w, self)
        return finite_response(self._transfer(1j * w), w)

    def is_stable(self) -> bool:
        """Whether every system of the batch forgets its past: all eigenvalues left of the axis."""
        return bool((self.eigenvalues().real < 0).all())

    def dc_gain(self) -> Tensor:
        """Where the outputs settle under a constant input, per input: [...,O,I].

        Raises:
            ValueError: if they never settle.
        """
        if not self.is_stable():
            largest = float(self.eigenvalues().real.max())
            raise fail(
                "A",
                f"an eigenvalue with real part {largest:.6g}, and was asked where outputs settle",
                "a stable system (all real parts below 0)",
                "stabilise it first",
            )
        return self.through - self.C @ self.matrix.solve(self.B)

    def _check_dt(self, dt: float | Tensor) -> Tensor:
        try:
            step = torch.as_tensor(dt, dtype=self.real_dtype, device=self.device)
        except (TypeError, ValueError, RuntimeError):
            raise fail("dt", repr(dt), "a positive number or tensor [...]", "dt=0.01") from None
        if not torch.compiler.is_compiling() and not bool(((step > 0) & step.isfinite()).all()):
            raise fail("dt", step.tolist(), "positive, finite steps", "dt=0.01")
        try:
            torch.broadcast_shapes(step.shape, self.batch)
        except RuntimeError:
            got = f"shape {tuple(step.shape)}"
            raise fail(
                "dt", got, f"the systems' batch {tuple(self.batch)}", "or one number"
            ) from None
        return step


def _check_times(times: object, u: Tensor) -> Tensor:
    if not isinstance(times, Tensor) or times.shape != (u.shape[-2],) or times.is_complex():
        got = f"shape {tuple(times.shape)}" if isinstance(times, Tensor) else type(times).__name__
        raise fail("times", got, f"a real tensor [{u.shape[-2]}], one time an input", "u's length")
    low = float(times.diff().min()) if len(times) > 1 else 1.0
    if not (bool(times.isfinite().all()) and 0 < low < math.inf):
        raise fail("times", "times that do not rise", "strictly rising, finite times", "sort them")
    return times
