"""Ours against flash-linear-attention and mamba_ssm on this machine's GPU, side by side in one run.

    PYTHONPATH=src python benchmarks/gpu.py --out gpu.json
    PYTHONPATH=src python benchmarks/gpu.py --crossing --out crossing.json
    PYTHONPATH=src python benchmarks/gpu.py --packed --gates head --out packed.json

`--packed` times 32,768 tokens in 1, 16, 128 and 1024 sequences of drawn lengths packed into one
row, beside as many sequences of equal length in a batch. `--crossing` times ours against causal
softmax attention (torch's SDPA) instead, 32,768 tokens in sequences of 1k to 128k, to find the
length from which a linear row is the faster.

Milliseconds of forward and of forward + backward, medians: of eager calls, and of a captured
graph's replays, which hold no launch from Python. Beside them the memory floor (each input read
once and each output written once, at this machine's measured copy rate), peak memory and the first
call's seconds. Peers tune themselves, their timings cut to 5 + 15 ms a configuration, each shape in
a process of its own, as fla would run a long sequence with what it tuned on a short one. As each
operation's tuning takes a minute or two, `--side-by-side` first has a process for each compile what
it tries: the tuning that counts then runs alone and finds its kernels compiled. fla takes no shared
keys: `fla_expanded` is fla with keys that were repeated for each head before the clock starts. On
Triton 3.4 to 3.7.0 fla refuses the backward pass of gated chunks on Hopper, as a compiler fault
makes its gradients wrong; `--lift-refusal` times it all the same.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_peers import PEERS, lift_refusal, peers_of, shape_for, shorten_autotuning, version_of
from torch import Tensor

from subquad.engines.matrix.gpu import scan as matrix

SHAPES = {  # B, T, H, Hk, K, V
    "B8 T4096 H16 K128 V128": (8, 4096, 16, 16, 128, 128),
    "B1 T65536 H16 K128 V128": (1, 65536, 16, 16, 128, 128),
    "B8 T4096 H32 G1 K128 V64 (Mamba-2)": (8, 4096, 32, 1, 128, 64),
    "B8 T4096 H16 K64 V64": (8, 4096, 16, 16, 64, 64),
    "B8 T4096 H16 K256 V256": (8, 4096, 16, 16, 256, 256),
    "B8 T4096 H4 K128 V256 (a GLA of 340M)": (8, 4096, 4, 4, 128, 256),
}
PACKED = [1, 16, 128, 1024]  # sequences
PACKED_SHAPE = (1, 32768, 16, 16, 128, 128)
CROSSING = [2**power for power in range(10, 18)]  # tokens of a sequence
GATES = ("none", "fixed", "head", "key")


def inputs(shape: tuple[int, ...], gate: str) -> tuple[list[Tensor], Tensor | None]:
    B, T, H, Hk, K, V = shape
    torch.manual_seed(0)
    options = {"device": "cuda", "dtype": torch.bfloat16}
    q, k = (torch.randn(B, T, Hk, K, **options).requires_grad_() for _ in range(2))
    v = torch.randn(B, T, H, V, **options).requires_grad_()
    log_decay = None
    if gate == "fixed":  # as RetNet's
        heads = torch.arange(H, device="cuda", dtype=torch.float32)
        log_decay = torch.log1p(-torch.exp2(-5 - heads))
    elif gate == "head":
        log_decay = torch.nn.functional.logsigmoid(torch.randn(B, T, H, device="cuda") + 2)
        log_decay.requires_grad_()
    elif gate == "key":
        drawn = torch.nn.functional.logsigmoid(torch.randn(B, T, H, K, device="cuda")) / 16
        log_decay = drawn.bfloat16().requires_grad_()
    return [q, k, v], log_decay


def ours(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    scale = q.shape[-1] ** -0.5
    return matrix.linear_recurrence(q, k, v, log_decay, scale=scale, cu_seqlens=cu_seqlens)[0]


def sdpa(q: Tensor, k: Tensor, v: Tensor, gate: None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def describe_run(peers: list[str]) -> dict[str, Any]:
    import triton

    return {
        "device": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "versions": {
            "torch": torch.__version__,
            "triton": triton.__version__,
            **{peer: version_of(peer) for peer in peers if peer != "fla_expanded"},
        },
    }


def copy_rate() -> float:
    """Bytes a second of a device-to-device copy, read and written ones counted."""
    from triton.testing import do_bench

    x = torch.empty(2**30, device="cuda", dtype=torch.int32)
    y = torch.empty_like(x)
    return (
        2 * x.nbytes / do_bench(lambda: y.copy_(x), warmup=10, rep=50, return_mode="median") * 1e3
    )


def measure(
    run: Callable[..., Tensor], tensors: list, gate: Tensor | None, capture: bool = True
) -> dict[str, float | None]:
    from triton.testing import do_bench

    do = torch.randn_like(tensors[2])

    def both() -> None:
        call_both(run, tensors, gate, do)

    torch.cuda.synchronize()
    began = time.perf_counter()
    both()
    torch.cuda.synchronize()
    first = time.perf_counter() - began
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    peak = torch.cuda.max_memory_allocated() - before
    timing = {"warmup": 20, "rep": 60, "return_mode": "median"}
    with torch.no_grad():
        forward = do_bench(lambda: run(*tensors, gate), **timing)
        forward_graph = replayed(lambda: run(*tensors, gate)) if capture else None
    return {
        "forward_ms": forward,
        "both_ms": do_bench(both, **timing),
        "forward_graph_ms": forward_graph,
        "both_graph_ms": replayed(both) if capture else None,
        "peak_MiB": peak / 2**20,
        "first_call_s": first,
    }


def call_both(run: Callable[..., Tensor], tensors: list, gate: Tensor | None, do: Tensor) -> None:
    leaves = [x for x in (*tensors, gate) if x is not None and x.requires_grad]
    torch.autograd.grad(run(*tensors, gate), leaves, do)


def replayed(call: Callable[[], object]) -> float | None:
    """Median of a graph's replays, None if the call cannot be captured."""
    from triton.testing import do_bench

    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError as error:
        print(f"cannot be captured: {error}", flush=True)
        return None
    return do_bench(graph.replay, warmup=20, rep=60, return_mode="median")


def floor_ms(tensors: list, gate: Tensor | None, rate: float) -> tuple[float, float]:
    read = sum(x.nbytes for x in (*tensors, gate) if x is not None)
    o = tensors[2].nbytes
    forward = read + o
    return forward / rate * 1e3, (forward + read + o + read) / rate * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gates", nargs="+", default=GATES, choices=GATES)
    parser.add_argument("--shapes", nargs="+", type=int, default=range(len(SHAPES)))
    parser.add_argument("--peers", nargs="*", default=["fla"], choices=PEERS)
    parser.add_argument("--crossing", action="store_true")
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--tokens", nargs="+", type=int, default=CROSSING)
    parser.add_argument("--lift-refusal", action="store_true")
    parser.add_argument("--side-by-side", action="store_true")
    parser.add_argument("--compile-only", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    args = parser.parse_args()
    shorten_autotuning()
    if args.lift_refusal:
        lift_refusal()

    if args.compile_only:
        compile_peers(args)
        return
    if args.side_by_side:
        compile_side_by_side(args)
    if len(args.shapes) > 1 and not args.crossing and not args.packed:
        a_process_each(args)
        return
    rate = copy_rate()
    report = describe_run(args.peers) | {"copy_TB_per_s": rate / 1e12, "rows": []}
    if args.crossing:
        measured_rows = crossing(args.tokens)
    else:
        measured_rows = packed(args) if args.packed else against_peers(args, rate)
    for row in measured_rows:
        report["rows"].append(row)
        args.out.write_text(json.dumps(report, indent=1))
        torch.cuda.empty_cache()


def rows(args: argparse.Namespace) -> Iterator[tuple[int, str, str]]:
    """(number of the shape, its name, gate) of all that was asked for."""
    for number in args.shapes:
        name = list(SHAPES)[number]
        for gate in args.gates:
            if "Mamba" not in name or gate == "head":
                yield number, name, gate


def against_peers(args: argparse.Namespace, rate: float) -> Iterator[dict]:
    for _, name, gate in rows(args):
        shape = SHAPES[name]
        given = inputs(shape, gate)
        row = {"shape": name, "gate": gate, "floor_ms": floor_ms(*given, rate)} | measured(
            "ours", lambda: ours, *given
        )
        print(name, gate, "ours", row["ours"], flush=True)
        for peer in peers_of(args.peers, gate, shape):
            fitted = shape_for(peer, shape)
            theirs = given if fitted == shape else inputs(fitted, gate)
            row |= measured(peer, partial(PEERS[peer], gate, fitted), *theirs)
            print(name, gate, peer, row[peer], flush=True)
        yield row


def a_process_each(args: argparse.Namespace) -> None:
    """Measure each shape in a process of its own, and put their reports together."""
    report: dict[str, Any] = {}
    for number in args.shapes:
        part = args.out.with_suffix(f".{number}.json")
        what = ["--shapes", str(number), "--gates", *args.gates, "--peers", *args.peers]
        lift = ["--lift-refusal"] * args.lift_refusal
        subprocess.run([sys.executable, __file__, *what, *lift, "--out", str(part)])
        if part.exists():
            found = json.loads(part.read_text())
            report = found | {"rows": report.get("rows", []) + found["rows"]}
            args.out.write_text(json.dumps(report, indent=1))
            part.unlink()


def compile_side_by_side(args: argparse.Namespace) -> None:
    """Fill Triton's cache with all that the peers' tuning tries, an operation a process."""
    if args.packed:
        chosen = [(["--packed"], gate, args.peers) for gate in args.gates]
    else:
        chosen = [
            (["--shapes", str(number)], gate, peers_of(args.peers, gate, SHAPES[name]))
            for number, name, gate in rows(args)
        ]
    rest = ["--compile-only", *["--lift-refusal"] * args.lift_refusal]
    began = time.perf_counter()
    children = []
    for work, gate, peers in chosen:
        for peer in peers:
            what = [*work, "--gates", gate, "--peers", peer, *rest]
            children.append(subprocess.Popen([sys.executable, __file__, *what]))
    for child in children:
        child.wait()  # one that failed is told of when it is measured
    print(f"compiled side by side in {time.perf_counter() - began:.0f} s", flush=True)


def compile_peers(args: argparse.Namespace) -> None:
    if args.packed:
        chosen = [(PACKED_SHAPE, gate, [drawn_ends(PACKED[1])]) for gate in args.gates]
    else:
        chosen = [(SHAPES[name], gate, []) for _, name, gate in rows(args)]
    for shape, gate, ends in chosen:
        for peer in args.peers:
            fitted = shape_for(peer, shape)
            tensors, log_decay = inputs(fitted, gate)
            do = torch.randn_like(tensors[2])
            call_both(PEERS[peer](gate, fitted, *ends), tensors, log_decay, do)


def crossing(lengths: list[int]) -> Iterator[dict]:
    for tokens in lengths:
        shape = (max(1, 32768 // tokens), tokens, 16, 16, 128, 128)
        row = {"tokens": tokens, "batch": shape[0]}
        for gate in ("none", "head", "key"):
            row |= measured(gate, lambda: ours, *inputs(shape, gate))
        row |= measured("sdpa", lambda: sdpa, *inputs(shape, "none"))
        print(
            {n: r if isinstance(r, int) else r.get("both_ms") for n, r in row.items()}, flush=True
        )
        yield row


def packed(args: argparse.Namespace) -> Iterator[dict]:
    for sequences in PACKED:
        ends = drawn_ends(sequences)
        equal = (sequences, PACKED_SHAPE[1] // sequences, *PACKED_SHAPE[2:])
        for gate in args.gates:
            given = inputs(PACKED_SHAPE, gate)
            row = {"sequences": sequences, "gate": gate}
            row |= measured("ours", partial(partial, ours, cu_seqlens=ends), *given)
            row |= measured("equal", lambda: ours, *inputs(equal, gate))
            for peer in args.peers:  # fla reads packed lengths on the host: nothing to capture
                find = partial(PEERS[peer], gate, PACKED_SHAPE, ends)
                row |= measured(peer, find, *given, capture=False)
            times = {n: r.get("both_ms") for n, r in row.items() if isinstance(r, dict)}
            print(sequences, gate, times, flush=True)
            yield row


def drawn_ends(sequences: int) -> Tensor:
    tokens = PACKED_SHAPE[1]
    draw = torch.Generator().manual_seed(sequences)
    cuts = torch.randperm(tokens - 1, generator=draw)[: sequences - 1].sort().values + 1
    return torch.tensor([0, *cuts.tolist(), tokens], dtype=torch.int32, device="cuda")


def measured(
    name: str, find: Callable[[], Callable], tensors: list, gate: Tensor | None,
    capture: bool = True,
) -> dict:  # fmt: skip
    """{name: figures} of what `find` returns."""
    try:
        return {name: measure(find(), tensors, gate, capture)}
    except Exception as error:  # a peer that cannot run is a result
        return {name: {"error": f"{type(error).__name__}: {error}"[:200]}}


if __name__ == "__main__":
    main()
