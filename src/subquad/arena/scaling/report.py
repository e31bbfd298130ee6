"""Measured exponents for people: a terminal table, and a page with a line a row."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from subquad.arena.columns import NumberTable
from subquad.arena.drawing import Series, count, count_bytes, draw, draw_slope, looks
from subquad.arena.page import render
from subquad.arena.scaling.results import QUANTITIES, Exponent, RowScaling, scaling_from_json
from subquad.files import write_atomically, write_json
from subquad.table import ROWS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HEADS = {
    "train seconds": "train\ntime",
    "train bytes": "train\nbytes",
    "decode seconds": "decode\ntime",
    "decode bytes": "state\nbytes",
}
_AXES = {
    "train seconds": "time of a forward and backward pass",
    "train bytes": "bytes kept for the backward pass",
    "decode seconds": "time of one token",
    "decode bytes": "bytes of state",
}


def scaling_table(record: dict[str, Any], variable: str) -> NumberTable:
    """The exponents in "T" or "d" for a rich Console, beside what the paper claims."""
    heads = [*(_HEADS[quantity] for quantity in QUANTITIES), "claimed:\ntrain, token"]
    rows = []
    for row in scaling_from_json(record):
        fits = row.exponents(variable)
        claim = ROWS[row.row]
        cells = [Text(exponent_text(fits[quantity])) for quantity in QUANTITIES]
        rows.append((row.row, [*cells, Text(f"{claim.train}\n{claim.decode}")]))
    return NumberTable(f"\nrow, in {variable}", heads, rows)


def exponent_text(fit: Exponent | None) -> str:
    """`1.02±.03`, the error being the slope's standard error."""
    if fit is None:
        return "too few"
    return f"{fit.value:.2f}±{fit.error:.2f}".replace("±0.", "±.").replace("-0.00", "0.00")


def write_scaling(record: dict[str, Any], folder: Path) -> Path:
    """scaling.json and report.html in `folder`; returns the page's path."""
    write_json(folder / "scaling.json", record)
    page = folder / "report.html"
    write_atomically(page, render_scaling(record))
    return page


def render_scaling(record: dict[str, Any]) -> str:
    """The page, complete in one string."""
    rows = scaling_from_json(record)
    plots = [
        ("train seconds", "T", "Training: seconds against T"),
        ("decode seconds", "T", "Decoding: seconds a token against T"),
        ("train bytes", "T", "Training: bytes kept against T"),
        ("decode bytes", "T", "Decoding: bytes of state against T"),
        ("train seconds", "d", "Training: seconds against d"),
        ("decode seconds", "d", "Decoding: seconds a token against d"),
    ]
    drawings = {
        title: curves(rows, quantity, variable, f"plot{index}")
        for index, (quantity, variable, title) in enumerate(plots)
    }
    look = looks(row.row for row in rows)
    table = [
        {
            "row": row.row,
            "colour": look[row.row].colour,
            "train": ROWS[row.row].train,
            "decode": ROWS[row.row].decode,
            "cells": [
                {"head": f"{q} in {v}", "value": exponent_text(row.exponents(v)[q])}
                for v in ("T", "d")
                for q in QUANTITIES
            ],
        }
        for row in rows
    ]
    return render(
        "scaling/report.html.jinja",
        drawings,
        rows=table,
        config=record["config"],
        environment=record["environment"],
        quantities=QUANTITIES,
    )


def curves(rows: list[RowScaling], quantity: str, variable: str, name: str) -> str:
    """One quantity of every row, both axes logarithmic, with guides of slope 1 and 2."""
    series, look = [], looks(row.row for row in rows)
    for row in rows:
        points = row.in_tokens if variable == "T" else row.in_width
        x = [p.tokens if variable == "T" else p.width for p in points]
        if points:
            series.append(Series(row.row, x, [p.value(quantity) for p in points], look[row.row]))
    if not series:
        return ""

    def style(axes: "Axes") -> None:
        from matplotlib.ticker import LogLocator

        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.margins(x=0.03, y=0.08)
        if "bytes" in quantity:
            count_bytes(axes.yaxis, (size for line in series for size in line.y))
        else:
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axes.yaxis.set_major_formatter(lambda value, _: _seconds(value))
        ticks = sorted({x for line in series for x in line.x})
        axes.set_xticks(ticks, [count(tick) for tick in ticks])
        for power, text in ((1, variable), (2, f"{variable}²")):
            draw_slope(axes, series, power, text)

    counted = "tokens T" if variable == "T" else "width d"
    return draw(series, 440, 380, style, name, (counted, _AXES[quantity]))


def _seconds(value: float) -> str:
    for unit, name in ((1, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:.0e} s"
