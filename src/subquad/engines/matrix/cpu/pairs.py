"""Pairs of tokens of one block under decays a key channel, met one by one, for compiled CPU code.

Token s reaches token t > s through D_ts = a_{s+1} ... a_t, one number a channel, so that scores
are no product of two matrices. They are computed channel by channel in the forward pass, with a
lane for each s; their gradients token by token in the backward pass, with a lane for each channel.
Either way D grows by one factor a step and never leaves the registers.

c = BLOCK tokens   K channels, a multiple of LANES   a [c,K] decays
"""

# mypy: ignore-errors
from __future__ import annotations

from llvmlite import ir
from numba.extending import intrinsic

from subquad.backend.cpu.compile import jit
from subquad.backend.cpu.vectors import LANES, Vectors, void, whole

BLOCK = 16  # a multiple of every ROWS and LANES of products


@intrinsic
def _scores(_, queries, keys, row, decay, K, scores):
    """queries, keys [K,c], `row` apart; decay [K,c]; scores [c,c], what is above the diagonal 0."""

    def generate(context, builder, signature, arguments):
        queries, keys, row, decay, K, scores = arguments
        v = Vectors(builder, BLOCK)
        lane, zero = ir.VectorType(ir.IntType(1), BLOCK), v.constant(0.0)
        sums = [v.variable(zero) for _ in range(BLOCK)]
        with v.count(whole(0), K) as n:
            line, gates = builder.mul(n, row), builder.mul(n, whole(BLOCK))
            moved = v.load(keys, line)  # k_s in lane s, decayed from s to t as t goes on
            for t in range(BLOCK):
                before = ir.Constant(lane, [s < t for s in range(BLOCK)])
                further = builder.fmul(moved, v.repeat(decay, builder.add(gates, whole(t))))
                moved = builder.select(before, further, moved)
                query = v.repeat(queries, builder.add(line, whole(t)))
                total = v.multiply_add(query, moved, builder.load(sums[t]))
                builder.store(total, sums[t])
        for t, total in enumerate(sums):
            reached = ir.Constant(lane, [s <= t for s in range(BLOCK)])
            row = builder.select(reached, builder.load(total), zero)
            v.store(row, scores, whole(t * BLOCK))
        return context.get_dummy_value()

    return void(6), generate


@jit
def pair_scores(queries, keys, decay, scores):
    """scores[t,s] = q_t . (D_ts k_s) for s <= t, else 0. queries and keys [K,c] may be columns of
    wider matrices; decay [K,c]."""
    _scores(
        queries.ctypes.data, keys.ctypes.data, queries.strides[0] // 4,
        decay.ctypes.data, decay.shape[0], scores.ctypes.data,
    )  # fmt: skip


@intrinsic
def _gradients(_, dscores, queries, keys, decay, K, dqueries, dkeys, ddecay, reads):
    """Rows of K numbers; `reads` [c,LANES]."""

    def generate(context, builder, signature, arguments):
        dscores, queries, keys, decay, K, dqueries, dkeys, ddecay, reads = arguments
        v, zero = Vectors(builder), Vectors(builder).constant(0.0)

        def gradient(t, s):
            return v.repeat(dscores, builder.add(builder.mul(t, whole(BLOCK)), s))

        with v.count(whole(0), builder.sdiv(K, whole(LANES))) as part:
            first = builder.mul(part, whole(LANES))

            def channels(t):
                return builder.add(builder.mul(t, K), first)

            for t in range(BLOCK):
                v.store(zero, reads, whole(t * LANES))
            with v.count(whole(0), whole(BLOCK)) as s:
                key, d = v.load(keys, channels(s)), gradient(s, s)
                v.add_to(builder.fmul(d, key), dqueries, channels(s))
                dkey = v.variable(builder.fmul(d, v.load(queries, channels(s))))
                following = builder.add(s, whole(1))
                with builder.if_then(builder.icmp_signed("<", following, whole(BLOCK))):
                    moved, crossing = v.variable(v.constant(1.0)), v.variable(zero)
                    with v.count(following, whole(BLOCK)) as t:
                        reach = builder.fmul(builder.load(moved), v.load(decay, channels(t)))
                        builder.store(reach, moved)
                        reach = builder.fmul(reach, gradient(t, s))
                        v.add_to(builder.fmul(reach, key), dqueries, channels(t))
                        write = builder.fmul(reach, v.load(queries, channels(t)))
                        builder.store(builder.fadd(builder.load(dkey), write), dkey)
                        place = builder.mul(t, whole(LANES))
                        read = v.multiply_add(write, key, v.load(reads, place))
                        v.store(read, reads, place)
                        builder.store(builder.fadd(builder.load(crossing), read), crossing)
                    v.add_to(builder.load(crossing), ddecay, channels(following))
                v.add_to(builder.load(dkey), dkeys, channels(s))
        return context.get_dummy_value()

    return void(9), generate


@jit
def pair_gradients(dscores, queries, keys, decay, dqueries, dkeys, ddecay, reads):
    """Of scores [c,c], the lower triangle: added to those of queries, keys and log decays, [c,K].

    A log decay's is the sum over the pairs that cross it, s < j <= t: with s going forward, `reads`
    [c,LANES], scratch, is for each t what it has read so far, and what crosses j = s + 1 is the sum
    of that over all later t. Sums over their own pairs alone, not differences that cancel.
    """
    _gradients(
        dscores.ctypes.data, queries.ctypes.data, keys.ctypes.data, decay.ctypes.data,
        decay.shape[1], dqueries.ctypes.data, dkeys.ctypes.data, ddecay.ctypes.data,
        reads.ctypes.data,
    )  # fmt: skip
