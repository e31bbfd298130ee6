"""Recall: what followed this, when it was last seen? Once, for one key, for many keys."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from subquad.errors import fail
from subquad.tasks.base import (
    Batch,
    Recipe,
    Task,
    check_count,
    check_flag,
    check_lengths,
    check_number,
    choose_distinct,
    empty_labels,
    token_batch,
)


@dataclass(frozen=True, kw_only=True)
class InductionHeads(Task):
    """Random tokens; a trigger somewhere, once, and again at the end: what followed it?

    Gu and Dao 2023 (arXiv:2312.00752, section 4.1.2), after Dao et al. 2023 (H3) and Olsson et al.
    2022: trained at length 256 with 16 tokens, tested from 64 to 2^20. The trigger's place is
    uniform; the answer is the token after it and is due at the last position.

    Tokens: 0 to vocabulary-2 ordinary, vocabulary-1 the trigger.

    Settings:
        vocabulary: tokens, the trigger included.
        length: positions, the last trigger included.
        test_lengths: lengths on which a trained model is tested besides.
    """

    name = "induction_heads"
    measures = "find a token again and say what followed it, at lengths never trained on"
    solved_by = "mamba up to 2^20; attention learns it, and fails at about twice the trained length"
    source = "Gu and Dao 2023, arXiv:2312.00752, section 4.1.2"
    presets = {
        "small": {},
        "published": {
            "length": 256,
            "vocabulary": 16,
            "test_lengths": tuple(2**n for n in range(6, 21)),
        },
    }
    recipes = {
        "small": Recipe(steps=2500, batch_size=32, lr=3e-3),
        # The paper's best constant rate for Mamba; it draws 8 sequences a step, 8192 steps an
        # epoch, and reports after 25 epochs.
        "published": Recipe(steps=204_800, batch_size=8, lr=1e-3, weight_decay=0, final_lr=1.0),
    }

    vocabulary: int = 16
    length: int = 64
    test_lengths: tuple[int, ...] = (32, 128, 256, 1024, 4096)

    def check(self) -> None:
        check_count("vocabulary", self.vocabulary, least=3)
        check_count("length", self.length, least=3)
        check_lengths("test_lengths", self.test_lengths)
        for length in self.test_lengths:
            check_count("test_lengths", length, least=3)

    @property
    def vocab_size(self) -> int:
        return self.vocabulary

    @property
    def chance(self) -> float:
        return 1 / (self.vocabulary - 1)

    def draw(self, random: np.random.Generator, batch_size: int, split: str) -> Batch:
        trigger = self.vocabulary - 1
        inputs = random.integers(trigger, size=(batch_size, self.length), dtype=np.int64)
        places = random.integers(self.length - 2, size=batch_size)
        rows = np.arange(batch_size)
        inputs[rows, places] = trigger
        inputs[:, -1] = trigger
        labels = empty_labels(*inputs.shape)
        labels[:, -1] = inputs[rows, places + 1]
        return token_batch(inputs, labels)

    def tests(self) -> dict[str, Task]:
        return self.variants("length", self.test_lengths)


@dataclass(frozen=True, kw_only=True)
class AssociativeRecall(Task):
    """Pairs of keys and values, drawn again and again, and in the end one of the keys.

    Ba et al. 2016, in the form of Dao et al. 2023 (H3, arXiv:2212.14052, section 3.1 and code):
    every sequence has its own map from keys to values; pairs are drawn from it with replacement;
    then a mark and a key that was there, at which its value is due.

    Tokens: the keys, the values, the mark.

    Settings:
        keys: different keys, and as many values.
        pairs: shown in a sequence.
    """

    name = "associative_recall"
    measures = "remember which value goes with a key, and find it by the key"
    solved_by = "attention, H3, rows that select; plain time-invariant rows do worse (s4d)"
    source = "Dao et al. 2023 (H3), arXiv:2212.14052, section 3.1"
    presets = {"small": {}, "published": {"keys": 4, "pairs": 10}, "long": {"keys": 16}}
    recipes = {
        "small": Recipe(steps=2500, batch_size=32, lr=3e-3),
        "published": Recipe(steps=62_500, batch_size=32, lr=5e-4, hidden_size=32),
        "long": Recipe(steps=10_000, batch_size=64, lr=1e-3),
    }

    keys: int = 8
    pairs: int = 32

    def check(self) -> None:
        check_count("keys", self.keys, least=2)
        check_count("pairs", self.pairs)

    @property
    def vocab_size(self) -> int:
        return 2 * self.keys + 1

    @property
    def chance(self) -> float:
        return 1 / self.keys

    def draw(self, random: np.random.Generator, batch_size: int, split: str) -> Batch:
        values = random.integers(self.keys, 2 * self.keys, size=(batch_size, self.keys))
        keys = random.integers(self.keys, size=(batch_size, self.pairs))
        # A key that was there: uniform over the different ones, however often each was shown.
        shown = np.zeros((batch_size, self.keys), dtype=bool)
        np.put_along_axis(shown, keys, True, axis=1)
        asked = np.where(shown, random.random(shown.shape), -1.0).argmax(1)[:, None]
        inputs = np.empty((batch_size, 2 * self.pairs + 2), dtype=np.int64)
        inputs[:, 0:-2:2] = keys
        inputs[:, 1:-2:2] = np.take_along_axis(values, keys, axis=1)
        inputs[:, -2] = 2 * self.keys
        inputs[:, -1:] = asked
        labels = empty_labels(*inputs.shape)
        labels[:, -1:] = np.take_along_axis(values, asked, axis=1)
        return token_batch(inputs, labels)


@dataclass(frozen=True, kw_only=True)
class MQAR(Task):
    """Multi-query associative recall: pairs first, then every key once more, soon or late.

    Arora et al. 2023 (Zoology, arXiv:2312.04927, section 4 and its code). Keys are drawn without
    replacement from the lower half of the vocabulary, values from the upper. Behind the pairs are
    (length - 2 pairs) / 2 places, every second position; the keys are put at places drawn without
    replacement with p(i) proportional to i^(power-1), i = 1, 2, ...: most come back soon, as
    repeated bigrams do in text. A key's value is due where the key comes back.

    Settings:
        vocabulary: tokens. 0 is the filler, 1 to vocabulary/2-1 are keys, the others values.
        length: positions.
        pairs: to remember.
        power: of the gaps; 1 makes them uniform.
        random_filler: fill what is left with any tokens, as the later code does, instead of 0 (as
            for the paper's figure 2). Harder: a filler may equal a key.
        test_sizes: (length, pairs) on which a trained model is tested besides.
    """

    name = "mqar"
    measures = "recall many associations at once: what the state's size is for"
    solved_by = "attention; of the others, the larger the state and the better it erases, the more"
    source = "Arora et al. 2023 (Zoology), arXiv:2312.04927, section 4"
    presets = {
        "small": {},
        "medium": {"vocabulary": 8192, "length": 256, "pairs": 16, "test_sizes": ()},
        "published": {"vocabulary": 8192, "length": 512, "pairs": 64, "test_sizes": ()},
    }
    recipes = {
        "small": Recipe(steps=2500, batch_size=32, lr=3e-3),
        "medium": Recipe(steps=100_000, batch_size=64, lr=1e-3, final_lr=0.0),
        # 100,000 sequences, 64 times, in batches of 64; the paper takes the best of 4 rates.
        "published": Recipe(steps=100_000, batch_size=64, lr=1e-3, final_lr=0.0),
    }

    vocabulary: int = 128
    length: int = 64
    pairs: int = 8
    power: float = 0.01
    random_filler: bool = False
    test_sizes: tuple[tuple[int, int], ...] = ((128, 8), (128, 16))

    def check(self) -> None:
        check_count("pairs", self.pairs)
        check_count("length", self.length)
        check_count("vocabulary", self.vocabulary, least=4)
        if self.length % 2 or self.length < 4 * self.pairs:
            expected = f"an even number of at least 4 pairs = {4 * self.pairs}"
            raise fail("length", self.length, expected, "a pair and its query take 4 positions")
        if self.vocabulary // 2 <= self.pairs:
            expected = f"more than 2 pairs = {2 * self.pairs} + 1"
            raise fail("vocabulary", self.vocabulary, expected, "keys of a sequence all differ")
        check_number("power", self.power, most=1)
        check_flag("random_filler", self.random_filler)
        try:
            sizes = tuple((int(length), int(pairs)) for length, pairs in self.test_sizes)
        except (TypeError, ValueError):
            expected = "pairs of numbers (length, pairs)"
            raise fail("test_sizes", repr(self.test_sizes), expected, "((128, 8),)") from None
        object.__setattr__(self, "test_sizes", sizes)
        for length, pairs in sizes:
            self.replace(length=length, pairs=pairs, test_sizes=())

    @property
    def vocab_size(self) -> int:
        return self.vocabulary

    @property
    def chance(self) -> float:
        return 1 / (self.vocabulary - self.vocabulary // 2)

    def draw(self, random: np.random.Generator, batch_size: int, split: str) -> Batch:
        half, pairs, start = self.vocabulary // 2, self.pairs, 2 * self.pairs
        keys = 1 + choose_distinct(random, batch_size, half - 1, pairs)
        values = half + choose_distinct(random, batch_size, self.vocabulary - half, pairs)
        inputs = np.zeros((batch_size, self.length), dtype=np.int64)
        inputs[:, 0:start:2] = keys
        inputs[:, 1:start:2] = values
        queries = start + 2 * self._gaps(random, batch_size)
        np.put_along_axis(inputs, queries, keys, axis=1)
        labels = empty_labels(*inputs.shape)
        np.put_along_axis(labels, queries, values, axis=1)
        if self.random_filler:
            noise = random.integers(self.vocabulary, size=inputs.shape)
            inputs = np.where(inputs == 0, noise, inputs)
        return token_batch(inputs, labels)

    def _gaps(self, random: np.random.Generator, batch_size: int) -> np.ndarray:
        """[B,pairs]: places drawn one after another without replacement by the power law.

        The order of weights plus Gumbel noise is the order of such draws (Yellott 1977).
        """
        places = (self.length - 2 * self.pairs) // 2
        log_weight = (self.power - 1) * np.log(np.arange(1, places + 1))
        noisy = log_weight + random.gumbel(size=(batch_size, places))
        return np.argsort(-noisy, axis=1)[:, : self.pairs]

    def tests(self) -> dict[str, Task]:
        sizes = dict.fromkeys(((self.length, self.pairs), *self.test_sizes))
        return {
            f"{pairs} pairs in {length}": self.replace(length=length, pairs=pairs, test_sizes=())
            for length, pairs in sizes
        }
