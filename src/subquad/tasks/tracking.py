"""State tracking: parity, and products of permutations. Each token changes what all must mean."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache

import numpy as np

from subquad.errors import choose, fail
from subquad.labels import IGNORE
from subquad.tasks.base import (
    Batch,
    Recipe,
    Task,
    check_count,
    check_flag,
    check_lengths,
    token_batch,
)


@dataclass(frozen=True, kw_only=True)
class Parity(Task):
    """Is the number of ones odd?

    Grazzi et al. 2024 (arXiv:2411.12537, section 5.1): trained on 3 to 40 bits, tested on 40 to
    256; the accuracy is scaled so that guessing is 0. The parity is due at the last bit, or with
    `every_position` at every bit, which is learnt much sooner.

    Tokens: 0, 1, and 2 to pad.

    Settings:
        shortest, longest: bits in a sequence, uniform between the two, both included.
        every_position: ask at every bit.
        test_lengths: exact lengths on which a trained model is tested besides.
    """

    name = "parity"
    measures = "track one bit of state through every token"
    solved_by = "transitions with negative eigenvalues: deltanet with beta up to 2, slstm, lstm"
    source = "Grazzi et al. 2024, arXiv:2411.12537, section 5.1"
    metric = "scaled accuracy"
    presets = {
        "small": {},
        "published": {"every_position": False, "test_lengths": (40, 64, 128, 256)},
    }
    recipes = {
        "small": Recipe(steps=1500, batch_size=32, lr=3e-3),
        "published": Recipe(steps=20_000, batch_size=256, lr=1e-3, hidden_size=128),
    }

    shortest: int = 3
    longest: int = 40
    every_position: bool = True
    test_lengths: tuple[int, ...] = (64, 128, 256)

    def check(self) -> None:
        check_count("shortest", self.shortest)
        check_count("longest", self.longest)
        check_lengths("test_lengths", self.test_lengths)
        if self.shortest > self.longest:
            expected = f"at most longest = {self.longest}"
            raise fail("shortest", self.shortest, expected, "order the two")
        check_flag("every_position", self.every_position)

    @property
    def vocab_size(self) -> int:
        return 3

    @property
    def chance(self) -> float:
        return 0.5

    def draw(self, random: np.random.Generator, batch_size: int, split: str) -> Batch:
        lengths = random.integers(self.shortest, self.longest + 1, size=batch_size)[:, None]
        bits = random.integers(2, size=(batch_size, self.longest))
        position = np.arange(self.longest)
        inside, last = position < lengths, position == lengths - 1
        parity = bits.cumsum(1) % 2
        asked = inside if self.every_position else last
        return token_batch(np.where(inside, bits, 2), np.where(asked, parity, IGNORE))

    def tests(self) -> dict[str, Task]:
        exact: dict[str, Task] = {
            f"length {n}": self.replace(shortest=n, longest=n, test_lengths=())
            for n in self.test_lengths
        }
        return {f"length {self.shortest} to {self.longest}": self} | exact


GROUPS = tuple(f"{kind}{n}" for kind in "SA" for n in (2, 3, 4, 5))
INPUTS = ("all", "swaps")


@dataclass(frozen=True, kw_only=True)
class WordProblem(Task):
    """Permutations one after another: at each, what is the product up to here?

    Merrill, Petty and Sabharwal 2024 (arXiv:2404.08819, section 5), after Barrington 1989: for S5
    and A5 this is complete for NC1, so models that compute in constant depth cannot do it at every
    length. Elements are drawn uniformly; the label at t is x_1 x_2 ... x_t, where x y applies x
    first. With `inputs="swaps"` only transpositions and the identity occur (Grazzi et al. 2024,
    section 5.2), which one reflection a token can follow.

    Tokens: the group's elements, sorted as tuples; 0 is the identity.

    Settings:
        group: S2 to S5 (all permutations) or A2 to A5 (the even ones). The small default, S3, can
            be learnt in minutes and is not commutative; S5 and A5 are the hard ones.
        length: elements in a sequence.
        inputs: "all" elements, or "swaps" (a symmetric group only).
        test_lengths: lengths on which a trained model is tested besides.
    """

    name = "s5"
    measures = "track a state that no constant-depth circuit can: products of permutations"
    solved_by = (
        "lstm and rows with input-dependent, non-diagonal transitions; mamba, s4 and attention "
        "need more layers the longer it is"
    )
    source = "Merrill et al. 2024, arXiv:2404.08819, section 5"
    presets = {
        "small": {},
        "swaps": {"group": "S5", "inputs": "swaps"},
        "published": {"group": "A5", "length": 20, "test_lengths": ()},
    }
    recipes = {
        "small": Recipe(steps=2000, batch_size=32, lr=3e-3),
        "swaps": Recipe(steps=10_000, batch_size=64, lr=1e-3, hidden_size=128),
        "published": Recipe(steps=100_000, batch_size=128, lr=1e-4, layers=1, hidden_size=512),
    }

    group: str = "S3"
    length: int = 16
    inputs: str = "all"
    test_lengths: tuple[int, ...] = (32, 64)

    def check(self) -> None:
        choose("group", self.group, GROUPS)
        choose("inputs", self.inputs, INPUTS)
        check_count("length", self.length)
        check_lengths("test_lengths", self.test_lengths)
        if self.inputs == "swaps" and self.group[0] == "A":
            raise fail("inputs", "'swaps'", f"'all' with group {self.group}", "swaps are odd")

    @property
    def vocab_size(self) -> int:
        return len(elements(self.group))

    @property
    def chance(self) -> float:
        return 1 / self.vocab_size

    def draw(self, random: np.random.Generator, batch_size: int, split: str) -> Batch:
        table, swaps = multiplication(self.group)
        if self.inputs == "swaps":
            tokens = swaps[random.integers(len(swaps), size=(batch_size, self.length))]
        else:
            tokens = random.integers(len(table), size=(batch_size, self.length))
        products = np.empty_like(tokens)
        products[:, 0] = tokens[:, 0]
        for t in range(1, self.length):
            products[:, t] = table[products[:, t - 1], tokens[:, t]]
        return token_batch(tokens, products)

    def tests(self) -> dict[str, Task]:
        return self.variants("length", self.test_lengths)


@cache
def elements(group: str) -> tuple[tuple[int, ...], ...]:
    """The permutations of the group as tuples, p[i] being where i goes; sorted, identity first."""
    n = int(group[1:])
    every = itertools.permutations(range(n))
    if group[0] == "S":
        return tuple(every)
    return tuple(p for p in every if sum(a > b for a, b in itertools.combinations(p, 2)) % 2 == 0)


@cache
def multiplication(group: str) -> tuple[np.ndarray, np.ndarray]:
    """table[x, y] = the number of xy (x first, then y); the numbers of identity and swaps."""
    members = np.array(elements(group))
    weights = len(members[0]) ** np.arange(len(members[0]))
    number = np.full((members @ weights).max() + 1, -1)
    number[members @ weights] = np.arange(len(members))
    products = members[:, members].transpose(1, 0, 2)  # [y,x,i] -> y[x[i]], then x before y
    moved = (members != np.arange(len(members[0]))).sum(1)
    return number[products @ weights], np.flatnonzero(moved <= 2)
