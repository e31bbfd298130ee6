"""The Triton kernels of the short causal convolution: forward, backward, one decoded token.

    z_t = bias + sum_s weight[:, W-1-s] * x_{t-s}      y_t = z_t, or silu(z_t)

A tap that reaches back past its sequence's beginning reads the state, [sequences, W-1, D], or 0.
Packed or not, a token finds its sequence's bounds by `bounds_of`; nothing is read on the host.
Nothing intermediate is stored: the backward pass computes z again, from lines in the cache.

Shape suffixes: T tokens of a tile, D channels of a program.
"""

import triton
import triton.language as tl


@triton.jit
def bounds_of(t, sequence, cu_seqlens, tokens, PACKED: tl.constexpr):
    """The rows (of [all tokens, D]) at which each token's sequence begins and ends; its number."""
    if PACKED:
        own = tl.load(sequence + t, mask=t < tokens, other=0)
        begin = tl.load(cu_seqlens + own).to(tl.int64)
        end = tl.load(cu_seqlens + own + 1).to(tl.int64)
    else:
        own = t // tokens
        begin = own * tokens
        end = begin + tokens
    return own.to(tl.int64), begin, end


@triton.jit
def look_back(
    x, state, t, d, s, own, begin, real, x_row, D: tl.constexpr, W: tl.constexpr,
    STATE: tl.constexpr,
):  # fmt: skip
    """What tap s sees: x_{t-s}, or the state's entry where that lies before the beginning."""
    inside = real[:, None] & (d < D)[None, :]
    here = t - s >= begin
    seen_TD = tl.load(
        x + (t - s)[:, None] * x_row + d[None, :], mask=inside & here[:, None], other=0.0
    ).to(tl.float32)
    if STATE:
        entry = own * (W - 1) + (W - 1 + t - s - begin)
        past_TD = tl.load(
            state + entry[:, None] * D + d[None, :], mask=inside & (~here)[:, None], other=0.0
        )
        seen_TD += past_TD.to(tl.float32)
    return seen_TD


@triton.jit
def tap(weight, d, s, D: tl.constexpr, W: tl.constexpr):
    """The weights of the tap that reaches s tokens back."""
    return tl.load(weight + d * W + (W - 1 - s), mask=d < D, other=0.0).to(tl.float32)


@triton.jit
def convolve(
    x, weight, bias, state, t, d, own, begin, real, x_row, D: tl.constexpr, W: tl.constexpr,
    BIAS: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """z of tokens t and channels d, in float32."""
    z_TD = tl.zeros([t.shape[0], d.shape[0]], tl.float32)
    if BIAS:
        z_TD += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    for s in tl.static_range(W):
        seen_TD = look_back(x, state, t, d, s, own, begin, real, x_row, D, W, STATE)
        z_TD += seen_TD * tap(weight, d, s, D, W)[None, :]
    return z_TD


@triton.jit
def slope(
    dy, x, weight, bias, state, t, d, own, begin, real, dy_row, x_row, D: tl.constexpr,
    W: tl.constexpr, BIAS: tl.constexpr, STATE: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """dz of tokens t and channels d, 0 where not real."""
    inside = real[:, None] & (d < D)[None, :]
    dz_TD = tl.load(dy + t[:, None] * dy_row + d[None, :], mask=inside, other=0.0).to(tl.float32)
    if SILU:
        z_TD = convolve(x, weight, bias, state, t, d, own, begin, real, x_row, D, W, BIAS, STATE)
        open_TD = tl.sigmoid(z_TD)
        dz_TD *= open_TD * (1.0 + z_TD * (1.0 - open_TD))
    return dz_TD


@triton.jit(do_not_specialize=["tokens", "total"])
def forward(
    x, weight, bias, state, sequence, cu_seqlens, y, tokens, total, x_row,
    D: tl.constexpr, W: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BIAS: tl.constexpr,
    STATE: tl.constexpr, SILU: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """y [total, D]; `tokens` of a row, `total` of all rows."""
    pid = tl.program_id(0)
    BLOCKS: tl.constexpr = (D + BD - 1) // BD
    d = (pid % BLOCKS) * BD + tl.arange(0, BD)
    t = (pid // BLOCKS).to(tl.int64) * BT + tl.arange(0, BT)
    real = t < total
    own, begin, _ = bounds_of(t, sequence, cu_seqlens, tokens, PACKED)
    y_TD = convolve(x, weight, bias, state, t, d, own, begin, real, x_row, D, W, BIAS, STATE)
    if SILU:
        y_TD *= tl.sigmoid(y_TD)
    inside = real[:, None] & (d < D)[None, :]
    tl.store(y + t[:, None] * D + d[None, :], y_TD.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "total"])
def backward(
    dy, x, weight, bias, state, sequence, cu_seqlens, dx, parts, tokens, total, dy_row, x_row,
    D: tl.constexpr, W: tl.constexpr, TAPS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    STEPS: tl.constexpr, BIAS: tl.constexpr, STATE: tl.constexpr, SILU: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """dx [total, D], and each program's share of the weight's and bias's gradients.

    parts [programs along the tokens, W + 1, D]: the taps by how far they reach back, then the bias.
    TAPS: the power of two from W + 1 on.
    """
    pid = tl.program_id(0)
    BLOCKS: tl.constexpr = (D + BD - 1) // BD
    d = (pid % BLOCKS) * BD + tl.arange(0, BD)
    piece = (pid // BLOCKS).to(tl.int64)
    steps = tl.arange(0, TAPS)
    grown_WD = tl.zeros([TAPS, BD], tl.float32)
    for step in range(0, STEPS):
        t = (piece * STEPS + step) * BT + tl.arange(0, BT)
        real = t < total
        own, begin, end = bounds_of(t, sequence, cu_seqlens, tokens, PACKED)
        dx_TD = tl.zeros([BT, BD], tl.float32)
        for s in tl.static_range(W):  # what token t + s got from token t
            later = real & (t + s < end)
            dz_TD = slope(dy, x, weight, bias, state, t + s, d, own, begin, later, dy_row, x_row,
                          D, W, BIAS, STATE, SILU)  # fmt: skip
            dx_TD += dz_TD * tap(weight, d, s, D, W)[None, :]
            if s == 0:
                own_TD = dz_TD
        inside = real[:, None] & (d < D)[None, :]
        tl.store(dx + t[:, None] * D + d[None, :], dx_TD.to(dx.dtype.element_ty), mask=inside)
        for s in tl.static_range(W):
            seen_TD = look_back(x, state, t, d, s, own, begin, real, x_row, D, W, STATE)
            grown_D = tl.sum(own_TD * seen_TD, 0)
            grown_WD += tl.where(steps[:, None] == s, grown_D[None, :], 0.0)
        grown_WD += tl.where(steps[:, None] == W, tl.sum(own_TD, 0)[None, :], 0.0)
    cells = (piece * (W + 1) + steps)[:, None] * D + d[None, :]
    tl.store(parts + cells, grown_WD, mask=(steps <= W)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["tokens", "sequences"])
def backward_state(
    dy, x, weight, bias, state, cu_seqlens, dstate, tokens, sequences, dy_row, x_row,
    D: tl.constexpr, W: tl.constexpr, BD: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """dstate [sequences, W-1, D]: entry i reaches the sequence's tokens 0 to i."""
    pid = tl.program_id(0)
    BLOCKS: tl.constexpr = (D + BD - 1) // BD
    d = (pid % BLOCKS) * BD + tl.arange(0, BD)
    own = (pid // BLOCKS).to(tl.int64) + tl.zeros([1], tl.int64)
    if PACKED:
        begin = tl.load(cu_seqlens + own).to(tl.int64)
        end = tl.load(cu_seqlens + own + 1).to(tl.int64)
    else:
        begin = own * tokens
        end = begin + tokens
    for i in tl.static_range(W - 1):
        sum_D = tl.zeros([1, BD], tl.float32)
        for j in tl.static_range(i + 1):
            t = begin + j
            dz_D = slope(dy, x, weight, bias, state, t, d, own, begin, t < end, dy_row, x_row,
                         D, W, BIAS, True, SILU)  # fmt: skip
            sum_D += dz_D * tap(weight, d, W - 1 - i + j, D, W)[None, :]
        cells = (own * (W - 1) + i)[:, None] * D + d[None, :]
        tl.store(dstate + cells, sum_D.to(dstate.dtype.element_ty), mask=(d < D)[None, :])


@triton.jit
def one_token(
    x, weight, bias, state, y, new, x_row,
    D: tl.constexpr, W: tl.constexpr, BD: tl.constexpr, BIAS: tl.constexpr, STATE: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """One token of each row: y [rows, D] and the state moved on; `new` may be `state` itself."""
    pid = tl.program_id(0)
    BLOCKS: tl.constexpr = (D + BD - 1) // BD
    d = (pid % BLOCKS) * BD + tl.arange(0, BD)
    row = (pid // BLOCKS).to(tl.int64)
    mask = d < D
    now = tl.load(x + row * x_row + d, mask=mask, other=0.0)
    z = now.to(tl.float32) * tap(weight, d, 0, D, W)
    if BIAS:
        z += tl.load(bias + d, mask=mask, other=0.0).to(tl.float32)
    cells = row * ((W - 1) * D) + d
    for i in tl.static_range(W - 1):  # a channel's thread reads entry i before it writes it
        if STATE:
            past = tl.load(state + cells + i * D, mask=mask, other=0.0)
            z += past.to(tl.float32) * tap(weight, d, W - 1 - i, D, W)
            if i > 0:
                tl.store(new + cells + (i - 1) * D, past.to(new.dtype.element_ty), mask=mask)
        elif i > 0:
            tl.store(new + cells + (i - 1) * D, tl.zeros([BD], new.dtype.element_ty), mask=mask)
    if W > 1:
        tl.store(new + cells + (W - 2) * D, now.to(new.dtype.element_ty), mask=mask)
    if SILU:
        z *= tl.sigmoid(z)
    tl.store(y + row * D + d, z.to(y.dtype.element_ty), mask=mask)
