"""What the compiled CPU kernels share: how they are compiled, split over threads, and their exp.

The kernels vectorise over channels (the last, contiguous axis) and are split over channels
between threads, so no two threads write the same number and no atomics are needed.

numba caches machine code beside the file of the kernel that was compiled. Whoever edits a function
here that kernels in other files inline should delete those caches (`*.nbi`) to see the change.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from threading import get_ident
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
SMALLEST = np.float32(1.1754944e-38)  # normal number

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
    2^n by writing n into the exponent's bits. Below -87, where numbers are denormal, it is 0; above
    88 it stays at e^88 = 1.7e38.
    """
    nothing = x < SMALLEST_EXPONENT
    x = SMALLEST_EXPONENT if nothing else x  # NaN passes both comparisons
    x = LARGEST_EXPONENT if x > LARGEST_EXPONENT else x
    n = np.floor(x * LOG2_E + np.float32(0.5))
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    p = np.float32(1.3933643521e-3) * r + np.float32(8.3631755655e-3)
    p = p * r + np.float32(4.1666464976e-2)
    p = p * r + np.float32(1.6666577003e-1)
    p = p * r + np.float32(5.0000000135e-1)
    p = p * r * r + r + np.float32(1.0)
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return np.float32(0.0) if nothing else p * power


@jit
def sigmoid(x):  # type: ignore[no-untyped-def]
    """1 / (1 + e^-x) in float32, down to 0: e^-x is a square, so that it reaches infinity."""
    root = exp(np.float32(-0.5) * x)
    return np.float32(1.0) / (np.float32(1.0) + root * root)


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


class _Memory:
    """A tensor as NumPy's protocol for arrays sees it."""

    def __init__(self, x: Tensor) -> None:
        self.tensor = x  # kept alive by the array
        self.__array_interface__ = {
            "version": 3,
            "data": (x.data_ptr(), False),
            "shape": tuple(x.shape),
            "strides": tuple(x.itemsize * stride for stride in x.stride()),
            "typestr": _TYPES[x.dtype],
        }


_TYPES = {torch.float32: "<f4", torch.float64: "<f8", torch.int32: "<i4", torch.int64: "<i8"}


def as_array(x: Tensor) -> np.ndarray:
    """A CPU tensor's memory as an array, which keeps it alive.

    Not `x.numpy()`: after that torch refuses to resize the storage, which is somebody's parameter
    and which FSDP frees and fills between uses.
    """
    if x.numel() == 0:
        return np.empty(tuple(x.shape), _TYPES[x.dtype])
    return np.asarray(_Memory(x))


def array(x: Tensor) -> np.ndarray:
    """A tensor's memory as an array, copied only if it is not contiguous."""
    return as_array(x.contiguous())


def rows(x: Tensor) -> tuple[np.ndarray, int]:
    """A [..., D] tensor as (its memory as a flat array, the distance between rows).

    A row is then `flat[t * stride : t * stride + D]`, which is contiguous to the compiler also
    when `x` is one half of a wider projection, so that such halves are never copied.
    """
    x, stride = evenly_spaced(x.detach())
    D = x.shape[-1]
    M = x.numel() // D
    return as_array(x.as_strided(((M - 1) * stride + D,), (1,))), stride


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
    """Where the sequences lie in the flattened rows, [N+1] int64: packed, or the batch's rows.

    Checked here once more: `torch.compile` cannot look at values while it traces, and compiled
    code would write wherever they say.
    """
    if cu_seqlens is None:
        return np.arange(batch + 1, dtype=np.int64) * T
    bounds = as_array(cu_seqlens.to(torch.int64).contiguous())
    if bounds[0] != 0 or bounds[-1] != T or (np.diff(bounds) <= 0).any():
        raise ValueError(
            f"cu_seqlens: got {bounds[:12].tolist()}; expected strictly increasing boundaries from "
            f"0 to T = {T}. Fix: start at 0, end at the number of tokens, drop empty sequences."
        )
    return bounds


_pool: ThreadPoolExecutor | None = None
_forked = False


def _forget_threads() -> None:
    """A forked child inherits the pool object and OpenMP's team, but none of their threads.

    torch would wait for that team for ever, at its first operation that is worth two threads. We
    enter it as well, so we see to it that a child computes on one, like torch's DataLoader workers.
    """
    global _pool, _forked
    _pool, _forked = None, True
    torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


def over_channels(kernel: Callable[..., Any], channels: int, work: int, *args: Any) -> list[Any]:
    """`kernel(*args, first, last)` for slices of the channels, one a thread of torch's count.

    Not numba's threads: its default layer aborts the process when two threads enter it at once,
    which autograd and servers do. The threads flush denormal numbers to zero: a state that decays
    in silence would otherwise run a hundred times slower.
    """
    if work < SMALL:
        return [kernel(*args, 0, channels)]
    lines = -(-channels // SLICE)
    threads = min(torch.get_num_threads(), lines)
    cuts = [min(i * lines // threads * SLICE, channels) for i in range(threads + 1)]
    results: dict[int, Any] = {}
    errors: list[BaseException] = []
    slices = enumerate(pairwise(cuts))  # whichever thread comes takes the next

    def share() -> None:
        try:
            for i, (first, last) in slices:
                results[i] = kernel(*args, first, last)
        except BaseException as error:
            errors.append(error)

    _run_on_threads(share, threads)
    if errors:
        raise errors[0]
    return [results[i] for i in range(threads)]


_Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def _openmp() -> Callable[..., None] | None:
    """The entry point of torch's OpenMP runtime, if it is GNU's or compatible with it."""
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    parallel.argtypes = (_Body, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    parallel.restype = None
    return cast(Callable[..., None], parallel)


_parallel = _openmp()


def _run_on_threads(share: Callable[[], None], threads: int) -> None:
    """Call `share` on that many threads at once: on torch's own team where we can.

    A team of OpenMP spins for milliseconds after each of torch's operations, waiting for the next.
    Threads beside it would get what is left of the cores: half the speed, measured on two.
    """
    global _pool
    if threads == 1:
        _flushing(share)
    elif _parallel is not None and not _forked:
        caller, returned = get_ident(), []

        def body(_: int) -> None:
            _flushing(share)
            returned.append(get_ident())

        _parallel(_Body(body), None, threads, 0)
        if caller not in returned:  # Ctrl-C came in our lines: ctypes prints it and goes on, and
            raise KeyboardInterrupt  # the other threads may well have done all there was to do
    else:
        if _pool is None:
            _pool = ThreadPoolExecutor(
                max(os.cpu_count() or 1, threads), "subquad", torch.set_flush_denormal, (True,)
            )
        for one in [_pool.submit(share) for _ in range(threads)]:
            one.result()


def _flushing(share: Callable[[], None]) -> None:
    """Call it with denormal numbers flushed, and leave the thread, which is torch's, as it was."""
    was = bool(SMALLEST * np.float32(0.5) == 0)
    try:
        torch.set_flush_denormal(True)
        share()
    finally:  # Ctrl-C may come between its lines
        torch.set_flush_denormal(was)
