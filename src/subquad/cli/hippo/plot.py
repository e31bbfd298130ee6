"""The drawing of `subquad hippo`: what was, what is remembered of it, and the memory itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from subquad.cli.hippo.story import Story

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, GRID, COLOURS = "#30343b", "#d8dbe0", ("#b9a27c", "#4f9d8f", "#c2553a", "#2b5fa8")


def draw(story: Story, out: Path) -> None:
    """Write a PNG of three panels: the signal and each recall, the last errors, the state."""
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        "font.size": 10,
        "axes.edgecolor": GRID,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(10, 8.5), layout="constrained")
        panels = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1.4, 2))
        _signal(panels[0], story)
        _errors(panels[1], story)
        _state(panels[2], story)
        memory = story.memory
        reach = "" if memory.window is None else f", window {memory.window:g}"
        title = f"{memory.N} numbers, {memory.measure}{reach}, {story.method}"
        panels[0].set_title(title, loc="left", color=INK, fontsize=11)
        figure.savefig(out, dpi=120)


def _signal(axes: Axes, story: Story) -> None:
    f = story.f.numpy()
    axes.plot(f, color=GRID, linewidth=4, label="was", solid_capstyle="round")
    for recall, colour in zip(story.recalls, COLOURS[-len(story.recalls) :]):
        label = f"as remembered after {recall.t:,}"
        axes.plot(recall.samples, recall.remembered, color=colour, linewidth=1.2, label=label)
    margin = 0.35 * (f.max() - f.min()) or 1.0
    axes.set_ylim(f.min() - margin, f.max() + margin)  # a poor recall may leave the picture
    axes.set_ylabel("signal")
    axes.legend(frameon=False, fontsize=9, ncols=3, loc="upper left")


def _errors(axes: Axes, story: Story) -> None:
    for recall, colour in zip(story.recalls, COLOURS[-len(story.recalls) :]):
        error = (recall.remembered - recall.truth).abs().clamp(min=1e-16)
        axes.plot(recall.samples, error, color=colour, linewidth=0.8)
    axes.set_yscale("log")
    axes.set_ylabel("error")
    axes.grid(axis="y", color=GRID, linewidth=0.6)


def _state(axes: Axes, story: Story) -> None:
    """Coefficients over time, on a scale that shows small ones, too."""
    from matplotlib.colors import SymLogNorm

    c = story.coefficients.numpy()
    largest = abs(c).max() or 1.0
    norm = SymLogNorm(linthresh=largest / 100, vmin=-largest, vmax=largest)
    degrees = range(story.memory.N)
    mesh = axes.pcolormesh(
        story.times.numpy(), degrees, c.T, cmap="RdBu_r", norm=norm, shading="nearest"
    )
    axes.set_xlabel("samples")
    axes.set_ylabel("coefficient")
    ticks = [-largest, -largest / 10, 0, largest / 10, largest]
    axes.figure.colorbar(mesh, ax=axes, pad=0.01, aspect=12, ticks=ticks, format="{x:.2g}")
