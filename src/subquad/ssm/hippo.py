"""HiPPO: a state that is the best polynomial approximation of everything it has seen.

Gu, Dao, Ermon, Rudra and Re 2020, "HiPPO: Recurrent memory with optimal polynomial projections"
(arXiv:2008.07669). Of a signal's past the state keeps N coefficients in Legendre polynomials; which
past is weighed how is the measure:

    "legs"   all of the past, evenly, stretched as it grows (c' = (A c + B f) / t)
    "legt"   the last `window` samples, evenly
    "lmu"    "legt" in the scaling of the Legendre Memory Unit (Voelker et al. 2019)
    "decay"  all of the past, by e^(-age / window): LegS's matrices without 1/t, as S4 uses them
             (Gu et al. 2022, "How to train your HiPPO", arXiv:2206.12037)

A sample is a value held for one unit of time: sample k is what happened from time k to time k+1.
Everything is computed in float64: the matrices have entries of size N.

    ... any batch   T samples   N coefficients
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from subquad.errors import choose, fail, is_whole
from subquad.ssm.discretize import METHODS, discretize
from subquad.ssm.legendre import check_size, legendre, legs, legt, lmu, lmu_scale, stretch
from subquad.ssm.matrix import Dense

MEASURES = ("legs", "legt", "lmu", "decay")
CHUNK = 64  # steps whose matrices are made at a time


@dataclass(frozen=True)
class HiPPO:
    """A memory of N coefficients.

        memory = HiPPO("legs", 64)
        c = memory.project(f)                      # f [...,T] -> c [...,T,N], after every sample
        g = memory.reconstruct(c[..., 99, :], 100) # the first 100 samples as remembered then

    Args:
        measure: "legs", "legt", "lmu" or "decay"; see the top of the module.
        N: coefficients, at least 1.
        window: samples; the reach of "legt" and "lmu", the time constant of "decay". Not for
            "legs", which has no scale of time: a signal played slower is remembered as well.
    """

    measure: str
    N: int
    window: float | None = None

    def __post_init__(self) -> None:
        choose("measure", self.measure, MEASURES)
        check_size(self.N)
        if self.measure == "legs" and self.window is not None:
            raise fail("window", self.window, "None for 'legs'", "leave it out, or take 'legt'")
        fits = isinstance(self.window, int | float) and 1 <= self.window < math.inf
        if self.measure != "legs" and not fits:
            want = f"a number of samples, at least 1, for {self.measure!r}"
            raise fail("window", repr(self.window), want, "window=100")

    @property
    def matrices(self) -> tuple[Tensor, Tensor]:
        """A [N,N] and B [N,1] of c' = A c + B f, or of c' = (A c + B f) / t for "legs"."""
        A, B = {"legs": legs, "decay": legs, "legt": legt, "lmu": lmu}[self.measure](self.N)
        return A / self.scale, B / self.scale

    @property
    def scale(self) -> float:
        """The unit of time in samples: the window, or 1 for "legs", which has none."""
        return 1.0 if self.window is None else self.window

    def transitions(self, k: Tensor, method: str = "zoh") -> tuple[Tensor, Tensor]:
        """The steps that take in samples k: c <- A_bar c + B_bar f_k.

        "zoh" is exact for every measure. For "legs" the other methods hold 1/t at 1/(k+1) during
        the step, as the paper's implementation does.

        Args:
            k: [...] int, counted from 0. Only "legs" depends on it.

        Returns:
            A_bar [...,N,N] and B_bar [...,N], float64.
        """
        choose("method", method, METHODS)
        if self.measure == "legs" and method == "zoh":
            return stretch(k.double(), self.N)
        A, B = self.matrices
        dt = 1 / (k.double() + 1) if self.measure == "legs" else torch.ones_like(k).double()
        A_bar, B_bar = discretize(Dense(A.to(k.device)), B.to(k.device), dt, method)
        return A_bar.dense(), B_bar[..., 0]

    def step(self, c: Tensor, f: Tensor, k: int, method: str = "zoh") -> Tensor:
        """Take in one sample: c [...,N] and f [...] -> c [...,N]. k samples came before."""
        _check_coefficients(c, self.N)
        A_bar, B_bar = self.transitions(torch.tensor(k, device=c.device), method)
        return (c.double() @ A_bar.mT + f.double()[..., None] * B_bar).to(c.dtype)

    def project(self, f: Tensor, method: str = "zoh", at: Sequence[int] | None = None) -> Tensor:
        """Read a signal sample by sample, from c = 0.

        Args:
            f: [...,T] real.
            method: "zoh" (exact), "bilinear", "euler" or "backward_euler".
            at: the times (numbers of samples read, 1 to T, rising) whose coefficients to keep;
                None keeps all T of them.

        Returns:
            c [...,len(at),N], or [...,T,N], in f's dtype.

        Raises:
            ValueError: for arguments that do not fit, and if the method is unstable here. (Forward
                Euler on "legs" is unstable for the first N/2 samples only; it is refused if the
                error of these is still a million times the signal at the end.)
        """
        T = _check_signal(f)
        _check_stable(self, method)
        wanted = range(1, T + 1) if at is None else _check_times(at, T)
        c, kept, due = f.new_zeros(*f.shape[:-1], self.N, dtype=torch.float64), [], iter(wanted)
        next_kept = next(due)
        for low in range(0, wanted[-1], CHUNK):
            k = torch.arange(low, min(low + CHUNK, wanted[-1]), device=f.device)
            A_bars, B_bars = self.transitions(k if self.measure == "legs" else k[:1], method)
            samples = f[..., k].double()
            for i in range(len(k)):
                j = i if self.measure == "legs" else 0
                c = c @ A_bars[j].mT + samples[..., i, None] * B_bars[j]
                if low + i + 1 == next_kept:
                    kept.append(c)
                    next_kept = next(due, 0)
        _check_growth(c, f, method)
        return torch.stack(kept, -2).to(f.dtype)

    def basis(self, position: Tensor) -> Tensor:
        """What each coefficient stands for: position [...] -> [...,N].

        Position 1 is now and 0 the oldest that is kept: of "legs" the beginning, of "legt" and
        "lmu" a window ago; for "decay" it is e^(-age / window). The functions are sqrt(2n+1)
        P_n(2 position - 1), orthonormal on [0, 1] ("lmu": (-1)^n P_n, orthogonal).
        """
        values = legendre(position, self.N)
        return values / lmu_scale(self.N).to(values) if self.measure == "lmu" else values

    def samples(self, t: int) -> Tensor:
        """The samples that the memory covers after t of them, [S] int64, oldest first."""
        first = 0
        if self.measure in ("legt", "lmu"):
            first = max(0, t - math.floor(self.scale))
        return torch.arange(first, t)

    def reconstruct(self, c: Tensor, t: int, samples: Tensor | None = None) -> Tensor:
        """The past as remembered: c [...,N] after t samples -> values [...,S].

        Args:
            c: one time's coefficients.
            t: the number of samples read until then, at least 1.
            samples: [S], which samples to reconstruct; may lie between two. None means all that
                the memory covers, `self.samples(t)`. Each is read in the middle of its unit of
                time.
        """
        _check_coefficients(c, self.N)
        if not is_whole(t, 1):
            raise fail("t", repr(t), "samples read so far, at least 1", "reconstruct(c, t)")
        samples = self.samples(t) if samples is None else samples
        age = t - samples.to(c.device).double() - 0.5
        if self.measure == "decay":
            position = torch.exp(-age / self.scale)
        else:
            position = 1 - age / (t if self.measure == "legs" else self.scale)
        return (c.double() @ self.basis(position).mT).to(c.dtype)


def _check_signal(f: Tensor) -> int:
    if not isinstance(f, Tensor) or not f.is_floating_point():
        got = f.dtype if isinstance(f, Tensor) else type(f).__name__
        raise fail("f", got, "a real torch tensor [...,T]", "torch.as_tensor(f).double()")
    if f.ndim < 1 or f.shape[-1] < 1:
        raise fail("f", f"shape {tuple(f.shape)}", "[...,T] with T >= 1", "give it a sample")
    if not bool(f.isfinite().all()):
        raise fail("f", "NaN or infinity", "finite samples", "fill the gaps first")
    return f.shape[-1]


def _check_coefficients(c: object, N: int) -> None:
    if not isinstance(c, Tensor) or c.ndim < 1 or c.shape[-1] != N:
        got = f"shape {tuple(c.shape)}" if isinstance(c, Tensor) else type(c).__name__
        raise fail(
            "c", got, f"a torch tensor [...,{N}]", "one time's coefficients, as from project"
        )


def _check_times(at: Sequence[int], T: int) -> list[int]:
    times = [int(t) for t in at]
    rising = all(a < b for a, b in pairwise(times))
    if not times or times[0] < 1 or times[-1] > T or not rising:
        raise fail("at", times, f"rising times from 1 to T = {T}", "at=[T] keeps the last only")
    return times


def _check_stable(memory: HiPPO, method: str) -> None:
    """A step that never forgets its own errors remembers nothing else."""
    if memory.measure == "legs":  # its steps shrink: whether errors grow too large is seen later
        return
    A_bar, _ = memory.transitions(torch.tensor(0), method)
    radius = torch.linalg.eigvals(A_bar).abs().max().item()
    if radius > 1:
        raise _unstable(method, f"an eigenvalue of size {radius:.4g} at N = {memory.N}")


def _check_growth(c: Tensor, f: Tensor, method: str) -> None:
    """Of a signal below 1 the coefficients stay below 1: their squares sum to a mean square."""
    limit, largest = 1e6 * f.abs().max().item(), c.abs().max().item()
    if not largest <= limit:
        raise _unstable(
            method, f"coefficients of size {largest:.2g} of a signal of {limit / 1e6:g}"
        )


def _unstable(method: str, why: str) -> ValueError:
    return fail(
        "method",
        f"{method!r}, which is unstable here: {why}",
        "a method whose errors die out",
        "method='zoh' or 'bilinear', which are stable for every N and window",
    )
