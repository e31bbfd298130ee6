"""Line plots as inline SVG whose colours and fonts come from the page.

Matplotlib draws with placeholder colours; they are then replaced by CSS variables, so one drawing
serves the light page, the dark page and paper. Lines are labelled where they end, not in a legend.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Placeholder -> CSS variable. The values only have to be distinct and not occur by chance.
_INK, _MUTED, _GRID = "#01f201", "#01f202", "#01f203"
_SERIES = tuple(f"#01f3{index:02x}" for index in range(8))
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _GRID: "--rule"} | {
    colour: f"--series-{index}" for index, colour in enumerate(_SERIES)
}
# Beyond eight rows the colours repeat with another dash, so every line stays distinct.
_DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (3, 1, 1, 1)))
_MARKERS = ("o", "s", "D", "^", "v")
_DPI = 72  # what matplotlib writes SVG at: a point, a pixel and a unit of the drawing are then one


@dataclass(frozen=True)
class Series:
    """One labelled line. `end` is a value to mark at its right end, beside the line itself."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    index: int
    end: float | None = None

    @property
    def colour(self) -> str:
        return _SERIES[self.index % len(_SERIES)]

    @property
    def cycle(self) -> int:
        return self.index // len(_SERIES) % len(_DASHES)


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
    title: str,
) -> str:
    """The lines as inline SVG, styled by `style`, each labelled at its end.

    `name` keeps the ids of several drawings of one page apart; `title` is read to those who cannot
    see it.
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
        longest = max(len(line.name) for line in series)
        figure.subplots_adjust(
            left=62 / width, right=1 - (26 + 7 * longest) / width, top=0.96, bottom=46 / height
        )
        _label_ends(figure, axes, series, gap=17)
        return _themed_svg(figure, title)


def _draw_line(axes: "Axes", line: Series) -> None:
    few = len(line.x) <= 8
    axes.plot(
        line.x,
        line.y,
        color=line.colour,
        linestyle=_DASHES[line.cycle],
        linewidth=1.6,
        marker=_MARKERS[line.cycle] if few else None,
        markersize=4.5,
        clip_on=not few,
        solid_capstyle="round",
    )
    if line.end is not None:
        axes.plot(
            line.x[-1],
            line.end,
            color=line.colour,
            marker=_MARKERS[line.cycle],
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
            line.name,
            xy=(x + 6, y),
            xytext=(x + 18, height),
            xycoords="figure pixels",
            textcoords="figure pixels",
            color=line.colour,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": line.colour, "linewidth": 0.7, "shrinkB": 0},
        )


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
    return svg.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
