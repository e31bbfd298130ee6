"""What the compiled CPU kernels share: how they are compiled, split over threads, and their exp.

The kernels vectorise over channels (the last, contiguous axis) and are split over channels
between threads, so no two threads write the same number and no atomics are needed.

numba caches machine code beside the file of the kernel that was compiled. Whoever edits a function
here that kernels in other files inline should delete those caches (`*.nbi`) to see the change.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, cast

import numba
import numpy as np
import torch
from numba import types
from numba.extending import intrinsic
from torch import Tensor

# Fused multiply-add and freely ordered sums are welcome; NaN and Inf keep their meaning.
_FAST = {"contract", "nsz", "reassoc"}

LOG2_E = np.float32(1.4426950408889634)
LN2_HIGH = np.float32(0.693359375)  # exact in 9 bits, so n * LN2_HIGH is exact
LN2_LOW = np.float32(-2.12194440054690583e-4)
SMALLEST_EXPONENT = np.float32(-87.0)  # just above the smallest normal number's logarithm
LARGEST_EXPONENT = np.float32(88.0)

SLICE = 16  # channels: one cache line of float32, so that threads never share a line
SMALL = 1 << 18  # below so many numbers, handing them to other threads costs more than it saves


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a kernel that runs without the interpreter lock, cached on disk where possible."""
    options: dict[str, Any] = {"nogil": True, "fastmath": _FAST, "error_model": "numpy"}
    try:
        compiled = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        compiled = numba.njit(**options)(function)
    return cast(Callable[..., Any], compiled)


@jit
def exp(x):  # type: ignore[no-untyped-def]
    """e^x in float32, to 1e-7 relative, without a branch or a call, so that LLVM vectorises it.

    x = n ln 2 + r with |r| <= ln(2)/2; e^r by a polynomial fitted at Chebyshev nodes (1e-8);
    2^n by writing n into the exponent's bits. Below -87 it stays at e^-87 = 1.6e-38.
    """
    x = SMALLEST_EXPONENT if x < SMALLEST_EXPONENT else x  # NaN passes both comparisons
    x = LARGEST_EXPONENT if x > LARGEST_EXPONENT else x
    n = np.floor(x * LOG2_E + np.float32(0.5))
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    p = np.float32(1.3933643521e-3) * r + np.float32(8.3631755655e-3)
    p = p * r + np.float32(4.1666464976e-2)
    p = p * r + np.float32(1.6666577003e-1)
    p = p * r + np.float32(5.0000000135e-1)
    p = p * r * r + r + np.float32(1.0)
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@jit
def sigmoid(x):  # type: ignore[no-untyped-def]
    """1 / (1 + e^-x) in float32."""
    return np.float32(1.0) / (np.float32(1.0) + exp(-x))


@intrinsic
def _pointer(_, address):  # type: ignore[no-untyped-def]
    def cast_to_pointer(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(types.int64), cast_to_pointer


@jit
def at(address, shape):  # type: ignore[no-untyped-def]
    """The float32 array of that shape at an address; the caller keeps its tensor alive."""
    return numba.carray(_pointer(address), shape)  # type: ignore[call-arg]


def address(x: Tensor | None) -> int:
    """Where a contiguous tensor lies, 0 for none, as an argument for a kernel that decodes.

    The weights of a layer push all else out of the caches, so around a decoded token an argument
    costs what code and objects it takes to make: an address is several times cheaper than an array.
    """
    return 0 if x is None else x.data_ptr()


def array(x: Tensor) -> np.ndarray:
    """A tensor's memory as an array, copied only if it is not contiguous."""
    return (x.detach() if x.requires_grad else x).contiguous().numpy()


def rows(x: Tensor) -> tuple[np.ndarray, int]:
    """A [..., D] tensor as (its memory as a flat array, the distance between rows).

    A row is then `flat[t * stride : t * stride + D]`, which is contiguous to the compiler also
    when `x` is one half of a wider projection, so that such halves are never copied.
    """
    x, stride = evenly_spaced(x.detach())
    D = x.shape[-1]
    M = x.numel() // D
    return x.as_strided(((M - 1) * stride + D,), (1,)).numpy(), stride


def evenly_spaced(x: Tensor) -> tuple[Tensor, int]:
    """x [..., D], copied only if it must be for its rows to lie at one distance; that distance."""
    if x.is_contiguous():
        return x, x.shape[-1]
    D = x.shape[-1]
    if x.stride(-1) != 1:
        return x.contiguous(), D
    try:
        return x, x.view(-1, D).stride(0)
    except RuntimeError:  # its leading axes do not join into one
        return x.contiguous(), D


def sequence_bounds(batch: int, T: int, cu_seqlens: Tensor | None) -> np.ndarray:
    """Where the sequences lie in the flattened rows, [N+1] int64: packed, or the batch's rows."""
    if cu_seqlens is None:
        return np.arange(batch + 1, dtype=np.int64) * T
    return cu_seqlens.to(torch.int64).contiguous().numpy()


_pool: ThreadPoolExecutor | None = None


def _forget_pool() -> None:
    """A forked child inherits the pool object but none of its threads."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def over_channels(kernel: Callable[..., Any], channels: int, work: int, *args: Any) -> list[Any]:
    """`kernel(*args, first, last)` for slices of the channels, one a thread of torch's count.

    Own threads rather than numba's: its default layer aborts the process when two threads enter
    it at once, which autograd and servers do. They flush denormal numbers to zero: a state that
    decays in silence would otherwise run a hundred times slower, and the caller's own thread is
    not ours to set.
    """
    global _pool
    if work < SMALL:
        return [kernel(*args, 0, channels)]
    lines = -(-channels // SLICE)
    threads = min(torch.get_num_threads(), lines)
    cuts = [min(i * lines // threads * SLICE, channels) for i in range(threads + 1)]
    if _pool is None:
        _pool = ThreadPoolExecutor(
            max(os.cpu_count() or 1, threads), "subquad", torch.set_flush_denormal, (True,)
        )
    slices = [_pool.submit(kernel, *args, first, last) for first, last in pairwise(cuts)]
    return [one.result() for one in slices]
