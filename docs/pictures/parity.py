"""The README's picture, from the folder of the run that it shows.

subquad arena --task parity --set hidden_size=32 --set layers=1 --steps 400 --out runs/parity \
    --rows deltanet:allow_negative_eigenvalues,deltanet,mamba2,softmax_attention
python docs/pictures/parity.py runs/parity
"""

import json
import sys
from pathlib import Path

from style import BLUE, GREEN, GREY, ORANGE, RULE, figure, label, save, spread

COLOURS = (GREEN, BLUE, ORANGE, GREY)
NAMES = {"deltanet:allow_negative_eigenvalues": "deltanet, eigenvalues in [-1, 1]"}


def main() -> None:
    record = json.loads((Path(sys.argv[1]) / "results.json").read_text(encoding="utf-8"))
    picture = figure(7.2, 3.0)
    axes = picture.add_subplot()
    last = max(row["value_steps"][-1] for row in record["rows"])
    heights = spread([row["values"][-1] for row in record["rows"]], gap=0.09)
    for row, colour, height in zip(record["rows"], COLOURS, heights, strict=True):
        steps, values = row["value_steps"], row["values"]
        axes.plot(steps, values, color=colour, linewidth=1.8)
        axes.plot(steps[-1], values[-1], "o", color=colour, markersize=4)
        name = NAMES.get(row["label"], row["label"])
        final = row["tests"][0]["value"]  # of 256 sequences that no training step was chosen by
        label(axes, steps[-1] + last / 60, height, f"{name}  {final:.2f}", colour)
    axes.set_xlim(0, last * 1.36)
    axes.set_ylim(-0.05, 1.08)
    axes.set_xticks(range(0, last + 1, 100))
    axes.set_yticks((0, 0.5, 1), ("guessing  0", "0.5", "solved  1"))
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("training steps of 32 sequences", loc="left")
    axes.set_title("Parity of 3 to 40 bits, new sequences, one layer of width 32")
    save(picture, "parity")


if __name__ == "__main__":
    main()
