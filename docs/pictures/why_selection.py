"""The pictures of docs/why-selection.md: computed here, as the page computes.

python docs/pictures/why_selection.py
"""

import numpy as np
import torch
from matplotlib.axes import Axes
from style import BLUE, GREEN, GREY, INK, MUTED, ORANGE, RED, RULE, figure, label, save

from subquad import tasks

NOISE, MARK = 0, 5
SYMBOLS = {1: BLUE, 2: ORANGE, 3: GREEN, 4: RED}


def settings(noise: int = 16) -> dict:
    return {"vocabulary": 6, "memory": 3, "noise": noise}


def example() -> tuple[np.ndarray, np.ndarray]:
    batch = tasks.get("selective_copying", **settings()).sample(1, seed=0, step=2)
    return batch.inputs[0].numpy(), batch.labels[0].numpy()


def bare(axes: Axes) -> None:
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xticks(())
    axes.set_yticks(())


def cells(axes: Axes, tokens: np.ndarray, y: float) -> None:
    """Tokens in a line: noise as dots, symbols in their colour, markers as question marks."""
    for t, token in enumerate(tokens):
        if token == NOISE:
            axes.plot(t, y, ".", color=GREY, markersize=4)
            continue
        colour = SYMBOLS.get(int(token), INK)
        text = "?" if token == MARK else "ABCD"[token - 1]
        face = "white" if token == MARK else colour
        box = {"boxstyle": "round,pad=0.3", "facecolor": face, "edgecolor": colour}
        ink = colour if token == MARK else "white"
        axes.text(t, y, text, color=ink, ha="center", va="center", fontsize=9, bbox=box)


def task() -> None:
    tokens, labels = example()
    picture = figure(7.2, 1.3)
    axes = picture.add_subplot()
    cells(axes, tokens, 1.0)
    cells(axes, np.where(labels < 0, NOISE, labels), 0.0)
    label(axes, -1.2, 1.0, "in", MUTED, ha="right")
    label(axes, -1.2, 0.0, "due", MUTED, ha="right")
    axes.set_xlim(-2.5, len(tokens))
    axes.set_ylim(-0.6, 1.6)
    bare(axes)
    save(picture, "selection-task")


def state() -> None:
    """How much of the last state each token is: |what it wrote|, decayed to the end."""
    tokens, _ = example()
    tokens = tokens[tokens != MARK]
    colours = [SYMBOLS.get(int(token), GREY) for token in tokens]
    decay = 0.93 ** np.arange(len(tokens))[::-1]
    selected = (tokens != NOISE).astype(float)
    picture = figure(7.2, 2.2)
    for i, (weights, title) in enumerate(
        (
            (decay, "filter: by distance, whatever the token"),
            (selected, "selective: no time for noise"),
        )
    ):
        axes = picture.add_subplot(1, 2, i + 1)
        axes.bar(range(len(tokens)), weights, color=colours, width=0.75)
        share = weights[tokens == NOISE].sum() / weights.sum()
        axes.set_title(f"{title}\nnoise: {share:.0%} of what is held", fontsize=9, color=INK)
        axes.set_ylim(0, 1.15)
        axes.set_yticks(())
        axes.set_xticks((0, len(tokens) - 1), ("first token", "last"))
        axes.spines["left"].set_visible(False)
    save(picture, "selection-state")


def places() -> None:
    """Three numbers of state over time: the solution by hand, and a filter's."""
    tokens, _ = example()
    symbol = (tokens != NOISE) & (tokens != MARK)
    value = np.where(symbol, tokens, 0).astype(float)
    number = symbol.cumsum() - 1
    by_hand, filtered = np.zeros((2, len(tokens), 3))
    rates = np.array([0.95, 0.85, 0.6])
    for t in range(len(tokens)):
        before = by_hand[t - 1] if t else np.zeros(3)
        by_hand[t] = before + value[t] * symbol[t] * (np.arange(3) == number[t])
        filtered[t] = rates * (filtered[t - 1] if t else np.zeros(3)) + value[t]
    picture = figure(7.2, 2.6)
    for i, (found, title) in enumerate(
        ((by_hand, "selective, weights chosen by hand"), (filtered, "a filter with three decays"))
    ):
        axes = picture.add_subplot(2, 1, i + 1)
        axes.imshow(found.T, aspect="auto", cmap="Blues", vmin=0, vmax=max(4, found.max()))
        axes.set_title(title, fontsize=9, color=INK)
        axes.set_yticks(range(3), [f"place {n + 1}" for n in range(3)], fontsize=8)
        names = ["" if t == NOISE else "?" if t == MARK else "ABCD"[t - 1] for t in tokens]
        axes.set_xticks(range(len(tokens)), names, fontsize=8)
        for spine in axes.spines.values():
            spine.set_visible(False)
    save(picture, "selection-places")


def scan() -> None:
    picture = figure(7.2, 2.5)
    axes = picture.add_subplot()
    T, rounds = 8, 3
    for r in range(rounds + 1):
        y = rounds - r
        for t in range(T):
            first = max(0, t - 2**r + 1)
            done = first == 0
            axes.plot(t, y, "o", color=GREEN if done else BLUE, markersize=7, zorder=3)
            text = f"{first}…{t}" if first < t else f"{t}"
            label(axes, t + 0.1, y + 0.22, text, MUTED, fontsize=7.5, ha="left")
            if r < rounds:
                axes.plot((t, t), (y, y - 1), color=RULE, linewidth=1.2, zorder=1)
                if t + 2**r < T:
                    axes.plot((t, t + 2**r), (y, y - 1), color=GREY, linewidth=0.9, zorder=2)
        name = "tokens" if r == 0 else f"round {r}"
        label(axes, -0.6, y, name, MUTED, ha="right")
    axes.set_xlim(-1.9, T - 0.3)
    axes.set_ylim(-0.4, rounds + 0.5)
    bare(axes)
    save(picture, "selection-scan")


def memory() -> None:
    T, D, N = 2048, 1536, 16
    bars = (
        ("every state", T * D * N * 4, RED),
        ("inputs x and Δ", 2 * T * D * 4, GREY),
        ("a state a chunk of 32", T // 32 * D * N * 4, GREEN),
    )
    picture = figure(7.2, 1.5)
    axes = picture.add_subplot()
    for i, (name, size, colour) in enumerate(bars):
        axes.barh(-i, size / 2**20, color=colour, height=0.6)
        label(axes, size / 2**20 + 2, -i, f"{size / 2**20:.0f} MiB", colour)
        label(axes, -3, -i, name, INK, ha="right")
    axes.set_xlim(-62, 215)
    bare(axes)
    save(picture, "selection-memory")


def learnt() -> None:
    """As the page trains them, with more tests."""
    noises = (16, 24, 32, 48, 64, 96, 128)
    picture = figure(7.2, 2.4)
    axes = picture.add_subplot()
    for row, colour in (("mamba", GREEN), ("s4d", RED)):
        found = train(row, noises)
        axes.plot(noises, found, "o-", color=colour, markersize=4, linewidth=1.8)
        label(axes, noises[-1] * 1.04, found[-1], row, colour)
        print(row, dict(zip(noises, found)))
    axes.axhline(0.25, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)))
    label(axes, 15.4, 0.19, "guessing", GREY, fontsize=9)
    axes.axvline(16, color=RULE, linewidth=0.9, zorder=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(noises, [str(noise) for noise in noises])
    axes.minorticks_off()
    axes.set_xlim(15, 175)
    axes.set_ylim(0, 1.05)
    axes.set_yticks((0, 0.5, 1))
    axes.set_xlabel("tokens of noise in a test; trained with 16", loc="left")
    axes.set_title("symbols right, one layer of width 32", color=INK)
    save(picture, "selection-learnt")


def train(row: str, noises: tuple[int, ...]) -> list[float]:
    task = tasks.get("selective_copying", **settings(), test_noises=list(noises[1:]))
    torch.manual_seed(0)
    model = tasks.TaskModel(task, mixer=row, hidden_size=32, num_hidden_layers=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=400)
    for step in range(400):
        batch = task.sample(32, seed=0, step=step)
        loss = model.loss(batch.inputs, *batch.answers())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return [tasks.score(model, t, t.test_batches(256)).accuracy for t in task.tests().values()]


if __name__ == "__main__":
    for draw in (task, state, places, scan, memory, learnt):
        draw()
