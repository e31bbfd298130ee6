"""Losses and gates on this machine's GPU: our kernels beside PyTorch and flash-linear-attention.

    PYTHONPATH=src python benchmarks/elementwise.py --out elementwise.json [--tune]

The shapes are those of a training step of the 350M models (models.py): 8 x 4096 tokens of 32,000
kinds (and of 50,257, whose rows of logits are not aligned), an MLP of 2816 channels, 512 gates.
Median milliseconds of eager calls and of a captured graph's replays, beside the memory floor (each
tensor read once and written once each way, at this machine's copy rate), and the memory that the
forward and backward pass take at their peak. `--tune` times our kernels over tile sizes instead.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu import copy_rate, describe_run, replayed, shorten_autotuning
from layers import BF16, timed, trained
from torch import Tensor

from subquad.engines.cross_entropy import gpu as loss
from subquad.engines.cross_entropy.api import cross_entropy
from subquad.engines.gates import gpu as activation
from subquad.engines.gates.api import log_sigmoid, silu_product

TOKENS, CHANNELS, GATES = 8 * 4096, 2816, 512
# What is timed, its leaves, bytes moved forward and backward, and who computes it how.
Work = tuple[str, list[Tensor], tuple[int, int], dict[str, Callable[..., Tensor]]]


def works(peers: bool) -> Iterator[Work]:
    for V in (32_000, 50_257):
        yield losses(V, peers)
    gate, up = (torch.randn(TOKENS, CHANNELS, **BF16).requires_grad_() for _ in range(2))
    calls: dict[str, Callable[..., Tensor]] = {
        "ours": silu_product,
        "torch": lambda gate, up: F.silu(gate) * up,
    }
    if peers:
        from fla.modules.activations import swiglu

        calls["fla"] = swiglu
    size = gate.nbytes
    yield f"silu(gate) * up, {TOKENS} x {CHANNELS}", [gate, up], (3 * size, 5 * size), calls
    x = torch.randn(TOKENS, GATES, **BF16).requires_grad_()
    calls = {
        "ours": lambda x: log_sigmoid(x, 16.0),
        "torch": lambda x: F.logsigmoid(x.float()) / 16.0,
    }
    if peers:  # whose result has x's dtype
        from fla.modules.activations import logsigmoid

        calls["fla"] = lambda x: logsigmoid(x, 16.0)
    size = x.nbytes
    yield f"log decay of a gate, {TOKENS} x {GATES}", [x], (3 * size, 4 * size), calls


def losses(V: int, peers: bool) -> Work:
    logits = torch.randn(TOKENS, V, **BF16).requires_grad_()
    labels = torch.randint(V, (TOKENS,), device="cuda")
    calls: dict[str, Callable[..., Tensor]] = {
        "ours": lambda x: cross_entropy(x, labels).mean(),
        "torch": lambda x: F.cross_entropy(x.float(), labels),
    }
    if peers:
        from fla.modules.fused_cross_entropy import cross_entropy_loss

        calls["fla"] = lambda x: cross_entropy_loss(x, labels)[0].mean()
    size = logits.nbytes
    return f"cross-entropy, {TOKENS} x {V}", [logits], (size, 2 * size), calls


def measured(rate: float, peers: bool) -> list[dict[str, Any]]:
    rows = []
    for work, leaves, moved, calls in works(peers):
        for grads in (False, True):
            floor = (moved[0] + grads * moved[1]) / rate * 1e3
            kind = "forward and backward" if grads else "forward"
            run = {who: trained(call, leaves, grads) for who, call in calls.items()}
            rows.append(timed({"work": work, "kind": kind, "floor_ms": floor}, run))
            for who, call in run.items():
                rows[-1][who]["peak_MiB"] = peak(call)
    return rows


def peak(call: Callable[[], object]) -> float:
    """MiB beyond what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        call()
    except Exception:  # which is already in the row
        return float("nan")
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def tune() -> list[dict[str, Any]]:
    """Milliseconds of each kernel by tile. Not of whole calls: a replayed one keeps its tile."""
    found = []

    def note(module: Any, calls: dict[Any, tuple], width: int, **tile: int) -> None:
        for name, size in tile.items():
            setattr(module, name, size)
        for operator, given in calls.items():
            launch = inspect.unwrap(operator._launch)
            launch(*given)
            ms = replayed(lambda launch=launch, given=given: launch(*given))
            found.append({"kernel": launch.__name__, "width": width, **tile, "ms": ms})
            print(found[-1], flush=True)

    for V in (32_000, 50_257):
        logits = torch.randn(TOKENS, V, **BF16)
        labels = torch.randint(V, (TOKENS,), device="cuda")
        dlosses, (_, sums) = torch.randn(TOKENS, device="cuda"), loss.cross_entropy(logits, labels)
        calls = {
            loss.cross_entropy: (logits, labels),
            loss.cross_entropy_backward: (dlosses, logits, labels, sums),
        }
        for tile, warps in itertools.product((2048, 4096, 8192, 16384), (4, 8)):
            note(loss, calls, V, TILE=tile, WARPS=warps)
        del logits, calls
    dy, gate, up = (torch.randn(TOKENS, CHANNELS, **BF16) for _ in range(3))
    x, dx = torch.randn(TOKENS, GATES, **BF16), torch.randn(TOKENS, GATES, device="cuda")
    calls = {
        activation.silu_product: (gate, up),
        activation.silu_product_backward: (dy, gate, up),
        activation.log_sigmoid: (x, 0.0625),
        activation.log_sigmoid_backward: (dx, x, 0.0625),
    }
    for tile, channels in itertools.product((1024, 2048, 4096, 8192), (128, 256, 512)):
        note(activation, calls, CHANNELS, TILE=tile, CHANNELS=channels)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("elementwise.json"))
    args = parser.parse_args()
    shorten_autotuning()
    rate = copy_rate()
    report = describe_run([]) | {"copy_TB_per_s": rate / 1e12}
    report["rows"] = tune() if args.tune else measured(rate, not args.no_peers)
    args.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
