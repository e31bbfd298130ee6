"""Who takes part: a row, or a row with options of its own."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from subquad.errors import fail, pick
from subquad.mixers import MIXERS
from subquad.models.config import check_mixer_option


@dataclass(frozen=True)
class Entrant:
    """`label` is the row and what was written after it, without blanks around the parts:
    `deltanet:allow_negative_eigenvalues` or just `deltanet`."""

    label: str
    row: str
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "Entrant":
        """`row`, or `row:option=value:option`, the values as JSON; an option alone is true.
        The row may be written in any case.

        Commas and colons inside of a value's quotes or brackets belong to it: `row:name=[1,2]`.

        Raises ValueError: an unknown row or option, or no value that the option takes.
        """
        row, *parts = _split(text, ":") or [""]
        row = pick("rows", row, MIXERS)
        label, options = row, {}
        for part in parts:
            name, equals, value = map(str.strip, part.partition("="))
            options[name] = _value(value) if equals else True
            check_mixer_option(row, name, options[name])
            label += f":{name}{equals}{value}"
        return cls(label, row, options)

    @property
    def folder(self) -> str:
        """The label as the name of a directory."""
        return re.sub(r"[^\w.=-]+", "-", self.label)


def split_rows(text: str) -> tuple[str, ...]:
    """`a, b:option=[1,2]` -> ("a", "b:option=[1,2]")."""
    return tuple(_split(text, ","))


def labels(rows: Iterable[str]) -> tuple[str, ...]:
    """The rows as their results will be labelled. ValueError for an unknown row or option."""
    return tuple(Entrant.parse(row).label for row in rows)


def check_rows(rows: tuple[str, ...]) -> None:
    """ValueError unless there is a row and none twice."""
    if not rows or len(set(rows)) != len(rows):
        expected = "at least one row and none twice"
        raise fail("rows", list(rows), expected, "for example --rows softmax_attention,mamba2")


def _split(text: str, separator: str) -> list[str]:
    """The parts between separators that are in no quotes and in no brackets; none is empty."""
    inside = r'"[^"]*"|\[[^\]]*\]|\{[^}]*\}'
    parts = re.findall(f"(?:{inside}|[^{separator}])+", text)
    return [part.strip() for part in parts if part.strip()]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
