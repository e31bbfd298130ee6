"""How time and memory grow, drawn: docs/results/scaling-MACHINE.json as an SVG beside it.

python benchmarks/evidence_scaling.py h200 cpu
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evidence_report import save

from subquad.arena.scaling.results import RowScaling, scaling_from_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PANELS = (
    ("train seconds", "T", "training, seconds"),
    ("decode seconds", "T", "one token, seconds"),
    ("decode bytes", "T", "state, bytes"),
    ("train seconds", "d", "training, seconds"),
)


def draw(record: dict[str, Any], file: Path) -> None:
    """Every row's points, both axes logarithmic."""
    from matplotlib.figure import Figure

    rows = scaling_from_json(record)
    figure = Figure(figsize=(9, 7), layout="constrained")
    panels = figure.subplots(2, 2).flat
    for axes, (quantity, variable, title) in zip(panels, _PANELS):
        _panel(axes, rows, quantity, variable)
        fixed = "width" if variable == "T" else "length"
        axes.set_title(f"{title}, {'d' if variable == 'T' else 'T'} = {record['config'][fixed]:,}")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8)
    figure.suptitle(f"One layer, one sequence, {record['environment']['device']}")
    save(figure, file)


def _panel(axes: "Axes", rows: list[RowScaling], quantity: str, variable: str) -> None:
    for row in rows:
        points = row.in_tokens if variable == "T" else row.in_width
        x = [p.tokens if variable == "T" else p.width for p in points]
        axes.plot(x, [p.value(quantity) for p in points], marker="o", markersize=3, label=row.row)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({int(x) for line in axes.get_lines() for x in line.get_xdata()})
    axes.set_xticks(ticks, [f"{x:,}" for x in ticks])
    axes.minorticks_off()
    axes.set_xlabel(variable)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("machines", nargs="+", help="h200, cpu")
    parser.add_argument("--folder", type=Path, default=Path("docs/results"))
    args = parser.parse_args()
    for machine in args.machines:
        file = args.folder / f"scaling-{machine}.json"
        if not file.exists():
            raise SystemExit(f"{machine}: there is no {file}; `subquad arena --scaling` makes it")
        draw(json.loads(file.read_text(encoding="utf-8")), file.with_suffix(".svg"))


if __name__ == "__main__":
    main()
