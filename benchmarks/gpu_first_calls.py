"""Seconds of the first forward and backward pass in new processes that find nothing compiled.

    PYTHONPATH=src python benchmarks/gpu_first_calls.py --times 3 --out first.json

Each process has an empty Triton cache; its inputs are made before the clock starts, so CUDA has
started and Triton has not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from gpu import GATES, SHAPES, describe_run, inputs, ours


def first_call(gate: str) -> float:
    """Seconds of this process's first forward and backward pass, as a training step runs them."""
    tensors, log_decay = inputs(SHAPES["B8 T4096 H16 K128 V128"], gate)
    torch.cuda.synchronize()
    began = time.perf_counter()
    ours(*tensors, log_decay).float().sum().backward()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def in_new_process(gate: str) -> float:
    with tempfile.TemporaryDirectory() as cache:
        child = [sys.executable, __file__, "--this-process", gate]
        fresh = {**os.environ, "TRITON_CACHE_DIR": cache}
        return float(subprocess.check_output(child, env=fresh).split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gates", nargs="+", default=GATES, choices=GATES)
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--this-process", choices=GATES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("first.json"))
    args = parser.parse_args()
    if args.this_process:
        print(first_call(args.this_process))
        return
    report = describe_run([]) | {"rows": []}
    for gate in args.gates:
        seconds = [in_new_process(gate) for _ in range(args.times)]
        print(gate, seconds, flush=True)
        report["rows"].append({"gate": gate, "first_call_s": seconds})
        args.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
