"""The body of `subquad hippo`: what a memory of N numbers still knows of a signal."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from subquad.cli.hippo.story import Recall, Story
from subquad.cli.terminal import say, screen, show_path
from subquad.errors import fail
from subquad.ssm import signals
from subquad.ssm.hippo import HiPPO

BLOCKS = "▁▂▃▄▅▆▇█"


def hippo_command(
    signal: str,
    *,
    measure: str,
    size: int,
    method: str,
    window: float | None,
    length: int,
    column: str | None,
    out: Path,
) -> None:
    """Remember, show, draw."""
    if signal in signals.MADE:
        f = signals.make(signal, length)
    else:
        if Path(signal).exists() and not Path(signal).is_file():  # a pipe or a device has no end
            raise fail("signal", repr(signal), "a file of numbers", "save them to a file")
        f = signals.read(Path(signal), column)
    if out.suffix.lower() != ".png":
        raise fail("out", repr(str(out)), "a file ending in .png", "--out hippo.png")
    if size < 1:
        raise fail("size", size, "at least 1", "--size 64")
    if measure != "legs" and window is None:
        window = max(1, len(f) // 4)
    story = read(HiPPO(measure, size, window), f, method)
    console = screen()
    show(story, signal, console)

    from subquad.cli.hippo.plot import draw

    out.parent.mkdir(parents=True, exist_ok=True)
    draw(story, out)
    show_path(console, "Drawing", out)


def read(memory: HiPPO, f: Tensor, method: str) -> Story:
    """Read f once, and look back after each quarter of it."""
    T = len(f)
    quarters = sorted({max(1, T * k // 4) for k in (1, 2, 3, 4)})
    times = sorted({*torch.linspace(1, T, min(T, 400)).round().long().tolist(), *quarters})
    c = memory.project(f, method, at=times)
    recalls = []
    for t in quarters:
        samples = memory.samples(t)
        remembered = memory.reconstruct(c[times.index(t)], t, samples)
        recalls.append(Recall(t, samples, f[samples], remembered))
    return Story(memory, method, f, recalls, torch.tensor(times), c)


def show(story: Story, name: str, console: Console) -> None:
    """The summary on the screen."""
    memory, last = story.memory, story.recalls[-1]
    reach = "all of the past" if memory.window is None else f"window {memory.window:g}"
    if memory.measure == "decay":
        reach = f"time constant {memory.window:g}"
    say(
        console,
        f"{name}: {len(story.f):,} samples, read one by one into {memory.N} numbers "
        f"({memory.measure}, {reach}, {story.method})\n",
    )
    width = max(20, min(72, console.width - 14))
    low, high = last.truth.min().item(), last.truth.max().item()
    for label, line in (("was", last.truth), ("remembered", last.remembered)):
        console.print(f"{label:>11} {sparkline(line, width, low, high)}")
    console.print()
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("after", "covers", "error", "oldest fifth", "newest fifth"):
        table.add_column(heading, justify="right")
    for recall in story.recalls:
        errors = (recall.error(), recall.error(0, 0.2), recall.error(0.8, 1))
        table.add_row(
            f"{recall.t:,}", f"{len(recall.samples):,}", *(f"{100 * e:.3g} %" for e in errors)
        )
    console.print(table)
    say(console, "\nerror: root mean square, of the signal's standard deviation", style="dim")


def sparkline(values: Tensor, width: int, low: float, high: float) -> str:
    """Means of `width` equal parts, as blocks between low and high."""
    parts = [part.mean().item() for part in values.tensor_split(min(width, len(values)))]
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    ranks = [round((min(max(part, low), high) - low) * scale) for part in parts]
    return "".join(BLOCKS[rank] for rank in ranks)
