"""What was asked of a scaling measurement, and found: points, and exponents fitted through them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from subquad.arena.entrants import check_rows
from subquad.errors import fail, pick
from subquad.mixers import MIXERS
from subquad.table import ROWS
from subquad.tasks.base import check_count, check_number

QUANTITIES = ("train seconds", "train bytes", "decode seconds", "decode bytes")


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """The question.

    rows:      None measures every row that runs.
    tokens:    T, at the width `width`; at least three and rising.
    widths:    d, at `length` tokens.
    seconds:   a point that takes longer than this ends its series: the next would take longer.
               So does one that a GPU has no room for.
    repeats:   timings of a point; the median counts.
    """

    rows: tuple[str, ...] | None = None
    tokens: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
    widths: tuple[int, ...] = (128, 256, 512, 1024)
    width: int = 256
    length: int = 512
    seconds: float = 4.0
    repeats: int = 3
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.rows is not None:
            object.__setattr__(self, "rows", tuple(pick("rows", row, MIXERS) for row in self.rows))
            check_rows(self.rows)
        for name in ("tokens", "widths"):
            given = getattr(self, name)
            values = tuple(given) if isinstance(given, list | tuple) else (given,)
            object.__setattr__(self, name, values)
            for value in values:
                check_count(name, value)
            if len(values) < 3 or list(values) != sorted(set(values)):
                expected = "three numbers or more, rising: a slope needs points"
                raise fail(name, list(values), expected, "--set tokens=[512,1024,2048]")
        for name in ("width", "length", "repeats"):
            check_count(name, getattr(self, name))
        check_number("seconds", self.seconds, most=math.inf)


@dataclass(frozen=True)
class Point:
    """One layer at one size. Seconds and bytes; `peak_bytes` on a GPU only."""

    tokens: int
    width: int
    train_seconds: float
    train_bytes: int
    decode_seconds: float
    decode_bytes: int
    peak_bytes: int | None = None

    def value(self, quantity: str) -> float:
        return float(getattr(self, quantity.replace(" ", "_")))


@dataclass(frozen=True)
class Exponent:
    """p of q = c x^p and its standard error, over the points from `low` to `high`."""

    value: float
    error: float
    low: int
    high: int


@dataclass(frozen=True)
class RowScaling:
    """A row's points, and its exponents by quantity: in T, and in d."""

    row: str
    in_tokens: list[Point]
    in_width: list[Point]

    def exponents(self, variable: str) -> dict[str, Exponent | None]:
        """By quantity; None where there are fewer than three points. variable: "T" or "d"."""
        points = self.in_tokens if variable == "T" else self.in_width
        x = [p.tokens if variable == "T" else p.width for p in points]
        return {q: fit_exponent(x, [p.value(q) for p in points]) for q in QUANTITIES}

    def to_json(self) -> dict[str, Any]:
        fits = {
            variable: {q: e and asdict(e) for q, e in self.exponents(variable).items()}
            for variable in ("T", "d")
        }
        claims = {"train": ROWS[self.row].train, "decode": ROWS[self.row].decode}
        return {"claimed": claims, "exponents": fits} | asdict(self)


def fit_exponent(x: Sequence[float], y: Sequence[float]) -> Exponent | None:
    """The least-squares slope of log y over log x; None with fewer than three points."""
    if len(x) < 3:
        return None
    log_x, log_y = [math.log(v) for v in x], [math.log(v) for v in y]
    slope, intercept = statistics.linear_regression(log_x, log_y)
    residual = sum((v - slope * u - intercept) ** 2 for u, v in zip(log_x, log_y))
    spread = sum((u - statistics.fmean(log_x)) ** 2 for u in log_x)
    error = math.sqrt(residual / (len(x) - 2) / spread)
    return Exponent(slope, error, int(x[0]), int(x[-1]))


def scaling_from_json(record: dict[str, Any]) -> list[RowScaling]:
    """The rows of `run_scaling`'s record."""
    return [
        RowScaling(
            row["row"],
            [Point(**p) for p in row["in_tokens"]],
            [Point(**p) for p in row["in_width"]],
        )
        for row in record["rows"]
    ]
