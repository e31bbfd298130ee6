"""The Triton kernels of the short causal convolution: forward, backward, one decoded token.

    z_t = bias + sum_s weight[:, W-1-s] * x_{t-s}      y_t = z_t, or silu(z_t)

A tap that reaches back past its sequence's beginning reads the state, [sequences, W-1, D], or 0.
The backward pass computes z again for dz, stores dz in the outputs' dtype, and sums its taps.

Shape suffixes: T tokens of a tile, D channels of a program.
"""

import triton
import triton.language as tl


@triton.jit
def place(tile, sequence, cu_seqlens, tokens, BT: tl.constexpr, PACKED: tl.constexpr):
    """Where a tile lies. A tile never holds tokens of two rows.

    Returns its first token among those of all rows; and for its tokens: their sequence, how far
    they lie behind its beginning, how many tokens it has left with them; whether they exist.
    """
    tiles = tl.cdiv(tokens, BT)
    row = tile // tiles
    t = (tile % tiles) * BT + tl.arange(0, BT)
    first = row.to(tl.int64) * tokens + (tile % tiles) * BT
    if PACKED:
        own = tl.load(sequence + t, mask=t < tokens, other=0)
        behind = t - tl.load(cu_seqlens + own).to(tl.int32)
        left = tl.load(cu_seqlens + own + 1).to(tl.int32) - t
    else:
        own = row
        behind = t
        left = tokens - t
    return first, own.to(tl.int64), behind, left, t < tokens


@triton.jit
def look_back(x, state, s, t, d, own, behind, real, x_row, D: tl.constexpr, W: tl.constexpr,
              STATE: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    """What tap s sees: x_{t-s}, or the state's entry where that lies before the beginning.

    x points at the tile's first token, t counts from there.
    """
    here = (real & (behind >= s))[:, None]
    past = (real & (behind < s))[:, None]
    if not EVEN:
        here = here & (d < D)[None, :]
        past = past & (d < D)[None, :]
    seen_TD = tl.load(x + (t - s)[:, None] * x_row + d[None, :], mask=here, other=0.0)
    seen_TD = seen_TD.to(tl.float32)
    if STATE:
        entry = own * (W - 1) + (W - 1 + behind - s)
        past_TD = tl.load(state + entry[:, None] * D + d[None, :], mask=past, other=0.0)
        seen_TD += past_TD.to(tl.float32)
    return seen_TD


@triton.jit
def tap(weight, d, s, D: tl.constexpr, W: tl.constexpr):
    """The weights of the tap that reaches s tokens back."""
    return tl.load(weight + d * W + (W - 1 - s), mask=d < D, other=0.0).to(tl.float32)


@triton.jit
def convolve(x, weight, bias, state, t, d, own, behind, real, x_row, D: tl.constexpr,
             W: tl.constexpr, BIAS: tl.constexpr, STATE: tl.constexpr,
             EVEN: tl.constexpr):  # fmt: skip
    """z of a tile, in float32."""
    z_TD = tl.zeros([t.shape[0], d.shape[0]], tl.float32)
    if BIAS:
        z_TD += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    for s in tl.static_range(W):
        seen_TD = look_back(x, state, s, t, d, own, behind, real, x_row, D, W, STATE, EVEN)
        z_TD += seen_TD * tap(weight, d, s, D, W)[None, :]
    return z_TD


@triton.jit(do_not_specialize=["tokens"])
def forward(
    x, weight, bias, state, sequence, cu_seqlens, y, tokens, x_row,
    D: tl.constexpr, W: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BIAS: tl.constexpr,
    STATE: tl.constexpr, SILU: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    BLOCKS: tl.constexpr = (D + BD - 1) // BD
    d = (pid % BLOCKS) * BD + tl.arange(0, BD)
    t = tl.arange(0, BT)
    first, own, behind, _, real = place(pid // BLOCKS, sequence, cu_seqlens, tokens, BT, PACKED)
    y_TD = convolve(x + first * x_row, weight, bias, state, t, d, own, behind, real, x_row,
                    D, W, BIAS, STATE, D % BD == 0)  # fmt: skip
    if SILU:
        y_TD *= tl.sigmoid(y_TD)
    inside = real[:, None] & (d < D)[None, :]
    tl.store(y + first * D + t[:, None] * D + d[None, :], y_TD.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "tiles"])
def backward(
    dy, x, weight, bias, state, sequence, cu_seqlens, dz, parts, tokens, tiles, dy_row, x_row,
    D: tl.constexpr, W: tl.constexpr, TAPS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    STEPS: tl.constexpr, BIAS: tl.constexpr, STATE: tl.constexpr, SILU: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """dz [tokens of all rows, D], and each program's share of the weight's and bias's gradients.

    parts [programs along the tokens, W + 1, D]: the taps by how far they reach back, then the bias.
    `tiles` of all rows, STEPS to a program; TAPS is the power of two from W + 1 on.
    """
    pid = tl.program_id(0)
    BLOCKS: tl.constexpr = (D + BD - 1) // BD
    EVEN: tl.constexpr = D % BD == 0
    d = (pid % BLOCKS) * BD + tl.arange(0, BD)
    t = tl.arange(0, BT)
    piece = pid // BLOCKS
    steps = tl.arange(0, TAPS)
    grown_WD = tl.zeros([TAPS, BD], tl.float32)
    for tile in range(piece * STEPS, tl.minimum((piece + 1) * STEPS, tiles)):
        first, own, behind, _, real = place(tile, sequence, cu_seqlens, tokens, BT, PACKED)
        here = x + first * x_row
        inside = real[:, None] & (d < D)[None, :]
        dz_TD = tl.load(
            dy + first * dy_row + t[:, None] * dy_row + d[None, :], mask=inside, other=0.0
        ).to(tl.float32)
        if SILU:
            z_TD = convolve(here, weight, bias, state, t, d, own, behind, real, x_row,
                            D, W, BIAS, STATE, EVEN)  # fmt: skip
            open_TD = tl.sigmoid(z_TD)
            dz_TD *= open_TD * (1.0 + z_TD * (1.0 - open_TD))
            cells = first * D + t[:, None] * D + d[None, :]
            tl.store(dz + cells, dz_TD.to(dz.dtype.element_ty), mask=inside)
        for s in tl.static_range(W):
            seen_TD = look_back(here, state, s, t, d, own, behind, real, x_row, D, W, STATE, EVEN)
            grown_D = tl.sum(dz_TD * seen_TD, 0)
            grown_WD += tl.where(steps[:, None] == s, grown_D[None, :], 0.0)
        if BIAS:
            grown_WD += tl.where(steps[:, None] == W, tl.sum(dz_TD, 0)[None, :], 0.0)
    cells = (piece.to(tl.int64) * (W + 1) + steps)[:, None] * D + d[None, :]
    tl.store(parts + cells, grown_WD, mask=(steps <= W)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def backward_x(
    dz, weight, sequence, cu_seqlens, dx, tokens, dz_row,
    D: tl.constexpr, W: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """dx: what the W - 1 next tokens of the sequence, and the token itself, made of it."""
    pid = tl.program_id(0)
    BLOCKS: tl.constexpr = (D + BD - 1) // BD
    d = (pid % BLOCKS) * BD + tl.arange(0, BD)
    t = tl.arange(0, BT)
    first, _, _, left, real = place(pid // BLOCKS, sequence, cu_seqlens, tokens, BT, PACKED)
    dx_TD = tl.zeros([BT, BD], tl.float32)
    for s in tl.static_range(W):
        later = (real & (left > s))[:, None]
        if D % BD != 0:
            later = later & (d < D)[None, :]
        cells = first * dz_row + (t + s)[:, None] * dz_row + d[None, :]
        dz_TD = tl.load(dz + cells, mask=later, other=0.0).to(tl.float32)
        dx_TD += dz_TD * tap(weight, d, s, D, W)[None, :]
    inside = real[:, None] & (d < D)[None, :]
    cells = first * D + t[:, None] * D + d[None, :]
    tl.store(dx + cells, dx_TD.to(dx.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def backward_state(
    dz, weight, cu_seqlens, dstate, tokens, dz_row,
    D: tl.constexpr, W: tl.constexpr, BD: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """dstate [sequences, W-1, D]: entry i reaches the sequence's tokens 0 to i."""
    pid = tl.program_id(0)
    BLOCKS: tl.constexpr = (D + BD - 1) // BD
    d = (pid % BLOCKS) * BD + tl.arange(0, BD)
    own = (pid // BLOCKS).to(tl.int64)
    if PACKED:
        begin = tl.load(cu_seqlens + own).to(tl.int64)
        length = tl.load(cu_seqlens + own + 1) - begin
    else:
        begin = own * tokens
        length = tokens
    for i in tl.static_range(W - 1):
        sum_D = tl.zeros([BD], tl.float32)
        for j in tl.static_range(i + 1):
            mask = (d < D) & (j < length)
            dz_D = tl.load(dz + (begin + j) * dz_row + d, mask=mask, other=0.0).to(tl.float32)
            sum_D += dz_D * tap(weight, d, W - 1 - i + j, D, W)
        cells = (own * (W - 1) + i) * D + d
        tl.store(dstate + cells, sum_D.to(dstate.dtype.element_ty), mask=d < D)


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
