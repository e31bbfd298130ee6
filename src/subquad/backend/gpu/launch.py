"""Launches of Triton kernels: those that are new are compiled side by side.

A first backward pass with gates per key channel compiles six kernels, each of them for a second
and more; one after another they are most of the first call's time.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, NamedTuple

_met: set[tuple] = set()
# `witness.script`, where a thread has one, is told of its launches: replay.py's recordings.
witness = threading.local()


class Launch(NamedTuple):
    kernel: Any  # a function under triton.jit
    grid: tuple[int, ...]
    arguments: tuple
    options: dict[str, Any]  # what the kernel is compiled for

    @property
    def key(self) -> tuple:
        """What distinguishes most kernels; Triton itself also considers types and alignment."""
        return (self.kernel, *self.options.items())


def launch(launches: Sequence[Launch]) -> None:
    """Run the launches in order."""
    new = [one for one in launches if one.key not in _met]
    if new:
        # In a context of its own: where it fails or is interrupted, Triton would leave the thread's
        # marked as compiling, and refuse to compile in it again.
        copy_context().run(_compile, new)
        _met.update(one.key for one in new)
    script = getattr(witness, "script", None)
    for one in launches:
        compiled = one.kernel[one.grid](*one.arguments, **one.options)
        if script is not None:
            script.note_launch(one, compiled)


def launch_of(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> Launch:
    return Launch(kernel, grid, arguments, options)


def launch_one(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    launch([launch_of(kernel, grid, *arguments, **options)])


def _compile(launches: Sequence[Launch]) -> None:
    import triton

    # Not in Triton's interpreter, nor before Triton 3.5: there a launch compiles by itself.
    if not isinstance(launches[0].kernel, triton.JITFunction):
        return
    if len(launches) == 1 or not hasattr(triton, "AsyncCompileMode"):
        return
    with ThreadPoolExecutor(len(launches)) as threads, triton.AsyncCompileMode(threads):
        for one in launches:
            one.kernel.warmup(*one.arguments, grid=one.grid, **one.options)
