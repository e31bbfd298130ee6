"""The three plots of the report on text."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from subquad.arena.drawing import Series, byte_count, count, draw, smooth
from subquad.arena.text.results import ArenaResults

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def loss_curves(results: ArenaResults, width: int, height: int) -> str:
    """Training bits per byte against tokens seen, smoothed; the dot is the held-out value."""
    window = smoothing_window(results.plan.steps)
    series = []
    for index, result in enumerate(results.rows):
        training = result.training
        losses = smooth(training.bits_per_byte, window)
        tokens = [(window + i) * training.tokens_per_step for i in range(len(losses))]
        series.append(Series(result.name, tokens, losses, index, end=result.bits_per_byte))

    def style(axes: "Axes") -> None:
        axes.set_xlim(0, max(line.x[-1] for line in series))
        # The first steps fall from 8 bits to 5 and would flatten everything that follows.
        early = [line.y[min(len(line.y) - 1, results.plan.steps // 12)] for line in series]
        lows = [min(min(line.y), line.end or line.y[-1]) for line in series]
        margin = 0.06 * (max(early) - min(lows)) or 0.1
        axes.set_ylim(min(lows) - margin, max(early) + margin)
        axes.xaxis.set_major_formatter(lambda value, _: count(value) if value else "0")
        axes.set_xlabel("tokens seen")

    return draw(series, width, height, style, "loss", "Bits per byte against tokens seen")


def decode_times(results: ArenaResults, width: int, height: int) -> str:
    """Milliseconds per generated token against the context before it."""
    series = [
        Series(
            result.name,
            [timing.context for timing in result.decode],
            [timing.seconds_per_token * 1e3 for timing in result.decode],
            index,
        )
        for index, result in enumerate(results.rows)
    ]
    values = [value for line in series for value in line.y]
    # Few decades need ticks between the powers of ten, many do not.
    between = (1, 1.5, 2, 3, 4, 5, 7) if max(values) / min(values) < 12 else (1, 3)
    style = _log_axes(results, 10, between, "{:g}".format)
    return draw(series, width, height, style, "decode", "Milliseconds per token against context")


def cache_sizes(results: ArenaResults, width: int, height: int) -> str:
    """Bytes of cache against the context it holds."""
    series = [
        Series(
            result.name,
            [timing.context for timing in result.decode],
            [timing.cache_bytes for timing in result.decode],
            index,
        )
        for index, result in enumerate(results.rows)
    ]
    style = _log_axes(results, 8, (1,), byte_count)
    return draw(series, width, height, style, "cache", "Bytes of cache against context")


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
        axes.set_xlabel("tokens in the cache")

    return style
