"""Vectors of float32 spelt out for LLVM, where numba's own loops would keep sums in memory.

An intrinsic is given addresses, and writes the instructions of a loop into the function that calls
it. `Vectors` has what all of them need; each intrinsic's docstring is what it computes.
"""

# mypy: ignore-errors
from __future__ import annotations

from contextlib import contextmanager

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from subquad.backend.cpu.compile import jit

WIDE = llvmlite.binding.get_host_cpu_features().get("avx512f", False)
LANES = 16 if WIDE else 8

_INTEGER, _NUMBER = ir.IntType(64), ir.FloatType()


class Vectors:
    """Writes instructions on vectors of `lanes` numbers. Offsets to addresses count numbers."""

    def __init__(self, builder, lanes: int = LANES) -> None:
        self.builder, self.lanes = builder, lanes
        self.kind = ir.VectorType(_NUMBER, lanes)
        self._fused = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(self.kind, [self.kind] * 3), f"llvm.fmuladd.v{lanes}f32"
        )

    def constant(self, number: float) -> ir.Constant:
        return ir.Constant(self.kind, [number] * self.lanes)

    def place(self, address, offset, kind=None):
        start = self.builder.inttoptr(address, _NUMBER.as_pointer())
        place = self.builder.gep(start, [offset])
        return self.builder.bitcast(place, (kind or self.kind).as_pointer())

    def load(self, address, offset):
        loaded = self.builder.load(self.place(address, offset))
        loaded.align = 4
        return loaded

    def store(self, vector, address, offset) -> None:
        self.builder.store(vector, self.place(address, offset)).align = 4

    def add_to(self, vector, address, offset) -> None:
        self.store(self.builder.fadd(self.load(address, offset), vector), address, offset)

    def repeat(self, address, offset):
        """One number in every lane."""
        number = self.builder.load(self.place(address, offset, _NUMBER))
        undefined = ir.Constant(self.kind, ir.Undefined)
        one = self.builder.insert_element(undefined, number, ir.Constant(ir.IntType(32), 0))
        return self.pick(one, undefined, [0] * self.lanes)

    def pick(self, x, y, lanes: list[int]):
        """Lanes of x, or, from `self.lanes` on, of y."""
        chosen = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)
        return self.builder.shuffle_vector(x, y, chosen)

    def multiply_add(self, x, y, z):
        """x * y + z."""
        return self.builder.call(self._fused, [x, y, z])

    @contextmanager
    def count(self, start, stop):
        """A loop over start <= n < stop, of at least one round."""
        builder = self.builder
        before, body = builder.block, builder.append_basic_block("body")
        after = builder.append_basic_block("after")
        builder.branch(body)
        builder.position_at_end(body)
        n = builder.phi(_INTEGER)
        n.add_incoming(start, before)
        yield n
        following = builder.add(n, whole(1))
        n.add_incoming(following, builder.block)
        builder.cbranch(builder.icmp_signed("<", following, stop), body, after)
        builder.position_at_end(after)

    def variable(self, start):
        """A vector that a loop changes; LLVM finds it a register."""
        place = cgutils.alloca_once(self.builder, self.kind)
        self.builder.store(start, place)
        return place


def whole(n: int) -> ir.Constant:
    return ir.Constant(_INTEGER, n)


def void(arguments: int):
    """The signature of an intrinsic of addresses and sizes."""
    return types.void(*[types.int64] * arguments)


@intrinsic
def _turn(_, x, x_row, out, out_row):
    """out [LANES,LANES] = x [LANES,LANES].T."""

    def generate(context, builder, signature, arguments):
        x, x_row, out, out_row = arguments
        v = Vectors(builder)
        lines = [v.load(x, builder.mul(x_row, whole(i))) for i in range(LANES)]
        step = LANES // 2
        while step > 0:  # swaps one bit of the line's number with the same bit of the lane's
            for i in range(LANES):
                if i & step == 0:
                    x, y = lines[i], lines[i + step]
                    first = [n if n & step == 0 else LANES + n - step for n in range(LANES)]
                    second = [n + step if n & step == 0 else LANES + n for n in range(LANES)]
                    lines[i], lines[i + step] = v.pick(x, y, first), v.pick(x, y, second)
            step //= 2
        for i, line in enumerate(lines):
            v.store(line, out, builder.mul(out_row, whole(i)))
        return context.get_dummy_value()

    return void(4), generate


@jit
def transpose(x, out):
    """out [N,M] = x [M,N].T, both multiples of LANES, rows contiguous."""
    x_row, out_row = x.strides[0] // 4, out.strides[0] // 4
    for i in range(0, x.shape[0], LANES):
        for j in range(0, x.shape[1], LANES):
            source = x.ctypes.data + 4 * (i * x_row + j)
            _turn(source, x_row, out.ctypes.data + 4 * (j * out_row + i), out_row)
