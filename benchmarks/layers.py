"""The GPU kernels beside the scan, against flash-linear-attention and PyTorch in one run.

    PYTHONPATH=src python benchmarks/layers.py --out layers.json [--tune]

One decoded token of the matrix recurrence, the short convolution, and gated norms: median
milliseconds of eager calls and of a captured graph's replays, and the memory floor at this
machine's copy rate. Then what an eager call costs the host (layers_host.py). `--tune` times the
kernels over tile sizes instead.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from gpu import copy_rate, describe_run, replayed, shorten_autotuning
from layers_host import eager_calls
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import subquad
from subquad.engines.convolution import gpu as short_convolution
from subquad.engines.convolution.api import _convolve
from subquad.engines.matrix.gpu import step as matrix_step
from subquad.engines.norm import gpu as norm
from subquad.engines.norm.api import _plain, rms_norm, skipped_gated_rms_norm
from subquad.engines.runtime.overwrite import overwriting_states

H, K, V = 16, 128, 128
BF16 = {"device": "cuda", "dtype": torch.bfloat16}


def once(call: Callable[[], object]) -> dict[str, float | None]:
    from triton.testing import do_bench

    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    first = time.perf_counter() - began
    timing = {"warmup": 10, "rep": 40, "return_mode": "median"}
    return {
        "eager_ms": do_bench(call, **timing),
        "graph_ms": replayed(call),
        "first_call_s": first,
    }


# ---- one decoded token


def token(B: int, kind: str) -> tuple[dict[str, Tensor], int]:
    """The engine's arguments, and the bytes that must move."""
    torch.manual_seed(0)
    given = {
        "q": torch.randn(B, 1, H, K, **BF16), "k": torch.randn(B, 1, H, K, **BF16),
        "v": torch.randn(B, 1, H, V, **BF16), "state": torch.randn(B, H, K, V, device="cuda"),
    }  # fmt: skip
    given["k"] = F.normalize(given["k"], dim=-1)
    if kind == "gla":
        given["log_decay"] = F.logsigmoid(torch.randn(B, 1, H, K, device="cuda")) / 16
    else:
        given["log_decay"] = F.logsigmoid(torch.randn(B, 1, H, device="cuda") + 2)
    if kind == "gated_delta":
        given["erase"] = subquad.Delta(torch.rand(B, 1, H, device="cuda"))
    moved = sum(x.nbytes for x in given.values() if isinstance(x, Tensor))
    return given, moved + given["state"].nbytes + given["v"].nbytes


def ours_in_place(given: dict) -> Callable[[], object]:
    given = {**given, "state": given["state"].clone()}

    def call():
        with overwriting_states():
            return subquad.linear_recurrence(**given)

    return call


def fla_step(kind: str, given: dict) -> Callable[[], object]:
    q, k, v, g, state = (given[n] for n in ("q", "k", "v", "log_decay", "state"))
    options = {"initial_state": state, "output_final_state": True}
    if kind == "simple_gla":
        from fla.ops.simple_gla import fused_recurrent_simple_gla

        return lambda: fused_recurrent_simple_gla(q, k, v, g, **options)
    if kind == "gla":
        from fla.ops.gla import fused_recurrent_gla

        return lambda: fused_recurrent_gla(q, k, v, g, **options)
    from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule

    beta = given["erase"].beta.to(v.dtype)
    return lambda: fused_recurrent_gated_delta_rule(q, k, v, g, beta=beta, **options)


def tokens(rate: float, peers: bool) -> list[dict]:
    rows = []
    for B, kind in itertools.product((1, 8, 128), ("simple_gla", "gla", "gated_delta")):
        given, moved = token(B, kind)
        row = {"work": f"token B{B} H16 K128 V128", "kind": kind, "floor_ms": moved / rate * 1e3}
        calls = {
            "ours": lambda given=given: subquad.linear_recurrence(**given),
            "ours in place": ours_in_place(given),
        }
        if peers:
            calls["fla"] = fla_step(kind, given)
        with torch.no_grad():
            rows.append(timed(row, calls))
    return rows


# ---- the short convolution and gated norms, forward and backward


def trained(call: Callable[..., Tensor], leaves: list[Tensor], grads: bool) -> Callable:
    dy = torch.randn_like(call(*leaves))
    if grads:
        return lambda: torch.autograd.grad(call(*leaves), leaves, dy)

    def forward():
        with torch.no_grad():
            return call(*leaves)

    return forward


def layers(rate: float, peers: bool) -> list[dict]:
    rows = []
    for work, leaves, calls in (convolution(peers), *gated_norms(peers)):
        big = sum(x.nbytes for x in leaves if x.ndim == 3)
        y = leaves[0].nbytes
        for grads in (False, True):
            moved = big + y + (y + 2 * big if grads else 0)
            kind = "forward and backward" if grads else "forward"
            row = {"work": work, "kind": kind, "floor_ms": moved / rate * 1e3}
            run = {who: trained(call, leaves, grads) for who, call in calls.items()}
            rows.append(timed(row, run))
    return rows


def convolution(peers: bool):
    B, T, D, W = 8, 4096, 2304, 4
    x = torch.randn(B, T, D, **BF16).requires_grad_()
    weight = (torch.randn(D, W, device="cuda") / 2).bfloat16().requires_grad_()
    bias = torch.randn(D, **BF16).requires_grad_()
    state = torch.zeros(B, W - 1, D, device="cuda")

    def plain(x, w, b):
        return _convolve(x.float(), w.float(), b.float(), state, None, True).to(x.dtype)

    calls = {
        "ours": lambda x, w, b: subquad.short_convolution(x, w, b, "silu")[0],
        "torch conv1d": lambda x, w, b: F.silu(
            F.conv1d(x.transpose(1, 2), w[:, None], b, padding=W - 1, groups=D)[..., :T]
        ).transpose(1, 2),
        "torch shifts": plain,
    }
    if peers:
        from fla.modules.convolution import causal_conv1d

        calls["fla"] = lambda x, w, b: causal_conv1d(x, w, b, activation="silu")[0]
    return f"convolution B{B} T{T} D{D} W{W}", [x, weight, bias], calls


def gated_norms(peers: bool):
    B, T, D = 8, 4096, 2048
    for first, size in ((False, 128), (True, D)):
        x, gate = (torch.randn(B, T, D, **BF16).requires_grad_() for _ in range(2))
        weight = torch.randn(size, **BF16).requires_grad_()

        def ours(x, gate, w, size=size, first=first):
            return subquad.engines.norm.api.gated_rms_norm(x, gate, size, w, 1e-5, gate_first=first)

        def plain(x, gate, w, size=size, first=first):
            if first:
                return _plain(x * F.silu(gate), size, w, 1e-5)
            return _plain(x, size, w, 1e-5) * F.silu(gate)

        calls = {"ours": ours, "torch": plain}
        if peers and not first:
            from fla.modules.fused_norm_gate import rms_norm_gated

            calls["fla"] = lambda x, gate, w, size=size: rms_norm_gated(
                x.unflatten(-1, (-1, size)), gate.unflatten(-1, (-1, size)), w, None
            ).flatten(-2)
        order = "gate first" if first else "norm first"
        yield f"gated norm, {order}, groups of {size}, B{B} T{T} D{D}", [x, gate, weight], calls
    yield skipped_norm(B, T, D)
    x = torch.randn(B, T, D, **BF16).requires_grad_()
    weight = torch.randn(D, **BF16).requires_grad_()
    yield (
        f"rms norm B{B} T{T} D{D}",
        [x, weight],
        {
            "ours": lambda x, w: rms_norm(x, D, w, 1e-5),
            "torch": lambda x, w: F.rms_norm(x, (D,), w, 1e-5),
        },
    )


def skipped_norm(B: int, T: int, D: int):
    y, x, gate = (torch.randn(B, T, D, **BF16).requires_grad_() for _ in range(3))
    weight, skip = torch.randn(D, **BF16), torch.randn(32, device="cuda")

    def ours(y, x, gate, w, skip):
        y, x = (t.unflatten(-1, (32, -1)) for t in (y, x))
        return skipped_gated_rms_norm(y, x, skip, gate, D, w, 1e-5)

    def plain(y, x, gate, w, skip):
        y = y + x * skip.to(x.dtype).repeat_interleave(D // 32)
        return _plain(y * F.silu(gate), D, w, 1e-5)

    leaves = [y, x, gate, weight.requires_grad_(), skip.requires_grad_()]
    return f"skip, gate, norm B{B} T{T} D{D}", leaves, {"ours": ours, "torch": plain}


def timed(row: dict, calls: dict[str, Callable]) -> dict:
    for who, call in calls.items():
        try:
            row[who] = once(call)
        except Exception as error:  # a peer that cannot run is a result
            row[who] = {"error": f"{type(error).__name__}: {error}"[:200]}
    shown = {
        who: found.get("error") or [found["eager_ms"], found["graph_ms"]]
        for who, found in row.items()
        if isinstance(found, dict)
    }
    print(row["work"], row["kind"], f"floor {row['floor_ms']:.4f}", shown, flush=True)
    return row


def kernel_ms(call: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of each kernel of a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(5):
            call()
        torch.cuda.synchronize()
    return {e.key[:30]: e.device_time_total / 5e3 for e in profile.key_averages()}


class Anew(TorchDispatchMode):
    """Under a mode no launching function is replayed: what was recorded keeps the tiles it had."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def tune(rate: float) -> list[dict]:
    """The kernels' constants, each with the time of the work that depends on it."""
    found = []

    def note(**facts):
        print(facts, flush=True)
        found.append(facts)

    for tile, warps in itertools.product((4096, 8192), (2, 4, 8)):
        matrix_step.TILE, matrix_step.WARPS = tile, warps
        times = {}
        for B, kind in itertools.product((1, 128), ("gla", "gated_delta")):
            call = ours_in_place(token(B, kind)[0])
            with torch.no_grad():
                call()
                times[f"B{B} {kind}"] = replayed(call)
        note(tile=tile, warps=warps, **times)
    _, leaves, calls = convolution(False)
    conv = short_convolution
    for channels, length, at_once in itertools.product((64, 128, 256), (32, 64, 128), (4, 8, 16)):
        conv.CHANNELS, conv.AT_ONCE = channels, at_once
        conv.LENGTH = conv.BACK_LENGTH = length
        run = [trained(calls["ours"], leaves, grads) for grads in (False, True)]
        [call() for call in run]
        split = kernel_ms(run[1])
        note(channels=channels, length=length, at_once=at_once, ms=[replayed(run[0]), split])
    works = [(leaves, calls["ours"]) for _, leaves, calls in gated_norms(False)]
    for tile, steps in itertools.product((1024, 2048, 4096), (8, 16)):
        norm.TILE, norm.STEPS = tile, steps
        norm._options.cache_clear()
        run = [trained(call, leaves, g) for leaves, call in works for g in (False, True)]
        [call() for call in run]
        note(tile=tile, steps=steps, ms=[replayed(call) for call in run])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("layers.json"))
    args = parser.parse_args()
    shorten_autotuning()
    rate, peers = copy_rate(), not args.no_peers
    report = describe_run([]) | {"copy_TB_per_s": rate / 1e12}
    if args.tune:
        with Anew():
            report["rows"] = tune(rate)
    else:
        report["rows"] = tokens(rate, peers) + layers(rate, peers)
        report["eager_calls"] = eager_calls(peers)
    args.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
