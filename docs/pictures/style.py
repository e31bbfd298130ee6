"""How the pictures of these pages look: one set of colours, words beside the lines, no chrome."""

from itertools import pairwise
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__).parent
INK, MUTED, RULE = "#1f2933", "#6b7280", "#e3e6ea"
BLUE, ORANGE, GREEN, RED, GREY = "#2563eb", "#d97706", "#15803d", "#b91c1c", "#8a94a3"

_SETTINGS = {
    "svg.fonttype": "none",  # text stays text: small, and searchable
    "svg.hashsalt": "subquad",  # the same picture gives the same file
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "sans-serif"],
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


def figure(width: float, height: float) -> Figure:
    """In inches, white, with these settings for everything that is drawn on it."""
    matplotlib.rcParams.update(_SETTINGS)
    return Figure(figsize=(width, height), facecolor="white", layout="constrained")


def label(axes: Axes, x: float, y: float, text: str, colour: str, **options: object) -> None:
    """A name beside what it names, in its colour."""
    options = {"va": "center", "clip_on": False} | options
    axes.text(x, y, text, color=colour, **options)


def spread(heights: list[float], gap: float) -> list[float]:
    """Heights at least `gap` apart, in the same order: where labels of near lines may stand."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    placed = list(heights)
    for low, high in pairwise(order):
        overlap = gap - (placed[high] - placed[low])
        if overlap > 0:
            placed[low] -= overlap / 2
            placed[high] += overlap / 2
    return placed


def save(picture: Figure, name: str) -> None:
    metadata = {"Date": None, "Creator": None}
    picture.savefig(HERE / f"{name}.svg", metadata=metadata)
    text = (HERE / f"{name}.svg").read_text(encoding="utf-8")
    lines = (line.rstrip() for line in text.splitlines())
    (HERE / f"{name}.svg").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(HERE / f"{name}.svg")
