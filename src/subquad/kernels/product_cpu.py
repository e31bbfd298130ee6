"""Products of small float32 matrices for compiled CPU code, as fast as a library's large ones.

A library's batched product of chunk-sized matrices reaches a third of the speed of its large ones
(its own threads, copies and checks for each), and between two of its calls everything leaves the
cache. Compiled code that walks over chunks wants the product itself, on matrices that are in the
cache already. The tile below is the whole trick: ROWS x COLS sums stay in registers while their
rows and columns stream by, in vectors that we spell out, because the compiler by itself keeps sums
in memory and vectors half as wide.

Sizes: M and L any multiples of ROWS, N of COLS; whoever calls pads with zeros, `padded` says to
what. The last axis of `b` and `c` is contiguous; `a` may have any strides, so `x.T` costs nothing.
"""

# mypy: ignore-errors
from __future__ import annotations

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from subquad.kernels.cpu import jit

# 16 sums of 16 numbers fill half of AVX-512's registers; 8 of 8 those of the CPUs before it.
_WIDE = llvmlite.binding.get_host_cpu_features().get("avx512f", False)
LANES, ROWS = (16, 8) if _WIDE else (8, 4)
COLS = 2 * LANES
PAD = 32  # a multiple of every ROWS and COLS

WHOLE, LOWER, UPPER = 0, 1, 2  # what of `a` is not zero


@jit
def padded(n):
    """The size that a matrix for these products has in place of n."""
    return -(-n // PAD) * PAD


@intrinsic
def _tile(_, a, a_row, a_column, b, b_row, c, c_row, L):
    """c[ROWS,COLS] += a[ROWS,L] @ b[L,COLS], L >= 1: addresses, and strides in numbers."""
    signature = types.void(*[types.int64] * 8)

    def generate(context, builder, signature, arguments):
        a, a_row, a_column, b, b_row, c, c_row, L = arguments
        integer, number = ir.IntType(64), ir.FloatType()
        vector = ir.VectorType(number, LANES)
        first_lane = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        undefined = ir.Constant(vector, ir.Undefined)
        multiply_add = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fmuladd.v{LANES}f32"
        )

        def whole(n):
            return ir.Constant(integer, n)

        def pointer(base, offset, kind=vector):
            start = builder.inttoptr(base, number.as_pointer())
            return builder.bitcast(builder.gep(start, [offset]), kind.as_pointer())

        def load(place):
            loaded = builder.load(place)
            loaded.align = 4
            return loaded

        def broadcast(x):
            one = builder.insert_element(undefined, x, ir.Constant(ir.IntType(32), 0))
            return builder.shuffle_vector(one, undefined, first_lane)

        lines = [builder.mul(a_row, whole(i)) for i in range(ROWS)]
        places = [
            pointer(c, builder.add(builder.mul(c_row, whole(i)), whole(j)))
            for i in range(ROWS)
            for j in (0, LANES)
        ]
        before = [load(place) for place in places]
        entry, loop = builder.block, builder.append_basic_block("tile")
        end = builder.append_basic_block("tile_end")
        builder.branch(loop)

        builder.position_at_end(loop)
        n = builder.phi(integer)
        n.add_incoming(whole(0), entry)
        sums = [builder.phi(vector) for _ in places]
        for total, start in zip(sums, before):
            total.add_incoming(start, entry)
        row, column = builder.mul(n, b_row), builder.mul(n, a_column)
        right = [load(pointer(b, builder.add(row, whole(j)))) for j in (0, LANES)]
        new = []
        for i, line in enumerate(lines):
            left = broadcast(builder.load(pointer(a, builder.add(line, column), number)))
            for j in (0, 1):
                new.append(builder.call(multiply_add, [left, right[j], sums[2 * i + j]]))
        for total, updated in zip(sums, new):
            total.add_incoming(updated, loop)
        following = builder.add(n, whole(1))
        n.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, L), loop, end)

        builder.position_at_end(end)
        for place, total in zip(places, new):
            builder.store(total, place).align = 4
        return context.get_dummy_value()

    return signature, generate


@jit
def add_product(a, b, c, triangle):
    """c [M,N] += a [M,L] @ b [L,N]. `triangle`: WHOLE, or which one of a square `a` is not zero."""
    (M, L), N = a.shape, b.shape[1]
    a_row, a_column = a.strides[0] // 4, a.strides[1] // 4
    b_row, c_row = b.strides[0] // 4, c.strides[0] // 4
    for j in range(0, N, COLS):
        for i in range(0, M, ROWS):
            first = i if triangle == UPPER else 0
            last = i + ROWS if triangle == LOWER else L
            _tile(
                a.ctypes.data + 4 * (i * a_row + first * a_column), a_row, a_column,
                b.ctypes.data + 4 * (first * b_row + j), b_row,
                c.ctypes.data + 4 * (i * c_row + j), c_row, last - first,
            )  # fmt: skip


@jit
def lower_product(a, b, c):
    """The lower triangle of c [M,M] = a [M,L] @ b [L,M]; what is above it is finite if a, b are."""
    c[:] = np.float32(0.0)
    M = c.shape[0]
    for j in range(0, M, COLS):
        add_product(a[j:], b[:, j : j + COLS], c[j:, j : j + COLS], WHOLE)


@jit
def aligned(size):
    """That many zeros from the begin of a cache line on, so that no vector lies on two lines."""
    memory = np.zeros(size + 16, np.float32)
    first = (-memory.ctypes.data % 64) // 4
    return memory[first : first + size]


@jit
def block(memory, rows, columns):
    """A matrix in the front of a piece of memory. A corner of a larger one would not do: that its
    rows are contiguous, the compiler must know to vectorise."""
    return memory[: rows * columns].reshape((rows, columns))


@jit
def transpose(x, out):
    """out [N,M] = x [M,N].T, both multiples of 16, in blocks that stay in the first-level cache."""
    for i in range(0, x.shape[0], 16):
        for j in range(0, x.shape[1], 16):
            for m in range(j, j + 16):
                for n in range(i, i + 16):
                    out[m, n] = x[n, m]
