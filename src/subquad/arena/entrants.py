"""Who takes part: a row, or a row with options of its own."""

import json
import re
from dataclasses import dataclass, field
from typing import Any

from subquad.mixers import MIXERS
from subquad.models.config import check_mixer_option
from subquad.recurrence.validate import choose, fail


@dataclass(frozen=True)
class Entrant:
    """`label` is what was written: `deltanet:allow_negative_eigenvalues` or just `deltanet`."""

    label: str
    row: str
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "Entrant":
        """`row`, or `row:option=value:option`, the values as JSON; an option alone is true.

        Raises ValueError: an unknown row or option, or no value that the option takes.
        """
        row, *parts = text.strip().split(":")
        choose("rows", row, tuple(MIXERS))
        options = {}
        for part in parts:
            name, equals, value = part.partition("=")
            options[name] = _value(value) if equals else True
            check_mixer_option(row, name, options[name])
        return cls(text.strip(), row, options)

    @property
    def folder(self) -> str:
        """The label as the name of a directory."""
        return re.sub(r"[^\w.=-]+", "-", self.label)


def check_rows(rows: tuple[str, ...]) -> None:
    """ValueError unless there is a row and none twice."""
    if not rows or len(set(rows)) != len(rows):
        expected = "at least one row and none twice"
        raise fail("rows", list(rows), expected, "for example --rows softmax_attention,mamba2")


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
