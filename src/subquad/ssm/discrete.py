"""Systems in discrete time: one step after another, or all at once as a convolution.

... any batch   T time   L lags   N state size   I inputs   O outputs
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subquad.errors import fail, is_whole
from subquad.ssm.response import response
from subquad.ssm.system import LinearSystem, check_batch, check_signal


@dataclass(frozen=True, eq=False)
class DiscreteStateSpace(LinearSystem):
    """y_k = C x_k + D u_k, then x_{k+1} = A x_k + B u_k.

    Args:
        A, B, C, D: as in `LinearSystem`.
        dt: the time a step takes, [...]; 1 if the system has no other clock than its steps.
    """

    dt: float | Tensor = 1.0

    def step(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """One step, the specification: u [...,I], x [...,N] -> y [...,O] and the next x."""
        u = check_signal("u", u, self, self.inputs, "[...,I]")
        x = check_signal("x", x, self, self.state_size, "[...,N]")
        return self._step(u.to(self._meet(u, x)), x.to(self._meet(u, x)))

    def simulate(self, u: Tensor, x0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Step by step through u: the recurrence.

        Args:
            u: [...,T,I], T >= 1.
            x0: [...,N], the state before the first step; None means zeros.

        Returns:
            y [...,T,O] and the state after the last step [...,N], from which another call goes on.
        """
        u, x = self._check_run(u, x0)
        outputs = []
        for t in range(u.shape[-2]):
            y, x = self._step(u[..., t, :], x)
            outputs.append(y)
        return torch.stack(outputs, -2), x

    def kernel(self, L: int) -> Tensor:
        """The impulse response: what an input does to the output l steps later.

            kernel[0] = D,  kernel[l] = C A^(l-1) B        y_t = sum_l kernel[l] u_{t-l}

        Memory is that of the result and of about sqrt(L) states.

        Returns:
            [...,L,O,I].

        Raises:
            ValueError: if the system is so unstable that the kernel overflows before L.
        """
        if not is_whole(L, 1):
            raise fail("L", repr(L), "a number of steps, at least 1", "kernel(1000)")
        D = self.through[..., None, :, :]
        later = response(self.matrix, self.B, self.C, L - 1)
        batch = torch.broadcast_shapes(D.shape[:-3], later.shape[:-3])
        h = torch.cat([x.expand(*batch, *x.shape[-3:]) for x in (D, later)], -3)
        if not torch.compiler.is_compiling() and not bool(h.isfinite().all()):
            raise self._unstable(
                f"a kernel of L = {L} steps, which overflows", "take a shorter one"
            )
        return h

    def convolve(self, u: Tensor, x0: Tensor | None = None) -> Tensor:
        """All outputs at once: u's convolution with the kernel, by FFT, plus what x0 still adds.

        Zero-padded to twice the length, so that no end wraps around to the beginning. Equals
        `simulate(u, x0)[0]`.

        Args:
            u: [...,T,I].
            x0: [...,N] or None.

        Returns:
            y [...,T,O].

        Raises:
            ValueError: if the system grows by more than a factor e within T steps: the errors of
                an FFT are relative to its largest number, and would drown the early outputs.
        """
        u, x = self._check_run(u, x0)
        T = u.shape[-2]
        if not torch.compiler.is_compiling() and self._growth(T) > 1:
            raise self._unstable(f"a convolution over T = {T} steps", "use simulate")
        n = 1 << (2 * T - 2).bit_length()
        h = self.kernel(T).to(u.dtype)
        if u.is_complex():
            transform, inverse = torch.fft.fft, torch.fft.ifft
        else:
            transform, inverse = torch.fft.rfft, torch.fft.irfft
        spectrum = torch.einsum(
            "...woi,...wi->...wo", transform(h, n=n, dim=-3), transform(u, n=n, dim=-2)
        )
        y = inverse(spectrum, n=n, dim=-2)[..., :T, :]
        if x0 is not None:
            y = y + response(self.matrix, x[..., None].to(u.dtype), self.C.to(u.dtype), T)[..., 0]
        return y

    def frequency_response(self, w: Tensor) -> Tensor:
        """C (z - A)^-1 B + D at z = e^(i w dt): gain and phase of a sinusoid, once settled.

        Args:
            w: [W] real, angular frequencies, radians per unit of time (of a step if dt is 1).

        Returns:
            [...,W,O,I] complex.

        Raises:
            ValueError: if a frequency meets a pole.
        """
        w = check_frequencies(w, self)
        dt = torch.as_tensor(self.dt, dtype=w.dtype, device=w.device)
        return finite_response(self._transfer(torch.exp(1j * w * dt[..., None])), w)

    def spectral_radius(self) -> Tensor:
        """The largest size of an eigenvalue, [...]; below 1 the system forgets."""
        return self.eigenvalues().abs().amax(-1)

    def is_stable(self) -> bool:
        """Whether every system of the batch forgets its past."""
        return bool((self.spectral_radius() < 1).all())

    def dc_gain(self) -> Tensor:
        """Where the outputs settle under a constant input, per input: [...,O,I].

        Raises:
            ValueError: if they never settle.
        """
        if not self.is_stable():
            raise self._unstable("where its outputs settle", "stabilise it first")
        return self.C @ self.matrix.affine(-1.0, 1.0).solve(self.B) + self.through

    def _step(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        C, D, B = (m.to(u.dtype) for m in (self.C, self.through, self.B))
        u, x = u[..., None], x[..., None]
        return (C @ x + D @ u)[..., 0], (self.matrix @ x + B @ u)[..., 0]

    def _meet(self, u: Tensor, x: Tensor) -> torch.dtype:
        return torch.promote_types(u.dtype, x.dtype)

    def _check_run(self, u: Tensor, x0: Tensor | None) -> tuple[Tensor, Tensor]:
        """u and the first state, checked and of one dtype."""
        u = check_signal("u", u, self, self.inputs, "[...,T,I]")
        batch = torch.broadcast_shapes(self.batch, u.shape[:-2])
        if x0 is None:
            return u, u.new_zeros(*batch, self.state_size)
        x = check_signal("x0", x0, self, self.state_size, "[...,N]")
        check_batch("x0", x.shape[:-1], batch)
        dtype = self._meet(u, x)
        batch = torch.broadcast_shapes(batch, x.shape[:-1])
        return u.to(dtype), x.to(dtype).expand(*batch, self.state_size)

    def _growth(self, T: int) -> float:
        """The logarithm of the most that an eigenvalue grows in T steps."""
        with torch.no_grad():
            return T * float(self.spectral_radius().max().log())

    def _unstable(self, asked: str, fix: str) -> ValueError:
        radius = float(self.spectral_radius().max())
        return fail(
            "A",
            f"a spectral radius of {radius:.6g}, and was asked for {asked}",
            "a system that does not grow (all eigenvalues within the unit circle)",
            fix,
        )


def check_frequencies(w: object, system: LinearSystem) -> Tensor:
    """[W] real and finite, in the system's precision."""
    if not isinstance(w, Tensor) or w.is_complex() or w.ndim != 1:
        got = f"shape {tuple(w.shape)}" if isinstance(w, Tensor) else type(w).__name__
        raise fail("w", got, "a real tensor [W]", "torch.linspace(...)")
    if not bool(w.isfinite().all()):
        raise fail("w", "NaN or infinity", "finite frequencies", "leave them out")
    return w.to(system.device, system.real_dtype)


def finite_response(values: Tensor, w: Tensor) -> Tensor:
    """The values, or ValueError naming the first frequency at which the system has a pole."""
    bad = ~values.isfinite().all(-1).all(-1).reshape(-1, len(w)).all(0)
    if bool(bad.any()):
        raise fail(
            "w",
            f"{w[bad][0].item():g}, a pole",
            "frequencies with a finite response",
            "leave it out",
        )
    return values
