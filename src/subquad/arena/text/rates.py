"""Peak learning rates where none is asked for: each row's best of a sweep at the demo's size.

The sweep is benchmarks/demo_sweep.py, what it found docs/results/demo-sweep.json. The baseline was
swept like its rivals. A row that was not has the rate that suits most.
"""

BEST = {
    "softmax_attention": 1e-3,
    "mamba": 4e-3,
    "mamba2": 4e-3,
    "gla": 2e-3,
    "gated_deltanet": 2e-3,
}
OTHERS = 2e-3


def swept_rate(row: str) -> float:
    return BEST.get(row, OTHERS)
