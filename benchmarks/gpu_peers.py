"""The peers of gpu.py: their calls for a kind of decay and a shape, and how they are run."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

# fla would keep what it tuned on disk, also what was tuned beside other work.
os.environ["FLA_CACHE_RESULTS"] = "0"


def fla(
    gate: str, shape: tuple[int, ...], cu_seqlens: Tensor | None = None
) -> Callable[..., Tensor]:
    from fla.ops.gla import chunk_gla
    from fla.ops.linear_attn import chunk_linear_attn
    from fla.ops.retention import chunk_retention
    from fla.ops.simple_gla import chunk_simple_gla

    H, Hk = shape[2], shape[3]
    ends = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens.long()}

    def run(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> Tensor:
        if Hk != H:  # fla's gated chunks take one key head a head
            q, k = (x.repeat_interleave(H // Hk, 2) for x in (q, k))
        if gate == "none":
            return chunk_linear_attn(q, k, v, normalize=False, **ends)[0]
        if gate == "fixed":
            return chunk_retention(q, k, v, **ends)[0]
        return (chunk_simple_gla if gate == "head" else chunk_gla)(q, k, v, log_decay, **ends)[0]

    return run


def mamba_ssm(gate: str, shape: tuple[int, ...]) -> Callable[..., Tensor]:
    """mamba_ssm's chunked scan: the gates are -dt and dt scales the values inside its kernels."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    A = -torch.ones(shape[2], device="cuda")

    def run(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        return mamba_chunk_scan_combined(v, -log_decay, A, k, q, chunk_size=128)

    return run


PEERS = {"fla": fla, "fla_expanded": fla, "mamba_ssm": mamba_ssm}


def peers_of(asked: list[str], gate: str, shape: tuple[int, ...]) -> list[str]:
    """Those asked for that have such an operation."""
    special = () if gate == "head" and shape[3] == 1 else ("mamba_ssm", "fla_expanded")
    return [peer for peer in asked if peer not in special]


def shape_for(peer: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    B, T, H, Hk, K, V = shape
    return (B, T, H, H if peer == "fla_expanded" else Hk, K, V)


def lift_refusal() -> None:
    import fla.ops.common.chunk_o as chunk_o

    chunk_o.TRITON_ABOVE_3_7_1 = True


def shorten_autotuning() -> None:
    import triton.testing

    bench = triton.testing.do_bench

    def brief(fn, warmup=5, rep=15, **options):
        return bench(fn, warmup=warmup, rep=rep, **options)

    triton.testing.do_bench = brief


def version_of(peer: str) -> str:
    try:
        return getattr(__import__(peer), "__version__", "unknown")
    except ImportError as error:  # it is told again where the peer would be measured
        return f"{error}"
