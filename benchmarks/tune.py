"""Time the scan's four parts over tile sizes on this machine's GPU: the table behind choose_tiles.

    PYTHONPATH=src python benchmarks/tune.py --gates HEAD KEY --chunks 64 128 --out tune.json

Prints, for every gate and part, the tile sizes from fastest to slowest. Compiling is the long part
and is shared among worker processes first.
"""

import argparse
import itertools
import json
import multiprocessing
import os

import torch

from subquad.backend.gpu.launch import launch
from subquad.engines.matrix.gpu import layout, passes

PARTS = {"o": (False, False), "dv": (False, True), "dq": (True, False), "dk": (True, True)}


def prepare(gate: str, shape: tuple[int, ...], chunk: int):
    """The tensors and the layout of one call, as matrix.scan_forward would make them."""
    B, T, H, Hk, K, V = shape
    torch.manual_seed(0)
    options = {"device": "cuda", "dtype": torch.bfloat16}
    q, k = torch.randn(2, B, T, Hk, K, **options).unbind(0)
    v, do = torch.randn(2, B, T, H, V, **options).unbind(0)
    gates = {
        "NONE": lambda: None,
        "HEAD_FIXED": lambda: -torch.rand(H, device="cuda") / 32,
        "HEAD": lambda: -torch.rand(B, T, H, device="cuda") / 8,
        "KEY": lambda: (-torch.rand(B, T, H, K, device="cuda") / 8).bfloat16(),
    }
    prepared = passes.prepare_gate(gates[gate](), v)
    queue: list = []
    cut = layout.lay_out(B, T, -(-T // layout.PIECE) * layout.PIECE, None, chunk, queue)
    prepared = passes.sum_gate(prepared, k, v, None, chunk, queue)
    launch(queue)
    return q, k, v, do, prepared, cut


def launcher(gate: str, part: str, shape: tuple[int, ...], tiles: layout.Tiles):
    B, T, H, _, K, _ = shape
    q, k, v, do, prepared, cut = prepare(gate, shape, tiles.chunk)
    out, reverse = PARTS[part]
    r, w, x = {"o": (q, k, v), "dv": (k, q, do), "dq": (do, v, k), "dk": (v, do, q)}[part]
    y = torch.full((B, T, H, x.shape[-1]), torch.nan, device="cuda", dtype=torch.bfloat16)
    parts = passes.sliced(y, tiles)
    extra = {}
    if out and gate != "NONE":
        extra["partner"] = k if reverse else q
        shares = layout.programs(K, tiles)
        rest = (tiles.slices * K,) if gate == "KEY" else (shares,)
        extra["reads"] = torch.zeros(B, T, H, *rest, device="cuda")
        if reverse and gate == "KEY":
            dgate = torch.zeros(B, T, H, K, device="cuda", dtype=torch.bfloat16)
            extra["dgate"] = passes.sliced(dgate, tiles)
        elif reverse:
            extra["totals"] = torch.zeros(cut.segments, H, shares, device="cuda")
    launches = passes.scan_launches(
        r, w, x, parts, prepared, cut, tiles, H, out=out, reverse=reverse, scale=0.1, **extra
    )
    passes.add_slices(parts, y, launches)
    if "dgate" in extra:
        passes.add_slices(extra["dgate"], dgate, launches)
    return lambda: launch(launches)


def compile_all(jobs: list, shape: tuple[int, ...], worker: int, workers: int) -> None:
    small = (1, 64, *shape[2:])
    for gate, part, tiles in jobs[worker::workers]:
        try:
            launcher(gate, part, small, tiles)()
        except Exception as error:
            print(gate, part, tuple(tiles), type(error).__name__, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gates", nargs="+", default=["NONE", "HEAD_FIXED", "HEAD", "KEY"])
    parser.add_argument("--parts", nargs="+", default=list(PARTS))
    parser.add_argument("--shape", nargs=6, type=int, default=(8, 4096, 16, 16, 128, 128),
                        metavar=("B", "T", "H", "HK", "K", "V"))  # fmt: skip
    parser.add_argument("--chunks", nargs="+", type=int, default=[32])
    parser.add_argument("--columns", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--warps", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--stages", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--slices", nargs="+", type=int, default=[1])
    parser.add_argument("--workers", type=int, default=min(15, os.cpu_count() or 1))
    parser.add_argument("--out", default="tune.json")
    args = parser.parse_args()

    grid = itertools.product(args.chunks, args.columns, args.warps, args.stages, args.slices)
    tiles = [layout.Tiles(*sizes) for sizes in grid]
    jobs = list(itertools.product(args.gates, args.parts, tiles))
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=compile_all, args=(jobs, tuple(args.shape), i, args.workers))
        for i in range(args.workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()

    from triton.testing import do_bench

    rows = []
    for gate, part, sizes in jobs:
        try:
            run = launcher(gate, part, tuple(args.shape), sizes)
            milliseconds = do_bench(run, warmup=5, rep=20, return_mode="median")
        except Exception as error:
            rows.append({"gate": gate, "part": part, "tiles": sizes, "error": str(error)[:80]})
            continue
        rows.append({"gate": gate, "part": part, "tiles": sizes, "ms": round(milliseconds, 4)})
    with open(args.out, "w") as file:
        json.dump({"device": torch.cuda.get_device_name(), "shape": args.shape, "rows": rows}, file)
    for gate, part in itertools.product(args.gates, args.parts):
        timed = [r for r in rows if (r["gate"], r["part"]) == (gate, part) and "ms" in r]
        timed.sort(key=lambda row: row["ms"])
        print(gate, part, "  ".join(f"{tuple(r['tiles'])} {r['ms']:.3f}" for r in timed[:6]))


if __name__ == "__main__":
    main()
