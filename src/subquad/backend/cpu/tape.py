"""A tape: kernels with their arguments, recorded once and run one after another in one call.

Streaming the weights of a layer pushes all else out of the nearest caches, so that coming back from
compiled code into the interpreter costs tens of microseconds, whatever it then does. A tape runs a
whole layer without coming back. It is an array of numbers: for each step the address of a kernel,
its number of units, and its arguments, most of them addresses of tensors.

Kernels that a tape can run are `step(arguments, unit)`, compiled by `kernel`: units are what the
team's threads share (see team.py), and a step begins when the one before is done.
"""

# mypy: ignore-errors
from __future__ import annotations

import struct
from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

import numba
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from subquad.backend.cpu.compile import _FAST, jit
from subquad.backend.cpu.team import share, team

HEAD = 3  # numbers of a step before its arguments: where the next begins, its kernel, its units


def kernel(function: Callable[..., None]) -> int:
    """Compile `function(arguments, unit)` for tapes; its address."""
    signature = types.void(types.int64, types.int64)
    options = {"nopython": True, "fastmath": _FAST, "error_model": "numpy"}
    try:
        compiled = numba.cfunc(signature, cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        compiled = numba.cfunc(signature, **options)(function)
    _alive.append(compiled)
    return compiled.address


_alive: list[Any] = []  # compiled code is freed with its last reference


@intrinsic
def _integers(_, address):
    def cast_to_pointer(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.int64)(types.int64), cast_to_pointer


@jit
def integers(address, count):
    """The int64 array at an address: a step's arguments."""
    return numba.carray(_integers(address), count)


@intrinsic
def real(_, number):
    """The float64 whose bits are these."""

    def cast_bits(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(types.float64))

    return types.float64(types.int64), cast_bits


@jit
def _run(board, helpers, tape, size):
    numbers = integers(tape, size)
    at = 0
    while at < size:
        share(board, helpers, numbers[at + 1], tape + 8 * (at + HEAD), numbers[at + 2])
        at = numbers[at]


class Tape:
    """Steps in order, which read and write the tensors they were recorded with, but for those that
    `free` names: their place is taken by others at each `run`."""

    def __init__(self) -> None:
        self._numbers: list[int] = []
        self._tensors: list[tuple[int, Tensor]] = []  # and where on the tape their addresses are
        self._moving: list[tuple[int, int, int]] = []  # (place on the tape, tensor, offset)

    def step(self, kernel: int, units: int, *arguments: Tensor | float | None) -> None:
        """Add a call of the kernel. A tensor is on the tape as its address, None as 0."""
        self._numbers += [len(self._numbers) + HEAD + len(arguments), kernel, units]
        for x in arguments:
            if isinstance(x, Tensor):
                self._tensors.append((len(self._numbers), x))
            self._numbers.append(_number(x))

    def mark(self) -> tuple[int, int]:
        """How far it is recorded, for `cut`."""
        return len(self._numbers), len(self._tensors)

    def cut(self, mark: tuple[int, int]) -> None:
        """Take back what was recorded since the mark."""
        del self._numbers[mark[0] :], self._tensors[mark[1] :]

    def free(self, tensors: Sequence[Tensor]) -> None:
        """From now on these, and views of them, are what each `run` is given."""
        own = []
        places = sorted((x.data_ptr(), x.data_ptr() + x.nbytes, i) for i, x in enumerate(tensors))
        begins = [begin for begin, _, _ in places]
        for place, x in self._tensors:
            at = x.data_ptr()
            begin, end, i = places[bisect_right(begins, at) - 1]
            if begin <= at < end:
                self._moving.append((place, i, at - begin))
            else:
                own.append((place, x))  # and stays alive, for its address is on the tape
        self._tensors = own
        self._array = array("q", self._numbers)

    def run(self, tensors: Sequence[Tensor]) -> None:
        """Run on these float32 contiguous tensors. For one thread at a time: what lies between the
        steps is in tensors of the tape's own."""
        numbers = self._array
        addresses = [x.data_ptr() for x in tensors]
        for place, i, offset in self._moving:
            numbers[place] = addresses[i] + offset
        _run(*team().ready(), numbers.buffer_info()[0], len(numbers))


def _number(x: Tensor | float | None) -> int:
    """An argument as it stands on a tape."""
    if x is None:
        return 0
    if isinstance(x, Tensor):
        return x.data_ptr()
    return x if isinstance(x, int) else struct.unpack("q", struct.pack("d", x))[0]
