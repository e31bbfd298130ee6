"""Digits: small images pixel by pixel, so that all of it must be kept until the last."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

from subquad.tasks.base import Batch, Recipe, Task, check_flag, empty_labels, token_batch

_LEVELS = 17  # 0 to 16 dots in each 4 x 4 block of the scanned image
_EVERY = 5  # one image in five is for testing


@dataclass(frozen=True, kw_only=True)
class Digits(Task):
    """Which digit is it? 8 x 8 pixels of 17 grey levels, one after another in 64 tokens.

    The images are scikit-learn's copy of Alpaydin and Kaynak 1998 (UCI, Optical Recognition of
    Handwritten Digits; 1797 images). The task is sequential MNIST (Le, Jaitly and Hinton 2015,
    arXiv:1504.00941, section 4.2; with `permuted`, pixels in one random order for all) at a size
    that ships with a package. Every fifth image is for testing only.

    Tokens: 0 to 16 the grey levels, 17 to 26 the digits. The digit is due at the last pixel.

    Settings:
        permuted: pixels in one fixed random order, so that neighbours are not near.

    Raises:
        ImportError: scikit-learn is not installed.
    """

    name = "digits"
    measures = "classify an image read pixel by pixel"
    solved_by = "every row to some degree; continuous-time rows (s4, s4d) are at home"
    source = "Le et al. 2015, arXiv:1504.00941, section 4.2; Alpaydin and Kaynak 1998"
    solved = 0.97
    presets = {"small": {}, "published": {"permuted": True}}
    recipes = {
        "small": Recipe(steps=1500, batch_size=32, lr=3e-3),
        "published": Recipe(steps=10_000, batch_size=50, lr=1e-3, layers=4, hidden_size=128),
    }

    permuted: bool = False

    def check(self) -> None:
        check_flag("permuted", self.permuted)

    @property
    def vocab_size(self) -> int:
        return _LEVELS + 10

    @property
    def chance(self) -> float:
        return 0.1

    def draw(self, random: np.random.Generator, batch_size: int, split: str) -> Batch:
        images, _ = load(split)
        return self._batch(split, random.integers(len(images), size=batch_size))

    def test_batches(
        self, sequences: int, *, tokens_at_once: int = 1 << 16, seed: int = 0
    ) -> Iterator[Batch]:
        """Every test image once (there are 360), whatever is asked for."""
        count, size = len(load("test")[0]), max(1, tokens_at_once // 64)
        for first in range(0, count, size):
            yield self._batch("test", np.arange(first, min(first + size, count)))

    def _batch(self, split: str, which: np.ndarray) -> Batch:
        images, digits = load(split)
        inputs = images[which]
        if self.permuted:
            inputs = inputs[:, np.random.default_rng(0).permutation(64)]
        labels = empty_labels(*inputs.shape)
        labels[:, -1] = _LEVELS + digits[which]
        return token_batch(inputs, labels)


@cache
def load(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images [n,64] of 0 to 16 and digits [n]. ImportError without scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError(
            "the task `digits` takes its images from scikit-learn, which is not installed: "
            "pip install scikit-learn (or subquad[tasks])"
        ) from None
    images, digits = load_digits(return_X_y=True)
    chosen = (np.arange(len(images)) % _EVERY == 0) == (split == "test")
    return images[chosen].astype(np.int64), digits[chosen].astype(np.int64)
