"""Stories: who went where, who holds what, told in short sentences; then one question.

All stories of a batch are told at once: a step moves one person or thing in every one of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from subquad.errors import choose, fail
from subquad.tasks.base import (
    Batch,
    Recipe,
    Task,
    check_count,
    check_counts,
    check_lengths,
    empty_labels,
    token_batch,
)

KINDS = ("one_fact", "two_facts", "three_facts", "yes_no", "counting")
PEOPLE = ("anna", "boris", "chen", "dina", "emil", "fatma", "greta", "hugo")
PLACES = ("attic", "bakery", "cellar", "forest", "harbour", "library", "market", "station")
THINGS = ("coin", "drum", "key", "lamp", "map", "rope")
COUNTS = ("none", "one", "two", "three", "four", "five", "six")
_GLUE = (
    "<pad> . ? the in is where was before how many things does hold walked to took dropped there "
    "yes no"
)
_WORDS = (*_GLUE.split(), *PEOPLE, *PLACES, *THINGS, *COUNTS)
ID = {word: number for number, word in enumerate(_WORDS)}
_SENTENCE = 6
_ATTEMPTS = 200  # batches of stories without enough that have the wanted question


def words(tokens: list[int]) -> str:
    """The story in words, without its padding."""
    return " ".join(_WORDS[token] for token in tokens if token)


@dataclass(frozen=True, kw_only=True)
class Stories(Task):
    """Questions about a small world, in a grammar and words of our own.

    The kinds are those of Weston et al. 2015 (bAbI, arXiv:1502.05698, section 3; its tasks 1, 2, 3,
    6 and 7).

    In every sentence somebody walks to a place, takes a thing that lies there, or drops one:

        anna walked to the attic . anna took the lamp there . boris walked to the forest .
        one_fact     where is boris ?                   forest
        two_facts    where is the lamp ?                attic
        three_facts  where was the lamp before the forest ?
        yes_no       is anna in the forest ?            no      (as often yes as no)
        counting     how many things does anna hold ?   one

    A question is asked only if the sentences answer it. The answer is one word, due at the "?".
    bAbI counts a kind as solved from 95 %.

    Settings:
        kind: of the questions; "mixed" draws one for each story.
        sentences: before the question.
        people, places, things: in the world, at most 8, 8 and 6.
        test_sentences: story lengths on which a trained model is tested besides.
    """

    name = "stories"
    measures = "keep a small world up to date and answer about it: one to three facts, counting"
    solved_by = "attention and memory networks the kinds of few facts; three facts are hard"
    source = "Weston et al. 2015 (bAbI), arXiv:1502.05698, section 3; our own grammar"
    solved = 0.95
    presets = {
        "small": {},
        # bAbI's worlds: 4 people, 6 places, 3 things; its stories of two facts are that long.
        "published": {"people": 4, "places": 6, "things": 3, "sentences": 20},
    }
    recipes = {
        "small": Recipe(steps=2000, batch_size=32, lr=3e-3),
        "published": Recipe(steps=30_000, batch_size=64, lr=1e-3, layers=4, hidden_size=128),
    }

    kind: str = "mixed"
    sentences: int = 8
    people: int = 3
    places: int = 4
    things: int = 3
    test_sentences: tuple[int, ...] = ()

    def check(self) -> None:
        choose("kind", self.kind, (*KINDS, "mixed"))
        for name, pool in (("people", PEOPLE), ("places", PLACES), ("things", THINGS)):
            check_count(name, getattr(self, name), least=1, most=len(pool))
        check_count("places", self.places, least=2)
        check_lengths("test_sentences", self.test_sentences)
        least = {"three_facts": 4, "mixed": 4, "two_facts": 2, "counting": 2}.get(self.kind, 1)
        check_counts(self, least, "sentences")
        for number in self.test_sentences:
            check_count("test_sentences", number, least)

    @property
    def vocab_size(self) -> int:
        return len(_WORDS)

    def spell(self, token: int) -> str:
        return _WORDS[token]

    @property
    def chance(self) -> float:
        answers = {"yes_no": 2, "counting": 1 + self.things}
        kinds = KINDS if self.kind == "mixed" else (self.kind,)
        return sum(1 / answers.get(kind, self.places) for kind in kinds) / len(kinds)

    def draw(self, random: np.random.Generator, batch_size: int, split: str) -> Batch:
        kinds = np.array([KINDS.index(self.kind)] * batch_size if self.kind != "mixed" else [])
        if self.kind == "mixed":
            kinds = random.integers(len(KINDS), size=batch_size)
        inputs = np.zeros((batch_size, _SENTENCE * self.sentences + 8), dtype=np.int64)
        labels = empty_labels(*inputs.shape)
        todo = np.arange(batch_size)
        for _ in range(_ATTEMPTS):
            world = World(random, len(todo), self)
            for _ in range(self.sentences):
                world.tell()
            told = np.stack(world.told, axis=1).reshape(len(todo), -1)
            inputs[todo, : told.shape[1]] = told
            answered = np.zeros(len(todo), dtype=bool)
            for number, kind in enumerate(KINDS):
                rows = np.flatnonzero(kinds[todo] == number)
                question, answer, fits = getattr(world, f"ask_{kind}")(rows)
                inputs[todo[rows], told.shape[1] :] = 0
                end = told.shape[1] + question.shape[1]
                inputs[todo[rows], told.shape[1] : end] = question
                labels[todo[rows], end - 1] = answer
                answered[rows] = fits
            todo = todo[~answered]
            if not len(todo):
                return token_batch(inputs, labels)
        raise fail(
            "sentences",
            self.sentences,
            f"enough for questions of kind {self.kind!r} to have answers",
            "tell longer stories, or of fewer people and things",
        )

    def tests(self) -> dict[str, Task]:
        kinds = {kind: self.replace(kind=kind) for kind in KINDS} if self.kind == "mixed" else {}
        return {self.kind: self} | kinds | self._longer()

    def _longer(self) -> dict[str, Task]:
        return {f"{n} sentences": self.replace(sentences=n) for n in self.test_sentences}


class World:
    """The worlds of n stories, and what their sentences have said.

    at [n,people]: where each person is, -1 if that was never said.
    holder [n,things]: who has each thing, -1 for nobody.
    place, before [n,things]: where each thing is and the place it was at before that, -1 if that
        cannot be known from the sentences.
    """

    def __init__(self, random: np.random.Generator, n: int, task: Stories) -> None:
        self.random, self.task, self.rows = random, task, np.arange(n)
        self.at = np.full((n, task.people), -1)
        self.holder = np.full((n, task.things), -1)
        self.place = np.full((n, task.things), -1)
        self.before = np.full((n, task.things), -1)
        self.told: list[np.ndarray] = []

    def tell(self) -> None:
        """One more sentence in every story: walk, or (where somebody can) take or drop."""
        who = self.random.integers(self.task.people, size=len(self.rows))
        here = self.at[self.rows, who]
        known = (here >= 0)[:, None]
        mine = self.holder == who[:, None]
        # Nobody has said where an untouched thing lies: it may lie here.
        lying = (self.holder < 0) & ((self.place == here[:, None]) | (self.place < 0)) & known
        thing = self._one_of(mine | lying)
        acts = (mine | lying).any(1) & (self.random.random(len(self.rows)) < 0.5)
        drops = mine[self.rows, np.maximum(thing, 0)]
        goal = self._elsewhere(here)
        walk = self._sentence([who + ID[PEOPLE[0]], "walked", "to", "the", goal + ID[PLACES[0]]])
        name = thing + ID[THINGS[0]]
        take = self._sentence([who + ID[PEOPLE[0]], "took", "the", name, "there"])
        drop = self._sentence([who + ID[PEOPLE[0]], "dropped", "the", name, "there"])
        self.told.append(np.where(acts[:, None], np.where(drops[:, None], drop, take), walk))
        self._walk(np.flatnonzero(~acts), who, goal)
        self._hand(np.flatnonzero(acts), who, thing, drops)

    def _walk(self, rows: np.ndarray, who: np.ndarray, goal: np.ndarray) -> None:
        self.at[rows, who[rows]] = goal[rows]
        carried = self.holder[rows] == who[rows, None]
        there = goal[rows, None]
        self.before[rows] = np.where(carried, self.place[rows], self.before[rows])
        self.place[rows] = np.where(carried, there, self.place[rows])

    def _hand(
        self, rows: np.ndarray, who: np.ndarray, thing: np.ndarray, drops: np.ndarray
    ) -> None:
        self.holder[rows, thing[rows]] = np.where(drops[rows], -1, who[rows])
        self.place[rows, thing[rows]] = self.at[rows, who[rows]]

    def ask_one_fact(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where is somebody? Question [n,L], answer [n], and which of them have an answer."""
        who = self._one_of(self.at >= 0)[rows]
        question = self._sentence(["where", "is", who + ID[PEOPLE[0]]], "?", rows)
        return question, self.at[rows, who] + ID[PLACES[0]], who >= 0

    def ask_two_facts(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where is a thing? It was taken somewhere, and its holder may have walked since."""
        what = self._one_of(self.place >= 0)[rows]
        question = self._sentence(["where", "is", "the", what + ID[THINGS[0]]], "?", rows)
        return question, self.place[rows, what] + ID[PLACES[0]], what >= 0

    def ask_three_facts(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where was a thing before it came to where it is?"""
        what = self._one_of(self.before >= 0)[rows]
        here = self.place[rows, what] + ID[PLACES[0]]
        asked = ["where", "was", "the", what + ID[THINGS[0]], "before", "the", here]
        question = self._sentence(asked, "?", rows)
        return question, self.before[rows, what] + ID[PLACES[0]], what >= 0

    def ask_yes_no(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Is somebody at a place? Half of the time."""
        who = self._one_of(self.at >= 0)
        here = self.at[self.rows, who]
        yes = self.random.integers(2, size=len(self.rows)).astype(bool)
        where = np.where(yes, here, self._elsewhere(here))[rows] + ID[PLACES[0]]
        asked = ["is", who[rows] + ID[PEOPLE[0]], "in", "the", where]
        question = self._sentence(asked, "?", rows)
        return question, np.where(yes, ID["yes"], ID["no"])[rows], who[rows] >= 0

    def ask_counting(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """How many things does somebody hold? Asked only of those who were somewhere."""
        who = self._one_of(self.at >= 0)[rows]
        held = (self.holder[rows] == who[:, None]).sum(1)
        asked = ["how", "many", "things", "does", who + ID[PEOPLE[0]], "hold"]
        return self._sentence(asked, "?", rows), held + ID[COUNTS[0]], who >= 0

    def _one_of(self, mask: np.ndarray) -> np.ndarray:
        """[n]: a column of those that are set in each row, uniformly; -1 where there is none."""
        scores = np.where(mask, self.random.random(mask.shape), -1.0)
        return np.where(mask.any(1), scores.argmax(1), -1)

    def _elsewhere(self, here: np.ndarray) -> np.ndarray:
        """[n]: another place than `here`; any where that is -1."""
        places = self.task.places
        step = self.random.integers(1, places, size=len(here))
        anywhere = self.random.integers(places, size=len(here))
        return np.where(here < 0, anywhere, (here + step) % places)

    def _sentence(
        self, parts: list[str | np.ndarray], end: str = ".", rows: np.ndarray | None = None
    ) -> np.ndarray:
        """[n,L]: words, some the same in all stories and some given as a number for each."""
        n = len(self.rows if rows is None else rows)
        columns = [np.full(n, ID[p]) if isinstance(p, str) else p for p in [*parts, end]]
        return np.stack(columns, axis=1)
