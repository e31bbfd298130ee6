"""The two plots of the report on a task."""

from typing import TYPE_CHECKING

from subquad.arena.drawing import Series, count, draw
from subquad.arena.task.results import TaskArenaResults

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def learning_curves(results: TaskArenaResults, width: int, height: int) -> str:
    """The metric on test sequences against the training step; "" if nothing was tested."""
    series = [
        Series(short(row.label), row.value_steps, row.values, index)
        for index, row in enumerate(results.rows)
        if row.values
    ]

    def style(axes: "Axes") -> None:
        _metric_axis(axes, results)
        axes.set_xlim(0, results.plan.recipe.steps)
        axes.xaxis.set_major_formatter(lambda value, _: count(value) if value else "0")
        axes.set_xlabel("steps")

    if not series:
        return ""
    title = f"{results.config.build().metric} against training steps"
    return draw(series, width, height, style, "learning", title)


def by_length(results: TaskArenaResults, width: int, height: int) -> str:
    """The metric of the trained models against the length of the test; "" for one length only."""
    series, lengths = [], set()
    for index, row in enumerate(results.rows):
        found = sorted({t.positions: t.value for t in row.tests if t.value is not None}.items())
        lengths |= {positions for positions, _ in found}
        if found:
            x, y = zip(*found)
            series.append(Series(short(row.label), x, y, index))
    if len(lengths) < 2:
        return ""

    def style(axes: "Axes") -> None:
        axes.set_xscale("log", base=2)
        _metric_axis(axes, results)
        shown = sorted(lengths)
        shown = shown[:: -(-len(shown) // 6)]
        axes.set_xticks(shown, [count(length) for length in shown])
        axes.set_xlabel("positions in a test sequence")

    title = f"{results.config.build().metric} against the length of the test"
    return draw(series, width, height, style, "lengths", title)


def short(label: str, most: int = 20) -> str:
    """A label that leaves room for the plot: the middle of a long one is left out."""
    if len(label) <= most:
        return label
    head = (most - 1) // 2
    return f"{label[:head]}…{label[head + 1 - most :]}"


def _metric_axis(axes: "Axes", results: TaskArenaResults) -> None:
    if results.config.build().metric == "NMSE":
        axes.set_yscale("log")
    else:
        axes.set_ylim(-0.04, 1.04)
