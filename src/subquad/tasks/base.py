"""What every task is: settings that check themselves, and batches drawn from (seed, step).

B sequences   T positions   C channels of a signal
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from subquad.errors import choose, fail
from subquad.labels import IGNORE

SPLITS = ("train", "test")
_PIECE = 2048  # positions of a sequence that are scored at once, about


@dataclass(frozen=True)
class Batch:
    """What a model reads and what it is asked.

    inputs: [B,T] int64 tokens, or [B,T,C] float32 of a signal.
    labels: [B,T] int64, the token due at each position and IGNORE where nothing is asked; of a
        signal [B,T,1] float32 and NaN. A label belongs to the input at its own position, so
        nothing is shifted afterwards.
    """

    inputs: Tensor
    labels: Tensor

    @property
    def asked(self) -> Tensor:
        """[B,T] bool: where the loss and the metric look."""
        if self.labels.is_floating_point():
            return ~self.labels[..., 0].isnan()
        return self.labels != IGNORE

    def answers(self) -> tuple[Tensor, Tensor]:
        """Where something is asked, as places among the B*T positions, and what is due, [n] each.

        On a GPU this waits for it, as n is not known before.
        """
        where = self.asked.flatten().nonzero()[:, 0]
        return where, self.labels.flatten()[where]

    def __len__(self) -> int:
        return len(self.inputs)

    def to(self, device: torch.device | str) -> Batch:
        return Batch(self.inputs.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Recipe:
    """How a preset is trained where nobody says otherwise.

    layers, hidden_size: the reference shape: two layers of softmax attention with MLPs, say. Its
        number of parameters is what every row gets.
    final_lr: of the cosine, as a part of `lr`; 1 for the constant rate of many of the papers.
    """

    steps: int
    batch_size: int
    lr: float
    layers: int = 2
    hidden_size: int = 64
    weight_decay: float = 0.1
    final_lr: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A synthetic task: `sample` draws batches, the other attributes say what it is about.

    Subclasses are frozen dataclasses; their fields are the settings, the defaults are the small
    size, and `presets` names others. ValueError, naming the field, for settings that cannot be.
    """

    name: ClassVar[str]
    measures: ClassVar[str]
    """One line: what a model must be able to do."""
    solved_by: ClassVar[str]
    """One line: which kinds of rows can, and which cannot, by the papers."""
    source: ClassVar[str]
    """Paper and section."""
    metric: ClassVar[str] = "accuracy"
    """Of the answers; "scaled accuracy" is 0 for guessing and 1 for perfect; "NMSE" is the squared
    error over the signal's variance."""
    solved: ClassVar[float] = 0.99
    """The metric from which on a task counts as solved; of NMSE, up to which."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]]
    recipes: ClassVar[Mapping[str, Recipe]]

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):  # as JSON and the command line give tuples
                object.__setattr__(self, field.name, tuple(value))
        self.check()

    def check(self) -> None:
        """ValueError for settings that cannot be; `presets` and the docstring say what they are."""
        raise NotImplementedError

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Tokens, those that only pad or answer included; 0 for a signal."""

    @property
    def channels(self) -> int:
        """Of a signal; 0 for tokens."""
        return 0

    @property
    @abstractmethod
    def chance(self) -> float:
        """The accuracy of a uniform guess among the answers; of a signal, the NMSE of its mean."""

    @property
    def guess(self) -> float:
        """The metric of a uniform guess: `chance`, unless the metric is scaled by it."""
        return 0.0 if self.metric == "scaled accuracy" else self.chance

    @abstractmethod
    def draw(self, random: np.random.Generator, batch_size: int, split: str) -> Batch:
        """One batch from this generator: what `sample` does, once its arguments are checked."""

    def sample(
        self, batch_size: int, *, seed: int = 0, step: int = 0, split: str = "train"
    ) -> Batch:
        """The batch of this step: a pure function of the settings and these arguments.

        So nothing has to be stored to resume, and no number of workers changes what is seen.
        Training and test batches of the same seed and step have nothing in common.

        Raises:
            ValueError: batch_size < 1, seed or step below 0, an unknown split.
        """
        check_count("batch_size", batch_size)
        check_count("seed", seed, least=0)
        check_count("step", step, least=0)
        choose("split", split, SPLITS)
        random = np.random.default_rng([SPLITS.index(split), seed, step])
        return self.draw(random, batch_size, split)

    def spell(self, token: int) -> str:
        """A token, or an answer, as people read it."""
        return str(token)

    def stream(self, batch_size: int, *, seed: int = 0, step: int = 0) -> Iterator[Batch]:
        """Training batches from this step on, without end."""
        while True:
            yield self.sample(batch_size, seed=seed, step=step)
            step += 1

    def tests(self) -> dict[str, Task]:
        """The variants on which a trained model is judged, by their names: other lengths,
        other kinds of questions. The first has the settings of training."""
        return {"as trained": self}

    def test_batches(
        self, sequences: int, *, tokens_at_once: int = 1 << 16, seed: int = 0
    ) -> Iterator[Batch]:
        """Test batches of about this many sequences in all, each batch of a bounded size.

        Long sequences are scored in pieces, so it is a piece of every one that `tokens_at_once`
        bounds; the tokens themselves are kept below 64 times that.
        """
        check_count("sequences", sequences)
        width = self.sample(1, seed=seed, split="test").inputs.shape[1]
        at_once = min(tokens_at_once // min(width, _PIECE), 64 * tokens_at_once // width)
        size = max(1, min(sequences, at_once))
        for step in range(-(-sequences // size)):
            yield self.sample(size, seed=seed, step=step, split="test")

    def is_solved(self, value: float) -> bool:
        return value <= self.solved if self.metric == "NMSE" else value >= self.solved

    def variants(self, setting: str, values: tuple[int, ...]) -> dict[str, Task]:
        """This task, and it again with each of these values of one setting."""
        own = getattr(self, setting)
        return {
            f"{setting} {value}": self if value == own else self.replace(**{setting: value})
            for value in dict.fromkeys((own, *values))
        }

    def replace(self, **settings: Any) -> Self:
        """This task with other settings."""
        return dataclasses.replace(self, **settings)


def check_count(name: str, value: object, least: int = 1, most: float = math.inf) -> None:
    """`value` must be an integer within these bounds."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        upper = "" if most == math.inf else f" and at most {most:.0f}"
        expected = f"an integer of at least {least}{upper}"
        raise fail(name, repr(value), expected, f"change {name}")


def check_counts(task: Task, least: int = 1, *names: str) -> None:
    """Each of these settings must be an integer of at least `least`."""
    for name in names:
        check_count(name, getattr(task, name), least)


def check_number(name: str, value: object, most: float) -> None:
    """`value` must be a number above 0 and at most this."""
    real = isinstance(value, int | float) and not isinstance(value, bool)
    if not real or not 0 < value <= most:  # type: ignore[operator]
        expected = "a number above 0" + (f" and at most {most:g}" if most < math.inf else "")
        raise fail(name, repr(value), expected, f"change {name}")


def check_flag(name: str, value: object) -> None:
    """`value` must be True or False."""
    if not isinstance(value, bool):
        raise fail(name, repr(value), "true or false", "pick one")


def check_lengths(name: str, values: object) -> None:
    """`values` must be distinct positive lengths, or none."""
    if not isinstance(values, tuple):
        raise fail(name, repr(values), "a tuple of lengths", f"{name}=(64, 128)")
    for value in values:
        check_count(name, value)
    if len(set(values)) != len(values):
        raise fail(name, repr(values), "lengths that differ", "leave one out")


def choose_distinct(
    random: np.random.Generator, batch_size: int, of: int, count: int
) -> np.ndarray:
    """[B,count] int64: for each row, `count` different numbers below `of`, in random order."""
    if 8 * count < of and count * count < of:  # collisions are rare: draw again where one is
        picks = random.integers(of, size=(batch_size, count))
        while len(again := np.flatnonzero(_collides(picks))):
            picks[again] = random.integers(of, size=(len(again), count))
        return picks
    keys = random.random((batch_size, of), dtype=np.float32)
    chosen = np.argpartition(keys, count - 1, axis=1)[:, :count]
    order = np.take_along_axis(keys, chosen, 1).argsort(1)
    return np.take_along_axis(chosen, order, 1).astype(np.int64)


def _collides(picks: np.ndarray) -> np.ndarray:
    ordered = np.sort(picks, axis=1)
    return (ordered[:, 1:] == ordered[:, :-1]).any(1)


def empty_labels(batch_size: int, length: int) -> np.ndarray:
    return np.full((batch_size, length), IGNORE, dtype=np.int64)


def token_batch(inputs: np.ndarray, labels: np.ndarray) -> Batch:
    return Batch(torch.from_numpy(inputs.astype(np.int64)), torch.from_numpy(labels))
