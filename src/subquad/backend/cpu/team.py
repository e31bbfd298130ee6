"""A small team of threads for decoding: the caller and helpers that wait awake for a little while.

Around a decoded token a parallel region lasts 20 to 200 microseconds, and waking a sleeping thread
takes as long. So helpers that have just worked look for more without sleeping, for `PATIENCE`
looks (milliseconds: more than lies between two tokens), and then sleep until a caller wakes them.

Nothing waits for a helper that has not begun: work is cut in units that whoever is free claims, the
caller too, so that on a loaded machine, where a helper may not run for milliseconds, the caller
does it all. A caller that finds the team working for another thread works alone.

Everything is in one array of numbers, the board, because compiled code reads it without the
interpreter. A job is posted there as (kernel, arguments, units), and `kernel(arguments, unit)` is
called once for each unit. Claiming takes one from the number of units left in one atomic step. What
is claimed belongs to a job that is not done, so its description stays until the claimer reports.
"""

# mypy: ignore-errors
from __future__ import annotations

import atexit
import functools
import os
import threading

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from subquad.backend.cpu.compile import jit

LINE = 8  # numbers of a cache line: what different threads write lies in different lines
LEFT, DONE, OWNER = 0, LINE, 2 * LINE  # units left, with HELPERS above them; units done; in use
KERNEL, ARGUMENTS, UNITS = 3 * LINE, 3 * LINE + 1, 3 * LINE + 2  # the job
CLOSED = 4 * LINE  # 1 tells the helpers to stop
ASLEEP = 5 * LINE  # one line for each helper
HELPERS = 32  # bits: how many helpers may take part stands above the number of units left
COUNT = (1 << HELPERS) - 1
MOST = 15  # helpers: a few cores saturate the memory, and every look of another one disturbs
PATIENCE = 500_000  # looks before a helper sleeps, with the yields about three milliseconds
YIELD = 64  # looks between two that offer the core to other threads

_sched_yield = types.ExternalFunction("sched_yield", types.int32())


def _number(builder, board, index):
    place = builder.add(board, builder.mul(index, ir.Constant(index.type, 8)))
    return builder.inttoptr(place, ir.IntType(64).as_pointer())


@intrinsic
def load(_, board, index):
    """board[index], before anything that comes later."""

    def generate(context, builder, signature, arguments):
        return builder.load_atomic(_number(builder, *arguments), "seq_cst", 8)

    return types.int64(types.int64, types.int64), generate


@intrinsic
def store(_, board, index, value):
    """board[index] = value, after everything that came earlier."""

    def generate(context, builder, signature, arguments):
        board, index, value = arguments
        builder.store_atomic(value, _number(builder, board, index), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def add(_, board, index, value):
    """board[index] += value, in one step."""

    def generate(context, builder, signature, arguments):
        board, index, value = arguments
        return builder.atomic_rmw("add", _number(builder, board, index), value, "seq_cst")

    return types.int64(types.int64, types.int64, types.int64), generate


@intrinsic
def swap(_, board, index, expected, value):
    """Whether board[index] was as expected, and now is value, in one step."""

    def generate(context, builder, signature, arguments):
        board, index, expected, value = arguments
        place = _number(builder, board, index)
        result = builder.cmpxchg(place, expected, value, "seq_cst", "seq_cst")
        return builder.extract_value(result, 1)

    return types.boolean(types.int64, types.int64, types.int64, types.int64), generate


@intrinsic
def call(_, kernel, arguments, unit):
    """kernel(arguments, unit), by the kernel's address."""

    def generate(context, builder, signature, values):
        number = ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), (number, number)).as_pointer()
        builder.call(builder.inttoptr(values[0], kind), values[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@jit
def _claim(board):
    """A unit of the posted job that nobody has claimed, or -1."""
    left = load(board, LEFT)
    while left & COUNT:
        if swap(board, LEFT, left, left - 1):
            return load(board, UNITS) - (left & COUNT)
        left = load(board, LEFT)
    return -1


@jit
def _work(board, unit):
    """Do that unit of the posted job, and claim and do more until none are left."""
    kernel, arguments = load(board, KERNEL), load(board, ARGUMENTS)
    finished = 0
    while unit >= 0:
        call(kernel, arguments, unit)
        finished += 1
        unit = _claim(board)
    add(board, DONE, finished)


@jit
def share(board, helpers, kernel, arguments, units):
    """kernel(arguments, unit) for all units, with at most so many helpers; returns when it is done.

    board: 0 for no team. kernel: an address. arguments: a number, by custom an address.
    """
    if board == 0 or helpers == 0 or units == 1 or not swap(board, OWNER, 0, 1):
        for unit in range(units):
            call(kernel, arguments, unit)
        return
    store(board, KERNEL, kernel)
    store(board, ARGUMENTS, arguments)
    store(board, UNITS, units)
    store(board, DONE, 0)
    store(board, LEFT, helpers << HELPERS | units)
    unit = _claim(board)
    if unit >= 0:
        _work(board, unit)
    looks = 0
    while load(board, DONE) < units:
        looks += 1
        if looks % YIELD == 0:
            _sched_yield()
    store(board, OWNER, 0)


@jit
def _serve(board, helper):
    """What a helper does while it is awake: look for work, until there was none for long."""
    looks = 0
    while looks < PATIENCE and load(board, CLOSED) == 0:
        left = load(board, LEFT)
        unit = _claim(board) if left & COUNT and left >> HELPERS > helper else -1
        if unit >= 0:
            _work(board, unit)
            looks = 0
        looks += 1
        if looks % YIELD == 0:
            _sched_yield()
    store(board, ASLEEP + helper * LINE, 1)


class Team:
    """Helpers and their board; `share`'s first two arguments are `team.ready()`."""

    def __init__(self) -> None:
        self._numbers = np.zeros(ASLEEP + LINE * (MOST + 1), np.int64)
        skipped = -self._numbers.ctypes.data // 8 % LINE  # to the start of a cache line
        self._asleep = memoryview(self._numbers)[skipped + ASLEEP :: LINE]
        self._closed = skipped + CLOSED
        self.board = self._numbers.ctypes.data + 8 * skipped
        self._doors: list[threading.Lock] = []  # each locked while its helper is to sleep
        self._threads: list[threading.Thread] = []
        self._growing = threading.Lock()
        self._process = os.getpid()
        atexit.register(self.close)  # or helpers would run compiled code that is being freed

    def ready(self) -> tuple[int, int]:
        """The board and how many helpers may take part, by torch's count; wakes the sleeping."""
        helpers = min(torch.get_num_threads() - 1, MOST)
        if helpers > len(self._doors):
            self._grow(helpers)
        for helper in range(helpers):
            if self._asleep[helper] and swap_number(self.board, ASLEEP + helper * LINE, 1, 0):
                self._doors[helper].release()
        return self.board, helpers

    def _grow(self, helpers: int) -> None:
        with self._growing:
            for helper in range(len(self._doors), helpers):
                door = threading.Lock()
                door.acquire()
                arguments = (helper, door)
                thread = threading.Thread(target=self._help, args=arguments, daemon=True)
                thread.start()
                self._threads.append(thread)
                self._doors.append(door)

    def _help(self, helper: int, door: threading.Lock) -> None:
        torch.set_flush_denormal(True)  # as the threads of `over_channels`
        while not self._numbers[self._closed]:
            _serve(self.board, helper)
            door.acquire()

    def close(self) -> None:
        """Stop the helpers; a fork's child has none."""
        if os.getpid() != self._process:
            return
        self._numbers[self._closed] = 1
        for door, thread in zip(self._doors, self._threads):
            if door.locked():
                door.release()
            thread.join(timeout=1)


@jit
def swap_number(board, index, expected, value):
    """`swap`, for the interpreter."""
    return swap(board, index, expected, value)


@functools.cache
def team() -> Team:
    """The one team of this process."""
    return Team()


if hasattr(os, "register_at_fork"):  # a forked child inherits the board but none of the helpers
    os.register_at_fork(after_in_child=team.cache_clear)
