"""What `subquad hippo` shows: a signal, and what a memory still held of it at some times."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from subquad.ssm.hippo import HiPPO


@dataclass(frozen=True, eq=False)
class Recall:
    """The signal and what was remembered at one time."""

    t: int  # samples read
    samples: Tensor  # [S] int64, those that the memory covers
    truth: Tensor  # [S]
    remembered: Tensor  # [S]

    def error(self, low: float = 0.0, high: float = 1.0) -> float:
        """Root mean square error between two ages (0 oldest, 1 now), over the deviation of all."""
        S = len(self.samples)
        part = slice(int(low * S), max(int(low * S) + 1, int(high * S)))
        spread = (self.truth - self.truth.mean()).square().mean().sqrt().item()
        error = (self.remembered[part] - self.truth[part]).square().mean().sqrt().item()
        return error / spread if spread > 0 else error


@dataclass(frozen=True, eq=False)
class Story:
    """A signal f [T], what was remembered at four times, coefficients [S,N] at times [S]."""

    memory: HiPPO
    method: str
    f: Tensor
    recalls: list[Recall]
    times: Tensor
    coefficients: Tensor
