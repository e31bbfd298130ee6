"""`Row`: one published model, as the few things in which it differs from the others.

Each row is a `Recurrence` and what cannot be derived from it: how keys and queries are made
(`features`), a formula where the derived one would not be the paper's, and the paper. Forms, state
size, complexities and time invariance follow from the spec. That a row is listed does not mean that
it runs yet: a row runs once a mixer of its name exists (`subquad table` says which do).

Letters: T tokens, H heads, K key size, V value size, d model width, N state size, w window.
"""

from __future__ import annotations

from dataclasses import dataclass

from subquad.table.spec import Recurrence


@dataclass(frozen=True)
class Row:
    """One published model. `write_` and `read_` override the derived formulas."""

    name: str
    recurrence: Recurrence
    paper: str
    features: str = ""
    write_: str = ""
    read_: str = ""
    state_: str = ""
    train_: str = ""
    decode_: str = ""
    then: tuple[Recurrence, ...] = ()  # recurrences that read what the first one gave
    state_grows: bool = False  # with every token, as attention's keys and values do

    @property
    def recurrences(self) -> tuple[Recurrence, ...]:
        """All of them, in the order in which they run."""
        return (self.recurrence, *self.then)

    @property
    def engine(self) -> str:
        return self.recurrence.engine

    @property
    def write(self) -> str:
        """The recurrence as a formula."""
        return self.write_ or self.recurrence.write

    @property
    def read(self) -> str:
        """The read-out as a formula."""
        return self.read_ or self.recurrence.read

    @property
    def state(self) -> str:
        """Numbers kept for one sequence and layer."""
        if self.state_:
            return self.state_
        if self.engine == "matrix":
            return "H·(K·V + K)" if self.recurrence.read_out == "normalised" else "H·K·V"
        return "d·N"

    @property
    def train(self) -> str:
        """Complexity of one layer over T tokens, all at once."""
        if self.train_:
            return self.train_
        return {
            "matrix": "O(T·H·K·V)",
            "selective": "O(T·d·N)",
            "average": "O(T·d)",
            "invariant": "O(T·d·(N + log T))",
            "attention": "O(T²·d)",
            "nonlinear": "O(T·d²), sequential",
        }[self.engine]

    @property
    def decode(self) -> str:
        """Complexity of one more token after T."""
        if self.decode_:
            return self.decode_
        return {
            "matrix": "O(H·K·V)",
            "selective": "O(d·N)",
            "average": "O(d)",
            "invariant": "O(d·N)",
            "attention": "O(T·d)",
            "nonlinear": "O(d²)",
        }[self.engine]

    def as_dict(self, runs: bool) -> dict[str, object]:
        """The row for `subquad table --json`."""
        return {
            "name": self.name,
            "engine": self.engine,
            "recurrence": self.write,
            "read": self.read,
            "features": self.features,
            "state_size": self.state,
            "train_complexity": self.train,
            "decode_complexity": self.decode,
            "state_grows": self.state_grows,
            "time_invariant": self.recurrence.time_invariant,
            "forms": list(self.recurrence.forms),
            "paper": self.paper,
            "runs": runs,
        }
