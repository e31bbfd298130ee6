"""Products of small float32 matrices for compiled CPU code, as fast as a library's large ones.

A library's batched product of chunk-sized matrices reaches a third of the speed of its large ones
(its own threads, copies and checks for each), and between two of its calls everything leaves the
cache. Compiled code that walks over chunks wants the product itself, on matrices that are in the
cache already. The tile below is the whole trick: ROWS x COLS sums stay in registers while their
rows and columns stream by, in vectors that we spell out (`vectors.py`), because the compiler by
itself keeps sums in memory and vectors half as wide.

Sizes: M and L any multiples of ROWS, N of LANES; whoever calls pads with zeros, `padded` says to
what. The last axis of `b` and `c` is contiguous; `a` may have any strides, so `x.T` costs nothing.
"""

# mypy: ignore-errors
from __future__ import annotations

import numpy as np
from numba.extending import intrinsic

from subquad.backend.cpu.compile import jit
from subquad.backend.cpu.vectors import LANES, WIDE, Vectors, void, whole

# 16 sums of 16 numbers fill half of AVX-512's registers; 8 of 8 those of the CPUs before it.
ROWS = 8 if WIDE else 4
COLS = 2 * LANES
PAD = 16  # a multiple of every ROWS and LANES

WHOLE, LOWER, UPPER = 0, 1, 2  # what of `a` is not zero


@jit
def padded(n):
    """The size that a matrix for these products has in place of n."""
    return -(-n // PAD) * PAD


def _tile(vectors):
    """c[ROWS,N] += a[ROWS,L] @ b[L,N], L >= 1, N = vectors * LANES; strides count numbers."""
    offsets = [LANES * j for j in range(vectors)]

    def generate(context, builder, signature, arguments):
        a, a_row, a_column, b, b_row, c, c_row, L = arguments
        v = Vectors(builder)
        lines = [builder.mul(a_row, whole(i)) for i in range(ROWS)]
        starts = [builder.mul(c_row, whole(i)) for i in range(ROWS)]
        places = [builder.add(start, whole(j)) for start in starts for j in offsets]
        sums = [v.variable(v.load(c, place)) for place in places]
        with v.count(whole(0), L) as n:
            row, column = builder.mul(n, b_row), builder.mul(n, a_column)
            right = [v.load(b, builder.add(row, whole(j))) for j in offsets]
            for i, line in enumerate(lines):
                left = v.repeat(a, builder.add(line, column))
                for j in range(vectors):
                    total = sums[vectors * i + j]
                    builder.store(v.multiply_add(left, right[j], builder.load(total)), total)
        for place, total in zip(places, sums):
            v.store(builder.load(total), c, place)
        return context.get_dummy_value()

    @intrinsic
    def tile(_, a, a_row, a_column, b, b_row, c, c_row, L):
        return void(8), generate

    return tile


_wide_tile, _narrow_tile = _tile(2), _tile(1)


@jit
def add_product(a, b, c, triangle):
    """c [M,N] += a [M,L] @ b [L,N]. `triangle`: WHOLE, or which one of a square `a` is not zero."""
    (M, L), N = a.shape, b.shape[1]
    _add_product(
        a.ctypes.data, a.strides[0] // 4, a.strides[1] // 4, b.ctypes.data, b.strides[0] // 4,
        c.ctypes.data, c.strides[0] // 4, M, L, N, triangle,
    )  # fmt: skip


@jit
def _add_product(a, a_row, a_column, b, b_row, c, c_row, M, L, N, triangle):
    """The same of addresses: compiled once, not for each way in which arrays may lie."""
    for j in range(0, N, COLS):
        wide = N - j >= COLS
        for i in range(0, M, ROWS):
            first = i if triangle == UPPER else 0
            length = (i + ROWS if triangle == LOWER else L) - first
            left = a + 4 * (i * a_row + first * a_column)
            right, out = b + 4 * (first * b_row + j), c + 4 * (i * c_row + j)
            if wide:
                _wide_tile(left, a_row, a_column, right, b_row, out, c_row, length)
            else:
                _narrow_tile(left, a_row, a_column, right, b_row, out, c_row, length)


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
