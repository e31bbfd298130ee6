"""What an eager call of each engine costs the host: microseconds a call, for benchmarks/layers.py.

The work is so small that the GPU always waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import subquad
from subquad.engines.norm.api import rms_norm
from subquad.engines.step_size.api import discretize

BF16 = {"device": "cuda", "dtype": torch.bfloat16}


def host_us(call: Callable[[], object]) -> float:
    """Microseconds until a call comes back, its work still queued."""
    for _ in range(10):
        call()
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(50):
            call()
        times.append(time.perf_counter() - began)
    return min(times) / 50 * 1e6


def eager_calls(peers: bool) -> list[dict]:
    T = 64
    q, k, v = (torch.randn(1, T, 2, 64, **BF16).requires_grad_() for _ in range(3))
    gate = F.logsigmoid(torch.randn(1, T, 2, device="cuda")).requires_grad_()
    channels = F.logsigmoid(torch.randn(1, T, 2, 64, device="cuda")).requires_grad_()
    x, weight, filters = (torch.randn(*s, **BF16) for s in ((1, T, 128), (128,), (128, 4)))
    dt, bias = torch.randn(1, T, 2, **BF16), torch.randn(2, device="cuda")
    for parameter in (x, weight, filters, dt, bias):
        parameter.requires_grad_()
    one = [t[:, :1].detach() for t in (q, k, v, gate)]
    state = torch.zeros(1, 2, 64, 64, device="cuda")
    work = {
        "one token": (lambda: subquad.linear_recurrence(*one, state=state), None),
        "no decay": (lambda: subquad.linear_recurrence(q, k, v), [q, k, v]),
        "decay a head": (lambda: subquad.linear_recurrence(q, k, v, gate), [q, k, v, gate]),
        "decay a key channel": (
            lambda: subquad.linear_recurrence(q, k, v, channels), [q, k, v, channels],
        ),
        "short convolution": (lambda: subquad.short_convolution(x, filters), [x, filters]),
        "rms norm": (lambda: rms_norm(x, 128, weight, 1e-5), [x, weight]),
        "discretize": (lambda: discretize(v, dt, bias, bias), [v, dt, bias]),
        "torch's rms norm": (lambda: F.rms_norm(x, (128,), weight), [x, weight]),
    }  # fmt: skip
    if peers:
        from fla.ops.simple_gla import chunk_simple_gla

        work["decay a head, fla"] = (lambda: chunk_simple_gla(q, k, v, gate), [q, k, v, gate])
    return [host_row(name, *parts) for name, parts in work.items()]


def host_row(name: str, call: Callable, leaves: list[Tensor] | None) -> dict:
    def both():
        out = call()
        out = out if isinstance(out, Tensor) else out[0]
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    row = {"work": "eager call", "kind": name}
    try:
        with torch.no_grad():
            row["forward_us"] = host_us(call)
        if leaves:
            row["both_us"] = host_us(both)
    except Exception as error:  # a peer that cannot run is a result
        row["error"] = f"{type(error).__name__}: {error}"[:200]
    print(row, flush=True)
    return row
