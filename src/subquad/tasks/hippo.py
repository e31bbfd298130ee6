"""Reconstruction: a signal is read once, and is then due at any time of its past."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from subquad.tasks.base import (
    Batch,
    Recipe,
    Task,
    check_count,
    check_counts,
    check_lengths,
    check_number,
)


@dataclass(frozen=True, kw_only=True)
class Hippo(Task):
    """Read a band-limited signal of unit variance, then give its values at any of its times.

    What HiPPO was made for (Gu et al. 2020, arXiv:2008.07669, section 2.3 and figure 2): a state of
    N numbers from which the whole past can be reconstructed. A signal is a sum of `waves` sines
    with frequencies uniform up to `band` cycles in the whole length and uniform phases. Afterwards
    `queries` times are asked, uniform over the past. `subquad.ssm.hippo` does this without
    training (the evidence in docs/results); here a row has to learn it.

    Channels: the signal (0 while asked), the time asked for in [0, 1) (0 while reading), and 1
    while asked.

    Settings:
        length: samples of the signal.
        queries: times asked for.
        band: the highest frequency, in cycles per length.
        waves: sines in the sum.
        test_lengths: lengths on which a trained model is tested besides, at the same band.
    """

    name = "hippo"
    measures = "keep a continuous signal in a state of fixed size and give back its past"
    solved_by = "attention; of the others the larger the state, the finer. HiPPO needs no training"
    source = "Gu et al. 2020 (HiPPO), arXiv:2008.07669, section 2.3"
    metric = "NMSE"
    solved = 0.01
    presets = {
        "small": {},
        "published": {"length": 1000, "queries": 100, "band": 10.0, "waves": 10},
    }
    recipes = {
        "small": Recipe(steps=2000, batch_size=32, lr=3e-3),
        "published": Recipe(steps=30_000, batch_size=64, lr=1e-3, layers=2, hidden_size=128),
    }

    length: int = 64
    queries: int = 16
    band: float = 3.0
    waves: int = 4
    test_lengths: tuple[int, ...] = ()

    def check(self) -> None:
        check_count("length", self.length, least=2)
        check_counts(self, 1, "queries", "waves")
        check_lengths("test_lengths", self.test_lengths)
        shortest = min((self.length, *self.test_lengths))
        check_number("band", self.band, most=shortest / 2)  # Nyquist, of every test

    @property
    def vocab_size(self) -> int:
        return 0

    @property
    def channels(self) -> int:
        return 3

    @property
    def chance(self) -> float:
        return 1.0

    def draw(self, random: np.random.Generator, batch_size: int, split: str) -> Batch:
        times, signal = self.signals(random, batch_size)
        asked = random.integers(self.length, size=(batch_size, self.queries))
        inputs = np.zeros((batch_size, self.length + self.queries, 3), dtype=np.float32)
        inputs[:, : self.length, 0] = signal
        inputs[:, self.length :, 1] = times[asked]
        inputs[:, self.length :, 2] = 1
        labels = np.full((*inputs.shape[:2], 1), np.nan, dtype=np.float32)
        labels[:, self.length :, 0] = np.take_along_axis(signal, asked, axis=1)
        return Batch(torch.from_numpy(inputs), torch.from_numpy(labels))

    def signals(
        self, random: np.random.Generator, batch_size: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Times [length] from 0 to below 1, and signals [B,length] of expected variance 1."""
        times = np.arange(self.length) / self.length
        shape = (batch_size, self.waves, 1)
        frequency = random.uniform(0, self.band, size=shape)
        phase = random.uniform(0, 2 * np.pi, size=shape)
        waves = np.sin(2 * np.pi * frequency * times + phase)
        return times, waves.sum(1) * (2 / self.waves) ** 0.5

    def tests(self) -> dict[str, Task]:
        return self.variants("length", self.test_lengths)
