"""Copying and selective copying: how much can be kept, and can the rest be left out?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from subquad.tasks.base import (
    Batch,
    Recipe,
    Task,
    check_count,
    check_counts,
    check_lengths,
    choose_distinct,
    empty_labels,
    token_batch,
)


@dataclass(frozen=True, kw_only=True)
class Copying(Task):
    """Symbols, a long pause, a delimiter, and then the symbols are due in their order.

    Arjovsky, Shah and Bengio 2016 (arXiv:1511.06464, section 5.1), after Hochreiter and
    Schmidhuber 1997: `memory` symbols, `pause` - 1 blanks, one delimiter, `memory` blanks at which
    the symbols are due. pause + 2 memory positions in all. There the blanks before them are due
    as blanks too; here only the symbols count, which is what the published baseline
    (memory log(symbols) / length) isolates.

    Tokens: 0 to symbols-1 the symbols, then the blank, then the delimiter.

    Settings:
        symbols: different ones.
        memory: symbols to keep.
        pause: positions from the last symbol to the delimiter, itself included.
        test_pauses: pauses on which a trained model is tested besides.
    """

    name = "copying"
    measures = "keep a few symbols over a long pause and say them in order"
    solved_by = "every row whose state has room; where positions are unseen, attention needs luck"
    source = "Arjovsky et al. 2016, arXiv:1511.06464, section 5.1"
    presets = {"small": {}, "published": {"pause": 500, "test_pauses": (250, 1000)}}
    recipes = {
        "small": Recipe(steps=1500, batch_size=32, lr=3e-3),
        "published": Recipe(steps=20_000, batch_size=20, lr=1e-3, hidden_size=128, final_lr=1.0),
    }

    symbols: int = 8
    memory: int = 10
    pause: int = 50
    test_pauses: tuple[int, ...] = (100, 200)

    def check(self) -> None:
        check_count("symbols", self.symbols, least=2)
        check_counts(self, 1, "memory", "pause")
        check_lengths("test_pauses", self.test_pauses)

    @property
    def vocab_size(self) -> int:
        return self.symbols + 2

    @property
    def chance(self) -> float:
        return 1 / self.symbols

    def draw(self, random: np.random.Generator, batch_size: int, split: str) -> Batch:
        memory, start = self.memory, self.memory + self.pause
        symbols = random.integers(self.symbols, size=(batch_size, memory))
        inputs = np.full((batch_size, start + memory), self.symbols)
        inputs[:, :memory] = symbols
        inputs[:, start - 1] = self.symbols + 1
        labels = empty_labels(*inputs.shape)
        labels[:, start:] = symbols
        return token_batch(inputs, labels)

    def tests(self) -> dict[str, Task]:
        return self.variants("pause", self.test_pauses)


@dataclass(frozen=True, kw_only=True)
class SelectiveCopying(Task):
    """As copying, but the symbols stand at random places among the noise.

    Gu and Dao 2023 (arXiv:2312.00752, section 4.1.1; as in the generator of state-spaces/s4,
    `variable`): `memory` symbols at places drawn uniformly from the first noise + memory, and then
    `memory` markers, at which the symbols are due in the order of their places.

    Tokens: 0 the noise, 1 to vocabulary-2 the symbols, vocabulary-1 the marker.

    Settings:
        vocabulary: tokens, the noise and the marker included.
        memory: symbols to keep.
        noise: positions of noise.
        test_noises: amounts of noise on which a trained model is tested besides.
    """

    name = "selective_copying"
    measures = "keep what matters and let the noise between pass"
    solved_by = "decay or erase by token (mamba 99.8 %); time-invariant rows cannot (s4 18 %)"
    source = "Gu and Dao 2023, arXiv:2312.00752, section 4.1.1"
    presets = {
        "small": {},
        "medium": {"noise": 256, "memory": 16, "vocabulary": 16, "test_noises": (512,)},
        "published": {"noise": 4096, "memory": 16, "vocabulary": 16, "test_noises": ()},
    }
    recipes = {
        "small": Recipe(steps=1500, batch_size=32, lr=3e-3),
        "medium": Recipe(steps=10_000, batch_size=64, lr=1e-3),
        # 400,000 steps at a constant 1e-4 in the paper.
        "published": Recipe(steps=400_000, batch_size=64, lr=1e-4, weight_decay=0, final_lr=1.0),
    }

    vocabulary: int = 10
    memory: int = 8
    noise: int = 64
    test_noises: tuple[int, ...] = (128, 256)

    def check(self) -> None:
        check_count("vocabulary", self.vocabulary, least=4)
        check_counts(self, 1, "memory", "noise")
        check_lengths("test_noises", self.test_noises)

    @property
    def vocab_size(self) -> int:
        return self.vocabulary

    @property
    def chance(self) -> float:
        return 1 / (self.vocabulary - 2)

    def draw(self, random: np.random.Generator, batch_size: int, split: str) -> Batch:
        memory, start = self.memory, self.noise + self.memory
        symbols = random.integers(1, self.vocabulary - 1, size=(batch_size, memory))
        places = np.sort(choose_distinct(random, batch_size, start, memory), axis=1)
        inputs = np.zeros((batch_size, start + memory), dtype=np.int64)
        np.put_along_axis(inputs, places, symbols, axis=1)
        inputs[:, start:] = self.vocabulary - 1
        labels = empty_labels(*inputs.shape)
        labels[:, start:] = symbols
        return token_batch(inputs, labels)

    def tests(self) -> dict[str, Task]:
        return self.variants("noise", self.test_noises)
