"""The plots of the report on text."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from subquad.arena.drawing import Series, byte_count, count, count_bytes, draw, looks, smooth
from subquad.arena.text.results import ArenaResults

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BITS = "bits per byte"


def loss_curves(results: ArenaResults, width: int, height: int) -> str:
    """Training bits per byte against tokens seen, smoothed; the dot is the held-out value."""
    series = _curves(results, against_time=False)

    def style(axes: "Axes") -> None:
        _show_all_but_the_start(axes, series, results.plan.steps)
        axes.xaxis.set_major_formatter(lambda value, _: count(value) if value else "0")

    return draw(series, width, height, style, "loss", ("tokens seen", _BITS))


def loss_against_time(results: ArenaResults, width: int, height: int) -> str:
    """The same curves against the seconds that training steps took."""
    series = _curves(results, against_time=True)

    def style(axes: "Axes") -> None:
        _show_all_but_the_start(axes, series, results.plan.steps)

    return draw(series, width, height, style, "time", ("seconds of training", _BITS))


def quality_against_state(results: ArenaResults, width: int, height: int) -> str:
    """Held-out bits per byte against the bytes kept of one sequence: a point where these are
    constant, a line from the shortest to the longest context where they grow."""
    look = looks(result.name for result in results.rows)
    series = []
    for result in results.rows:
        sizes = sorted({timing.cache_bytes for timing in result.decode})
        ends = sizes if len(sizes) < 2 else [sizes[0], sizes[-1]]
        quality = [result.bits_per_byte] * len(ends)
        series.append(Series(result.name, ends, quality, look[result.name]))

    def style(axes: "Axes") -> None:
        axes.set_xscale("log", base=2)
        axes.margins(x=0.06, y=0.12)
        count_bytes(axes.xaxis, (size for line in series for size in line.x))

    return draw(series, width, height, style, "state", ("state of one sequence", _BITS))


def _curves(results: ArenaResults, against_time: bool) -> list[Series]:
    """Smoothed training curves, against seconds or against tokens."""
    window, look = smoothing_window(results.plan.steps), looks(r.name for r in results.rows)
    series = []
    for result in results.rows:
        training = result.training
        losses = smooth(training.bits_per_byte, window)
        x: list[float] = [(window + i) * training.tokens_per_step for i in range(len(losses))]
        if against_time:
            x = list(accumulate(training.seconds))[-len(losses) :]
        end = result.bits_per_byte
        series.append(Series(result.name, x, losses, look[result.name], end=end))
    return series


def _show_all_but_the_start(axes: "Axes", series: Sequence[Series], steps: int) -> None:
    """The first steps fall from 8 bits to 5 and would flatten everything that follows."""
    axes.set_xlim(0, max(line.x[-1] for line in series))
    early = [line.y[min(len(line.y) - 1, steps // 12)] for line in series]
    lows = [min(min(line.y), line.end or line.y[-1]) for line in series]
    margin = 0.06 * (max(early) - min(lows)) or 0.1
    axes.set_ylim(min(lows) - margin, max(early) + margin)


def decode_times(results: ArenaResults, width: int, height: int) -> str:
    """Milliseconds per generated token against the context before it."""
    look = looks(result.name for result in results.rows)
    series = [
        Series(
            result.name,
            [timing.context for timing in result.decode],
            [timing.seconds_per_token * 1e3 for timing in result.decode],
            look[result.name],
        )
        for result in results.rows
    ]
    values = [value for line in series for value in line.y]
    # Few decades need ticks between the powers of ten, many do not.
    between = (1, 1.5, 2, 3, 4, 5, 7) if max(values) / min(values) < 12 else (1, 3)
    style = _log_axes(results, 10, between, "{:g}".format)
    return draw(series, width, height, style, "decode", (_CACHED, "milliseconds per token"))


def cache_sizes(results: ArenaResults, width: int, height: int) -> str:
    """Bytes of cache against the context it holds."""
    look = looks(result.name for result in results.rows)
    series = [
        Series(
            result.name,
            [timing.context for timing in result.decode],
            [timing.cache_bytes for timing in result.decode],
            look[result.name],
        )
        for result in results.rows
    ]
    style = _log_axes(results, 8, (1,), byte_count)
    return draw(series, width, height, style, "cache", (_CACHED, "size of the cache"))


_CACHED = "tokens in the cache"


def smoothing_window(steps: int) -> int:
    """Steps averaged into one point of the loss plot."""
    return max(1, steps // 25)


def _log_axes(
    results: ArenaResults, base: int, between: Sequence[float], label: Callable[[float], str]
) -> Callable[["Axes"], None]:
    """Both axes logarithmic; y ticks at `between` times the powers of `base`."""

    def style(axes: "Axes") -> None:
        from matplotlib.ticker import LogLocator

        contexts = results.config.contexts
        axes.set_xscale("log")
        axes.set_yscale("log", base=base)
        axes.margins(x=0.03, y=0.08)
        axes.yaxis.set_major_locator(LogLocator(base=base, subs=between))
        axes.yaxis.set_major_formatter(lambda value, _: label(value))
        axes.set_xticks(contexts, [count(context) for context in contexts])

    return style
