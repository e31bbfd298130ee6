"""Line plots as inline SVG whose colours and fonts come from the page.

Matplotlib draws with placeholder colours; they are then replaced by CSS variables, so one drawing
serves the light page, the dark page and paper. Lines are labelled where they end, not in a legend.
"""

import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from subquad.table import ROWS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Placeholder -> CSS variable. The values only have to be distinct and not occur by chance.
_INK, _MUTED, _GRID = "#01f201", "#01f202", "#01f203"
_SERIES = tuple(f"#01f3{index:02x}" for index in range(8))
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _GRID: "--rule"} | {
    colour: f"--series-{index}" for index, colour in enumerate(_SERIES)
}
# Every row looks the same on every page. Those that are compared most come first, with a colour
# each and a full line; the others share their colours, with another dash.
_FIRST = (
    "softmax_attention",
    "mamba",
    "mamba2",
    "gla",
    "gated_deltanet",
    "deltanet",
    "linear_attention",
    "retnet",
    "sliding_window_attention",
    "s4d",
)
_DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (3, 1, 1, 1)))
_MARKERS = ("o", "s", "D", "^", "v")
_LONGEST_NAME = 24  # letters of a line's name that are written beside it
_DPI = 72  # what matplotlib writes SVG at: a point, a pixel and a unit of the drawing are then one


@dataclass(frozen=True)
class Look:
    """How a row is drawn: a colour of the page and a dash, by number."""

    colour: int
    dash: int


def looks(labels: Iterable[str]) -> dict[str, Look]:
    """The look of each label: that of its row, but of the same row twice, with another dash."""
    others = [name for name in ROWS if name not in _FIRST]
    places = {name: place for place, name in enumerate((*_FIRST, *others))}
    found: dict[str, Look] = {}
    for label in labels:
        place = places.get(label.split(":")[0], len(places))
        look = Look(place % len(_SERIES), place // len(_SERIES) % len(_DASHES))
        for _ in _DASHES:
            if look not in found.values():
                break
            look = Look(look.colour, (look.dash + 1) % len(_DASHES))
        found[label] = look
    return found


@dataclass(frozen=True)
class Series:
    """One labelled line. `end` is a value to mark at its right end, beside the line itself."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    look: Look
    end: float | None = None

    @property
    def colour(self) -> str:
        return _SERIES[self.look.colour]


def short(label: str, most: int = _LONGEST_NAME) -> str:
    """A label that leaves room for the plot: the middle of a long one is left out."""
    if len(label) <= most:
        return label
    head = (most - 1) // 2
    return f"{label[:head]}…{label[head + 1 - most :]}"


def count(value: float) -> str:
    """1500 -> 1.5k, 16384 -> 16k, 2_000_000 -> 2M: as people say context lengths and sizes."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            scaled = value / unit
            digits = f"{scaled:.1f}".removesuffix(".0") if scaled < 10 else f"{scaled:.0f}"
            return digits + name
    return f"{value:g}"


def byte_count(value: float) -> str:
    """Bytes in binary units with about three digits: 983040 -> 960 KiB."""
    for name in ("B", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{value:.3g} {name}" if value < 1000 else f"{value:.0f} {name}"
        value /= 1024
    return f"{value:.3g} GiB"


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Means of `window` neighbours; `window - 1` shorter than the input, never empty."""
    window = min(window, len(values))
    total = sum(values[:window])
    means = [total / window]
    for new, old in zip(values[window:], values):
        total += new - old
        means.append(total / window)
    return means


def draw(
    series: Sequence[Series],
    width: int,
    height: int,
    style: Callable[["Axes"], None],
    name: str,
    axes_labels: tuple[str, str],
) -> str:
    """The lines as inline SVG, styled by `style`, each labelled at its end.

    `name` keeps the ids of several drawings of one page apart; `axes_labels` are what x and y
    count, and, as "y against x", read to those who cannot see the drawing.
    """
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.fonttype": "none",  # text stays text: the page's font, selectable, small
        "svg.hashsalt": f"{name}-{width}",  # ids must differ between drawings of one page
        "font.size": 13,
        "axes.edgecolor": _GRID,
        "axes.labelcolor": _MUTED,
        "xtick.color": _MUTED,
        "ytick.color": _MUTED,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
        axes = figure.add_subplot()
        for line in series:
            _draw_line(axes, line)
        style(axes)
        axes.grid(axis="y", color=_GRID, linewidth=0.7)
        axes.minorticks_off()
        axes.tick_params(length=0, pad=5)
        x, y = axes_labels
        axes.set_xlabel(x)
        longest = max(len(short(line.name)) for line in series)
        figure.subplots_adjust(
            left=62 / width,
            right=1 - (26 + 7 * longest) / width,
            top=1 - 30 / height,
            bottom=46 / height,
        )
        # Above the axis, where it reads like the rest and takes no width.
        figure.text(2 / width, 1 - 16 / height, y, color=_MUTED, fontsize=13)
        _label_ends(figure, axes, series, gap=17)
        return _themed_svg(figure, f"{y} against {x}")


def count_bytes(axis: Any, values: Iterable[float], most: int = 4) -> None:
    """Ticks of a logarithmic axis at powers of two, at most about so many."""
    low, high = math.log2(min(values := list(values))), math.log2(max(values))
    step = max(1, math.ceil((high - low) / most))
    first = math.ceil(low / step) * step
    ticks = [2.0**power for power in range(first, math.floor(high) + 1, step)]
    axis.set_ticks(ticks or [2.0 ** round(low)])
    axis.set_major_formatter(lambda value, _: byte_count(value))


def draw_level(axes: "Axes", value: float, text: str) -> None:
    """A dotted line at one height across the plot, with its name on it."""
    axes.axhline(value, color=_MUTED, linewidth=0.9, linestyle=(0, (1, 2)))
    across = axes.get_yaxis_transform()  # x from 0 to 1, y in data
    axes.text(0.01, value, text, color=_MUTED, fontsize=11, va="bottom", transform=across)


def draw_slope(axes: "Axes", series: Sequence[Series], power: int, text: str) -> None:
    """A dotted guide y = c x^power on axes that are both logarithmic, from where the lowest line
    begins up to the end of the plot."""
    lowest = min(series, key=lambda line: line.y[0])
    x, y = lowest.x[0], lowest.y[0]
    right = max(line.x[-1] for line in series)
    top = max(max(line.y) for line in series)
    end = min(right, x * max(1.0, top / y) ** (1 / power))
    if end <= x:
        return
    height = y * (end / x) ** power
    axes.plot((x, end), (y, height), color=_MUTED, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
    axes.annotate(
        text, (end, height), xytext=(-4, 2), textcoords="offset points", color=_MUTED,
        fontsize=11, ha="right", va="bottom",
    )  # fmt: skip


def _draw_line(axes: "Axes", line: Series) -> None:
    few, dash = len(line.x) <= 8, line.look.dash
    axes.plot(
        line.x,
        line.y,
        color=line.colour,
        linestyle=_DASHES[dash],
        linewidth=1.6,
        marker=_MARKERS[dash] if few else None,
        markersize=4.5,
        clip_on=not few,
        solid_capstyle="round",
    )
    if line.end is not None:
        axes.plot(
            line.x[-1],
            line.end,
            color=line.colour,
            marker=_MARKERS[dash],
            markersize=5.5,
            clip_on=False,
        )


def _label_ends(figure: "Figure", axes: "Axes", series: Sequence[Series], gap: float) -> None:
    """Write each name beside its line's end, moved apart where they would overlap."""
    ends = [line.y[-1] if line.end is None else line.end for line in series]
    points = [axes.transData.transform((line.x[-1], end)) for line, end in zip(series, ends)]
    box = axes.get_window_extent()
    heights = spread([point[1] for point in points], gap, box.y0, box.y1)
    for line, (x, y), height in zip(series, points, heights):
        axes.annotate(
            _plain(short(line.name)),
            xy=(x + 6, y),
            xytext=(x + 18, height),
            xycoords="figure pixels",
            textcoords="figure pixels",
            color=line.colour,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": line.colour, "linewidth": 0.7, "shrinkB": 0},
        )


def _plain(text: str) -> str:
    """Text that matplotlib does not take for mathematics."""
    return text.replace("$", r"\$")


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move positions apart to at least `gap`, in order, each as near its place as blocks allow.

    Neighbours that would overlap merge into a block centred on the mean of its members' wishes;
    the whole is then shifted into [low, high] where it fits.
    """
    order = sorted(range(len(positions)), key=positions.__getitem__)
    blocks: list[list[float]] = []  # [wished start, members]
    for rank in order:
        blocks.append([positions[rank], 1])
        while len(blocks) > 1 and blocks[-1][0] < blocks[-2][0] + gap * blocks[-2][1]:
            start, members = blocks.pop()
            below, count_below = blocks[-1]
            merged = members + count_below
            wish = below * count_below + (start - gap * count_below) * members
            blocks[-1] = [wish / merged, merged]
    placed = [start + gap * i for start, members in blocks for i in range(int(members))]
    for i in range(len(placed)):  # push up from the bottom, then down from the top
        placed[i] = max(placed[i], low + gap * i)
    for i in range(len(placed)):
        placed[-1 - i] = min(placed[-1 - i], high - gap * i)
    result = [0.0] * len(placed)
    for rank, place in zip(order, placed):
        result[rank] = place
    return result


def _themed_svg(figure: "Figure", title: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    # The page scales the drawing by its width; a fixed height would letterbox it.
    svg = re.sub(r'<svg ([^>]*?)(?:width|height)="[^"]*" ', r"<svg \1", svg, count=1)
    svg = re.sub(r'<svg ([^>]*?)(?:width|height)="[^"]*"', r"<svg \1", svg, count=1)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)
