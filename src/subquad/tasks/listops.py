"""ListOps: nested lists with operators, to be evaluated in one reading.

Trees of a whole batch grow level by level and are evaluated in one walk, in arrays: recursion, one
tree at a time, would starve a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from subquad.errors import fail
from subquad.tasks.base import (
    Batch,
    Recipe,
    Task,
    check_count,
    empty_labels,
    token_batch,
)

OPERATORS = ("MIN", "MAX", "MED", "SM")
CLOSE, PAD = 14, 15
_LIST = 0.25  # the chance that a place in a list, or the root, is itself a list
_TREES = 4096  # grown at once, or fewer where they may be large
_NODES = 1 << 22
_ATTEMPTS = 4000  # batches of trees without enough of the wanted lengths before giving up


@dataclass(frozen=True, kw_only=True)
class ListOps(Task):
    """Nested lists to evaluate: Nangia and Bowman 2018 (arXiv:1804.06028), as in Tay et al. 2020.

    An expression is a digit, or with probability 1/4 (as long as the depth allows) an operator and
    2 to `arguments` expressions: [MIN, [MAX, [MED (the median, cut to a whole number) or [SM (the
    sum modulo 10). Those with more than `shortest` and fewer than `longest` tokens are kept. LRA
    (arXiv:2011.04006, section 2.2.1): depth 10, 10 arguments, 500 to 2000 tokens.

    Tokens: 0 to 9 the digits, 10 to 13 the operators with their bracket, 14 the closing bracket,
    15 pads. The value, a digit, is due at the last bracket.

    Settings:
        depth: levels, the digits' included.
        arguments: at most, of an operator.
        shortest, longest: exclusive bounds on the number of tokens.
    """

    name = "listops"
    measures = "follow a hierarchy: evaluate nested lists read from left to right"
    solved_by = "none fully; LRA: S4 59.6 %, Transformer 36.4 %; the most frequent value gives 17 %"
    source = "Tay et al. 2020 (Long Range Arena), arXiv:2011.04006, section 2.2.1"
    presets = {
        "small": {},
        "published": {"depth": 10, "arguments": 10, "shortest": 500, "longest": 2000},
    }
    recipes = {
        "small": Recipe(steps=2000, batch_size=32, lr=3e-3),
        "published": Recipe(
            steps=120_000, batch_size=32, lr=1e-3, layers=6, hidden_size=256, weight_decay=0.05
        ),
    }

    depth: int = 4
    arguments: int = 5
    shortest: int = 3
    longest: int = 64

    def check(self) -> None:
        check_count("depth", self.depth, least=2)
        check_count("arguments", self.arguments, least=2)
        check_count("shortest", self.shortest, least=1)
        check_count("longest", self.longest)
        possible = longest_expression(self.depth, self.arguments)
        if self.longest <= max(self.shortest + 1, 4):
            expected = f"more than {max(self.shortest + 1, 4)}: both bounds are exclusive"
            raise fail(
                "longest", self.longest, expected, "raise it: the shortest list has 4 tokens"
            )
        if self.shortest >= possible:
            expected = f"less than {possible}, the most that depth and arguments allow"
            raise fail("shortest", self.shortest, expected, "raise depth or arguments")

    @property
    def vocab_size(self) -> int:
        return 16

    def spell(self, token: int) -> str:
        operators = {10 + number: f"[{name}" for number, name in enumerate(OPERATORS)}
        return operators.get(token, "]" if token == CLOSE else str(token))

    @property
    def chance(self) -> float:
        return 0.1

    def draw(self, random: np.random.Generator, batch_size: int, split: str) -> Batch:
        found: list[tuple[np.ndarray, int]] = []
        trees = max(64, min(_TREES, _NODES // self.longest))
        for _ in range(_ATTEMPTS):
            forest = Forest.grow(random, trees, self.depth, self.arguments, self.longest)
            fits = (forest.lengths > self.shortest) & (forest.lengths < self.longest)
            if fits.any():
                chosen = forest.only(np.flatnonzero(fits)[: batch_size - len(found)])
                found += zip(chosen.tokens(), chosen.values().tolist())
            if len(found) == batch_size:
                break
        else:
            raise fail(
                "shortest, longest",
                f"{self.shortest}, {self.longest}",
                "lengths that occur at this depth and number of arguments",
                "ask for shorter expressions, or raise depth or arguments",
            )
        width = max(len(tokens) for tokens, _ in found)
        inputs = np.full((batch_size, width), PAD)
        labels = empty_labels(batch_size, width)
        for row, (tokens, value) in enumerate(found):
            inputs[row, : len(tokens)] = tokens
            labels[row, len(tokens) - 1] = value
        return token_batch(inputs, labels)


class Level(NamedTuple):
    """Arrays [nodes] of one depth."""

    parents: np.ndarray
    operators: np.ndarray
    digits: np.ndarray

    def pick(self, kept: np.ndarray, number: np.ndarray) -> Level:
        """The kept nodes; `number` is what parents are called from now on."""
        return Level(number[self.parents[kept]], self.operators[kept], self.digits[kept])


class Forest:
    """Trees level by level. Of each level: the parent of every node (its number within the level
    above), its operator (-1 for a digit) and its digit; siblings stand side by side."""

    def __init__(self, levels: list[Level], lengths: np.ndarray | None = None) -> None:
        self.levels = levels
        self.lengths = self.sizes[0] if lengths is None else lengths
        """Tokens of every tree; infinite if it was not grown to its end."""

    @classmethod
    def grow(
        cls,
        random: np.random.Generator,
        trees: int,
        depth: int,
        arguments: int,
        longest: int,
    ) -> Forest:
        """That many random trees. One that would reach `longest` tokens is not wanted and stops
        growing there, or deep trees of many arguments would fill the memory."""
        levels: list[Level] = []
        parents = owner = np.arange(trees)
        tokens = np.zeros(trees)
        for level in range(depth):
            nodes = len(parents)
            lists = random.random(nodes) < (_LIST if level < depth - 1 else 0)
            operators = np.where(lists, random.integers(len(OPERATORS), size=nodes), -1)
            levels.append(Level(parents, operators, random.integers(10, size=nodes)))
            tokens += np.bincount(owner, 1 + lists, minlength=trees)
            children = np.where(lists, random.integers(2, arguments + 1, size=nodes), 0)
            coming = np.bincount(owner, children, minlength=trees)
            tokens[tokens + coming >= longest] = np.inf
            children[np.isinf(tokens)[owner]] = 0
            parents = np.repeat(np.arange(nodes), children)
            owner = owner[parents]
        return cls(levels, tokens)

    def only(self, trees: np.ndarray) -> Forest:
        """These trees alone, in ascending order."""
        kept = np.zeros(len(self.levels[0].parents), dtype=bool)
        kept[trees] = True
        levels = [self.levels[0].pick(kept, np.cumsum(kept) - 1)]
        for level in self.levels[1:]:
            above, kept = kept, kept[level.parents]
            levels.append(level.pick(kept, np.cumsum(above) - 1))
        return Forest(levels)

    @cached_property
    def sizes(self) -> list[np.ndarray]:
        """Tokens of every node's expression, by level."""
        sizes = [np.ones_like(self.levels[-1].digits)]
        for level, below in zip(self.levels[-2::-1], self.levels[:0:-1]):
            own = np.where(level.operators >= 0, 2, 1)
            inside = np.bincount(below.parents, sizes[0], len(own)).astype(np.int64)
            sizes.insert(0, own + inside)
        return sizes

    def tokens(self) -> list[np.ndarray]:
        """The tokens of every tree."""
        ends = np.cumsum(self.sizes[0])
        tokens = np.full(ends[-1], CLOSE)
        starts = ends - self.sizes[0]
        for depth, (level, sizes) in enumerate(zip(self.levels, self.sizes)):
            if depth:  # behind the parent's bracket and the elder siblings
                before = np.cumsum(sizes) - sizes
                eldest = np.searchsorted(level.parents, level.parents)
                starts = starts[level.parents] + 1 + before - before[eldest]
            tokens[starts] = np.where(level.operators >= 0, 10 + level.operators, level.digits)
        return np.split(tokens, ends[:-1])

    def values(self) -> np.ndarray:
        """The value of every tree."""
        values = self.levels[-1].digits
        for level, below in zip(self.levels[-2::-1], self.levels[:0:-1]):
            result = level.digits.copy()
            if len(values):
                owners, answers = _apply(below.parents, values)
                which = level.operators[owners]
                result[owners] = answers[which, np.arange(len(owners))]
            values = result
        return values


def _apply(parents: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nodes that are lists, and [operators,lists] what each operator would make of them."""
    ordered = values[np.lexsort((values, parents))]  # each list sorted, side by side
    owners, first, counts = np.unique(parents, return_index=True, return_counts=True)
    middle = ordered[first + (counts - 1) // 2] + ordered[first + counts // 2]
    sums = np.add.reduceat(ordered, first)
    return owners, np.stack([ordered[first], ordered[first + counts - 1], middle // 2, sums % 10])


def longest_expression(depth: int, arguments: int) -> int:
    """Tokens of the largest expression: brackets around `arguments` of one level less."""
    length = 1
    for _ in range(depth - 1):
        length = 2 + arguments * length
    return length
