"""The Triton kernels of the selective scan: a state number decays and is written by itself.

    h_t = a_t h_{t-1} + w_t        a = exp(dt A), w = dt x B        y_t = C_t . h_t + D x_t

A program owns some channels of one sequence and walks it in tiles of tokens. Inside a tile the
pairs (a, w) are combined by an associative scan, in which decays are only ever multiplied: no gate,
however strong, overflows. The state of a channel lies in registers from tile to tile; the backward
pass recomputes it from the state before each tile and walks from the end.

    g_t = C_t dy_t + a_{t+1} g_{t+1}        the gradient of h_t: the same scan, time turned round

Where a tile begins or ends stand the pairs (1, 0), which change nothing, and what comes from the
tile before or after is added to the scan's result: h_t = W_t + P_t h_0. Tokens behind the end have
dt = 0 and are such pairs by themselves. Arithmetic is float32.

Shape suffixes: T tokens of a tile, D channels of a program, N state numbers of a channel.
"""

import triton
import triton.language as tl

from subquad.engines.matrix.gpu.tiles import LOG2E


@triton.jit
def join(decay, write, later_decay, later_write):
    """First h -> decay h + write, then the later one, as one such pair."""
    return decay * later_decay, write * later_decay + later_write


@triton.jit
def locate(bounds, s, sequences, tokens, PACKED: tl.constexpr):
    """The first token of sequence s, and how many it has.

    Bounds are held inside the tokens there are, and the outer two are 0 and the number of tokens,
    as no one has looked at them: wrong ones give wrong numbers, but no access outside of a tensor,
    and no token is left out, whose results would be what memory happened to hold.
    """
    if PACKED:
        begin = tl.load(bounds + s, mask=s > 0, other=0).to(tl.int64)
        begin = tl.minimum(tl.maximum(begin, 0), tokens)
        end = tl.load(bounds + s + 1).to(tl.int64)
        end = tl.where(s + 1 == sequences, tokens, tl.minimum(tl.maximum(end, begin), tokens))
        return begin, (end - begin).to(tl.int32)
    return s.to(tl.int64) * tokens, tokens


@triton.jit
def load(tensor, row, column, there, WIDTH: tl.constexpr):
    """[T, columns] of a matrix WIDTH wide; 0 where a token or column is not `there`."""
    inside = there[:, None] & (column < WIDTH)[None, :]
    cells = row[:, None] * WIDTH + column[None, :]
    return tl.load(tensor + cells, mask=inside, other=0.0)


@triton.jit
def store(tensor, row, column, there, value, WIDTH: tl.constexpr):
    """The opposite of `load`."""
    inside = there[:, None] & (column < WIDTH)[None, :]
    cells = row[:, None] * WIDTH + column[None, :]
    tl.store(tensor + cells, value, mask=inside)


@triton.jit
def written(x_TD, dt_TD, B_TN, A_DN):
    """The pairs (decay, write) [T,D,N] of some tokens. A is in units of log2."""
    decay = tl.exp2(dt_TD[:, :, None] * A_DN[None, :, :])
    return decay, (dt_TD * x_TD)[:, :, None] * B_TN[:, None, :]


@triton.jit
def pick(x_TDN, place, BT: tl.constexpr):
    """[D,N] of one token of a tile."""
    return tl.sum(tl.where((tl.arange(0, BT) == place)[:, None, None], x_TDN, 0.0), 0)


@triton.jit(do_not_specialize=["tokens"])
def forward(
    x, dt, A, B, C, skip, state, bounds, y, last, checkpoints, tokens,
    D: tl.constexpr, N: tl.constexpr, BLOCKS: tl.constexpr, PACKED: tl.constexpr,
    SAVE: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """y [M,D], last [S,D,N] and, with SAVE, the states before each tile [K,D,N]."""
    pid = tl.program_id(0)
    s = pid // BLOCKS
    begin, length = locate(bounds, s, tl.num_programs(0) // BLOCKS, tokens, PACKED)
    d = (pid % BLOCKS) * BD + tl.arange(0, BD)
    n = tl.arange(0, BN)
    cell = d[:, None] * N + n[None, :]
    real = (d < D)[:, None] & (n < N)[None, :]
    A_DN = tl.load(A + cell, mask=real, other=0.0) * LOG2E
    skip_D = tl.load(skip + d, mask=d < D, other=0.0)
    h_DN = tl.load(state + s.to(tl.int64) * D * N + cell, mask=real, other=0.0)
    slot = begin // BT + s
    for low in range(0, length, BT):
        t = low + tl.arange(0, BT)
        there, row = t < length, begin + t
        if SAVE:
            tl.store(checkpoints + (slot + low // BT) * D * N + cell, h_DN, mask=real)
        x_TD = load(x, row, d, there, D)
        dt_TD = load(dt, row, d, there, D)
        decay, write = written(x_TD, dt_TD, load(B, row, n, there, N), A_DN)
        product, sum_TDN = tl.associative_scan((decay, write), 0, join)
        h_TDN = sum_TDN + product * h_DN[None, :, :]
        C_TN = load(C, row, n, there, N)
        y_TD = tl.sum(h_TDN * C_TN[:, None, :], 2) + skip_D[None, :] * x_TD
        store(y, row, d, there, y_TD, D)
        h_DN = pick(h_TDN, BT - 1, BT)
    tl.store(last + s.to(tl.int64) * D * N + cell, h_DN, mask=real)


@triton.jit(do_not_specialize=["tokens", "all_tokens"])
def backward(
    dy, dlast, x, dt, A, B, C, skip, bounds, checkpoints,
    dx, ddt, dA, dB, dC, dstate, tokens, all_tokens,
    D: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr, EACH: tl.constexpr,
    PACKED: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dx, ddt [M,D], dstate [S,D,N]; shares of dA [S,D,N] and of dB, dC [PARTS,M,N].

    A program takes EACH blocks of channels one after another, adding to its share of dB and dC.
    """
    pid = tl.program_id(0)
    s, part = pid // PARTS, pid % PARTS
    begin, length = locate(bounds, s, tl.num_programs(0) // PARTS, tokens, PACKED)
    n = tl.arange(0, BN)
    slot = begin // BT + s
    shares = part.to(tl.int64) * all_tokens
    for each in range(0, EACH):
        d = (part * EACH + each) * BD + tl.arange(0, BD)
        cell = d[:, None] * N + n[None, :]
        real = (d < D)[:, None] & (n < N)[None, :]
        own = s.to(tl.int64) * D * N + cell
        rate_DN = tl.load(A + cell, mask=real, other=0.0)
        A_DN = rate_DN * LOG2E
        skip_D = tl.load(skip + d, mask=d < D, other=0.0)
        g_DN = tl.load(dlast + own, mask=real, other=0.0)  # what later tokens send back
        dA_DN = tl.zeros([BD, BN], tl.float32)
        tiles = tl.cdiv(length, BT)
        for i in range(0, tiles):
            low = (tiles - 1 - i) * BT
            place = tl.arange(0, BT)
            t = low + place
            there, row = t < length, begin + t
            # The state before each token: the scan over the tokens before, from the tile's first.
            has_before = there & (place > 0)
            decay, write = written(
                load(x, row - 1, d, has_before, D), load(dt, row - 1, d, has_before, D),
                load(B, row - 1, n, has_before, N), A_DN,
            )  # fmt: skip
            product, sum_TDN = tl.associative_scan((decay, write), 0, join)
            h_DN = tl.load(checkpoints + (slot + low // BT) * D * N + cell, mask=real, other=0.0)
            before = sum_TDN + product * h_DN[None, :, :]
            x_TD = load(x, row, d, there, D)
            dt_TD = load(dt, row, d, there, D)
            B_TN = load(B, row, n, there, N)
            decay, write = written(x_TD, dt_TD, B_TN, A_DN)
            kept = decay * before
            dy_TD = load(dy, row, d, there, D)
            dC_TN = tl.sum((kept + write) * dy_TD[:, :, None], 1)
            dC_TN += load(dC, shares + row, n, there & (each > 0), N)
            store(dC, shares + row, n, there, dC_TN, N)
            # The gradient of each state: the scan from the tile's last token.
            dt_after = load(dt, row + 1, d, (t + 1 < length) & (place < BT - 1), D)
            linked = tl.exp2(dt_after[:, :, None] * A_DN[None, :, :])
            read = dy_TD[:, :, None] * load(C, row, n, there, N)[:, None, :]
            product, sum_TDN = tl.associative_scan((linked, read), 0, join, reverse=True)
            g_TDN = sum_TDN + product * g_DN[None, :, :]
            dB_TN = tl.sum(g_TDN * (dt_TD * x_TD)[:, :, None], 1)
            dB_TN += load(dB, shares + row, n, there & (each > 0), N)
            store(dB, shares + row, n, there, dB_TN, N)
            gB_TD = tl.sum(g_TDN * B_TN[:, None, :], 2)
            exponent = g_TDN * kept
            dx_TD = dt_TD * gB_TD + skip_D[None, :] * dy_TD
            store(dx, row, d, there, dx_TD, D)
            ddt_TD = x_TD * gB_TD + tl.sum(exponent * rate_DN[None, :, :], 2)
            store(ddt, row, d, there, ddt_TD, D)
            dA_DN += tl.sum(exponent * dt_TD[:, :, None], 0)
            g_DN = pick(decay * g_TDN, 0, BT)
        tl.store(dA + own, dA_DN, mask=real)
        tl.store(dstate + own, g_DN, mask=real)
