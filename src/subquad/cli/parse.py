"""What is written on the command line, read: settings, counts, rates, layers. Loads no torch."""

import json
import re
from typing import Any

from subquad.errors import fail, pick
from subquad.table import ROWS


def row(argument: str, text: str) -> str:
    """The row that is meant, in any case."""
    return pick(argument, text.strip(), ROWS)


def setting(text: str) -> tuple[str, Any]:
    """`name=value`, the value as JSON, or as plain text where it is none."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise fail("--set", repr(text), "name=value", "--set weight_decay=0.05")
    try:
        return name, json.loads(value)
    except (json.JSONDecodeError, RecursionError):
        return name, value


def count(text: str) -> int:
    """`1M` -> 1000000; k, M and G (or B) are thousands, millions and thousand millions."""
    units = {"k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9}
    unit = units.get(text[-1:].lower())
    try:
        return round(float(text[:-1]) * unit) if unit else round(float(text))
    except (ValueError, OverflowError):
        expected = "a number such as 300k, 1M or 2500000"
        raise fail("parameters", repr(text), expected, "--parameters 1M") from None


def rates(text: str) -> tuple[float, ...]:
    """`1e-3,3e-3` -> (0.001, 0.003)."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        expected = "a number, or several with commas between"
        raise fail("lr", repr(text), expected, "for example --lr 1e-3,3e-3") from None


def layers(text: str) -> dict[str, Any]:
    """`4` -> that many layers; `mamba2,softmax_attention` -> these."""
    if re.fullmatch(r"[0-9]+", text):
        return {"num_hidden_layers": int(text), "layers": None}
    rows = [row("--layers", part) for part in text.split(",")]
    return {"layers": rows, "num_hidden_layers": len(rows)}
