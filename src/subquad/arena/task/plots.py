"""The plots of the report on a task. Each shows what a guess would have."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from subquad.arena.drawing import Look, Series, count, count_bytes, draw, draw_level, looks
from subquad.arena.task.results import TaskArenaResults

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def learning_curves(results: TaskArenaResults, width: int, height: int) -> str:
    """The metric on test sequences against the training step; "" if nothing was tested."""
    look = _looks(results)
    series = [
        Series(row.label, row.value_steps, row.values, look[row.label])
        for row in results.rows
        if row.values
    ]

    def style(axes: "Axes") -> None:
        axes.set_xlim(0, results.plan.recipe.steps)
        axes.xaxis.set_major_formatter(lambda value, _: count(value) if value else "0")

    return _draw(results, series, width, height, style, "learning", "steps")


def learning_against_time(results: TaskArenaResults, width: int, height: int) -> str:
    """The same against the seconds of training; "" if they were not recorded."""
    look = _looks(results)
    series = [
        Series(row.label, row.value_seconds, row.values, look[row.label])
        for row in results.rows
        if row.values and len(row.value_seconds) == len(row.values)
    ]

    def style(axes: "Axes") -> None:
        axes.set_xlim(0, max(line.x[-1] for line in series))

    return _draw(results, series, width, height, style, "time", "seconds of training")


def quality_against_state(results: TaskArenaResults, width: int, height: int) -> str:
    """The metric as trained against the bytes kept of one sequence; "" if no row was tested."""
    look = _looks(results)
    series = [
        Series(row.label, [row.state_bytes], [row.value], look[row.label])
        for row in results.rows
        if row.value is not None and row.state_bytes
    ]

    def style(axes: "Axes") -> None:
        axes.set_xscale("log", base=2)
        axes.margins(x=0.1)
        count_bytes(axes.xaxis, (size for line in series for size in line.x))

    return _draw(results, series, width, height, style, "state", "state of one sequence")


def by_length(results: TaskArenaResults, width: int, height: int) -> str:
    """The metric of the trained models against the length of the test; "" for one length only."""
    look = _looks(results)
    series, lengths = [], set()
    for row in results.rows:
        found = sorted({t.positions: t.value for t in row.tests if t.value is not None}.items())
        lengths |= {positions for positions, _ in found}
        if found:
            x, y = zip(*found)
            series.append(Series(row.label, x, y, look[row.label]))
    if len(lengths) < 2:
        return ""

    def style(axes: "Axes") -> None:
        axes.set_xscale("log", base=2)
        shown = sorted(lengths)
        shown = shown[:: -(-len(shown) // 6)]
        axes.set_xticks(shown, [count(length) for length in shown])

    return _draw(results, series, width, height, style, "lengths", "positions in a test sequence")


def _looks(results: TaskArenaResults) -> dict[str, Look]:
    return looks(row.label for row in results.rows)


def _draw(
    results: TaskArenaResults,
    series: list[Series],
    width: int,
    height: int,
    style: Callable[["Axes"], None],
    name: str,
    x: str,
) -> str:
    """The metric against x, with the line of a guess; "" if there is nothing to draw."""
    task = results.config.build()

    def with_guess(axes: "Axes") -> None:
        style(axes)
        if task.metric == "NMSE":
            axes.set_yscale("log")
        else:
            axes.set_ylim(-0.04, 1.04)
        draw_level(axes, task.guess, "guessing")

    if not series:
        return ""
    return draw(series, width, height, with_guess, name, (x, task.metric))
