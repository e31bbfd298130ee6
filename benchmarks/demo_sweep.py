"""The learning rates of the demo: every row of it at each of these, the baseline like the others.

    python benchmarks/demo_sweep.py            # runs/demo-sweep, then docs/results/demo-sweep.json
    python benchmarks/demo_sweep.py --read A B # the same from arenas that have run (--lr, --out A)

A row's rate is that at which the last tenth of its training ends best; held-out text has no say.
The steps are fewer than the demo's, which on an idle machine takes about 450.
`subquad.arena.text.rates` holds what was chosen, and a test compares the two.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from subquad.arena import ArenaConfig, ArenaResults, run_arena
from subquad.files import write_json

RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
STEPS = 250
RECORD = Path(__file__).parents[1] / "docs" / "results" / "demo-sweep.json"


def summary(arenas: list[ArenaResults]) -> dict[str, Any]:
    """Bits per byte over the last tenth of training, by row and rate, and each row's best rate."""
    first = arenas[0]
    for other in arenas[1:]:
        assert other.plan.steps == first.plan.steps and other.plan.shapes == first.plan.shapes
    found: dict[str, dict[float, float | None]] = {row: {} for row in first.config.rows}
    for arena in arenas:
        for result in arena.rows:
            found[result.name] |= {tried.lr: tried.bits_per_byte for tried in result.attempts}
    rows = {}
    for name, ends in found.items():
        ended = {rate: bits for rate, bits in ends.items() if bits is not None}
        best = min(ended, key=ended.__getitem__)
        rows[name] = {"best": best, "bits_per_byte": {str(r): ends[r] for r in sorted(ends)}}
    config = first.config
    return {
        "rule": "bits per byte of the training batches over the last tenth of the steps",
        "steps": first.plan.steps,
        "parameters": config.parameters,
        "batch_size": config.batch_size,
        "seq_len": config.seq_len,
        "data": config.data,
        "seed": config.seed,
        "environment": first.plan.environment,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--read", nargs="+", type=Path, help="arenas that have run")
    folders = parser.parse_args().read
    if folders:
        records = [json.loads((folder / "results.json").read_text("utf-8")) for folder in folders]
        arenas = [ArenaResults.from_json(record) for record in records]
    else:
        arenas = [run_arena(ArenaConfig(lr=RATES, steps=STEPS), Path("runs/demo-sweep"), print)]
    write_json(RECORD, summary(arenas))


if __name__ == "__main__":
    main()
