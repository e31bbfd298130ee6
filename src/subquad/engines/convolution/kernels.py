"""The Triton kernels of the short causal convolution: forward, backward, one decoded token.

    z_t = bias + sum_s weight[:, W-1-s] * x_{t-s}      y_t = z_t, or silu(z_t)

A tap that reaches back past its sequence's beginning reads the state, [sequences, W-1, D], or 0.

A program walks the tokens of its piece of a row one by one with what the taps see in registers, so
each input is loaded once. Its backward pass computes z again and carries what is still to come for
the gradients of the last W - 1 inputs; the W - 1 tokens behind its piece it walks for these alone.

Tuples hold a vector [BD], channels of the program, for each tap; `past` holds the last token first.
"""
# Tuples grow in unrolled loops: Triton adds them, but does not know the star.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

import triton
import triton.language as tl


@triton.jit
def tap(weight, d, s, D: tl.constexpr, W: tl.constexpr):
    """The weights of the tap that reaches s tokens back."""
    return tl.load(weight + d * W + (W - 1 - s), mask=d < D, other=0.0).to(tl.float32)


@triton.jit
def taps(weight, d, D: tl.constexpr, W: tl.constexpr):
    """All of them, the current token's first."""
    found = ()
    for s in tl.static_range(W):
        found = found + (tap(weight, d, s, D, W),)
    return found


@triton.jit
def place(tokens, length, D: tl.constexpr, BD: tl.constexpr):
    """The program's channels; the row of its piece, the piece's first token and its end in it."""
    BLOCKS: tl.constexpr = (D + BD - 1) // BD
    pid = tl.program_id(0)
    d = (pid % BLOCKS) * BD + tl.arange(0, BD)
    piece = pid // BLOCKS
    pieces = tl.cdiv(tokens, length)
    begin = (piece % pieces) * length
    return d, piece, (piece // pieces).to(tl.int64), begin, tl.minimum(begin + length, tokens)


@triton.jit
def load_rows(x, t, tokens, x_row, d, D: tl.constexpr, N: tl.constexpr):
    """N rows of x from token t on, all asked for before any is used."""
    rows = ()
    for i in tl.static_range(N):
        at = x + tl.cast(t + i, tl.int64) * x_row + d
        rows = rows + (tl.load(at, mask=(d < D) & (t + i < tokens), other=0.0),)
    return rows


@triton.jit
def enter(x, state, row, t, x_row, d, D: tl.constexpr, W: tl.constexpr, STATE: tl.constexpr):
    """The W - 1 inputs before token t of a row; x points at the row's first token."""
    past = ()
    for s in tl.static_range(1, W):
        at = x + tl.cast(t - s, tl.int64) * x_row + d
        seen = tl.load(at, mask=(d < D) & (t >= s), other=0.0).to(tl.float32)
        if STATE:
            cells = (row * (W - 1) + (W - 1 + t - s)) * D + d
            seen += tl.load(state + cells, mask=(d < D) & (t < s), other=0.0).to(tl.float32)
        past = past + (seen,)
    return past


@triton.jit
def within(past, t, tokens, state, sequence, cu_seqlens, d, D: tl.constexpr, W: tl.constexpr,
           STATE: tl.constexpr):  # fmt: skip
    """Of packed sequences: `past` as token t's own sequence has it, and t's place in that."""
    own = tl.load(sequence + t, mask=t < tokens, other=0).to(tl.int64)
    behind = tl.maximum(t - tl.load(cu_seqlens + own).to(tl.int32), 0)  # if bounds are wrong, too
    seen = ()
    for s in tl.static_range(1, W):
        before = tl.zeros_like(past[s - 1])
        if STATE:
            cells = (own * (W - 1) + (W - 1 + behind - s)) * D + d
            before = tl.load(state + cells, mask=(d < D) & (behind < s), other=0.0).to(tl.float32)
        seen = seen + (tl.where(behind >= s, past[s - 1], before),)
    return seen, behind


@triton.jit
def convolve(now, seen, weights, start, W: tl.constexpr):
    """z of one token; `start` is the bias."""
    z = start + now * weights[0]
    for s in tl.static_range(1, W):
        z += seen[s - 1] * weights[s]
    return z


@triton.jit
def move_on(now, past, W: tl.constexpr):
    moved = ()
    if W > 1:
        moved = (now,)
        for s in tl.static_range(W - 2):
            moved = moved + (past[s],)
    return moved


@triton.jit(do_not_specialize=["tokens", "length"])
def forward(
    x, weight, bias, state, sequence, cu_seqlens, y, tokens, length, x_row,
    D: tl.constexpr, W: tl.constexpr, BD: tl.constexpr, AT_ONCE: tl.constexpr, BIAS: tl.constexpr,
    STATE: tl.constexpr, SILU: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """`length` tokens of one row a program, a multiple of the AT_ONCE that it loads at once."""
    d, _, row, begin, end = place(tokens, length, D, BD)
    x += row * tokens * x_row
    y += row * tokens * D
    weights = taps(weight, d, D, W)
    start = tl.zeros([BD], tl.float32)
    if BIAS:
        start += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)
    past = enter(x, state, row, begin, x_row, d, D, W, STATE and not PACKED)
    for t0 in range(begin, end, AT_ONCE):
        rows = load_rows(x, t0, tokens, x_row, d, D, AT_ONCE)
        for i in tl.static_range(AT_ONCE):
            now = rows[i].to(tl.float32)
            seen = past
            if PACKED:
                seen, _ = within(past, t0 + i, tokens, state, sequence, cu_seqlens, d, D, W, STATE)
            z = convolve(now, seen, weights, start, W)
            if SILU:
                z *= tl.sigmoid(z)
            at = y + tl.cast(t0 + i, tl.int64) * D + d
            tl.store(at, z.to(y.dtype.element_ty), mask=(d < D) & (t0 + i < tokens))
            past = move_on(now, past, W)


@triton.jit
def back_step(
    x_row_values, dy_row_values, t, past, pending, state, sequence, cu_seqlens, tokens, weights,
    start, d, D: tl.constexpr, W: tl.constexpr, STATE: tl.constexpr, SILU: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """One token: its dz, what its taps saw (itself first), and dx so far of what they saw."""
    now = x_row_values.to(tl.float32)
    dz = dy_row_values.to(tl.float32)
    seen = past
    behind = t
    if PACKED:
        seen, behind = within(past, t, tokens, state, sequence, cu_seqlens, d, D, W, STATE)
    if SILU:
        z = convolve(now, seen, weights, start, W)
        opened = tl.sigmoid(z)
        dz *= opened * (1.0 + z * (1.0 - opened))
    sums = (dz * weights[0],)
    for s in tl.static_range(1, W):
        reached = dz * weights[s]
        if PACKED:
            reached = tl.where(behind >= s, reached, 0.0)
        sums = sums + (pending[s - 1] + reached,)
    return now, dz, (now,) + seen, sums


@triton.jit
def store_dx(dx, sums, t, begin, tokens, d, D: tl.constexpr, W: tl.constexpr):
    """With token t the gradient of the input W - 1 tokens before it is complete."""
    t -= W - 1
    at = dx + tl.cast(t, tl.int64) * D + d
    tl.store(at, sums[W - 1].to(dx.dtype.element_ty), mask=(d < D) & (t >= begin) & (t < tokens))


@triton.jit
def add_slopes(grown, dz, seen, W: tl.constexpr):
    """The sums of dz with what each tap saw, and of dz itself, one token further."""
    more = ()
    for s in tl.static_range(W):
        more = more + (grown[s] + dz * seen[s],)
    return more + (grown[W] + dz,)


@triton.jit(do_not_specialize=["tokens", "length"])
def backward(
    dy, x, weight, bias, state, sequence, cu_seqlens, dx, dz, parts, tokens, length, dy_row, x_row,
    D: tl.constexpr, W: tl.constexpr, BD: tl.constexpr, AT_ONCE: tl.constexpr, BIAS: tl.constexpr,
    STATE: tl.constexpr, SILU: tl.constexpr, PACKED: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """dx, and each program's share of the weight's and bias's gradients; dz too, if KEEP.

    parts [pieces of all rows, W + 1, D]: the taps in the weight's order, then the bias.
    """
    d, piece, row, begin, end = place(tokens, length, D, BD)
    x += row * tokens * x_row
    dy += row * tokens * dy_row
    dx += row * tokens * D
    dz += row * tokens * D
    weights = taps(weight, d, D, W)
    start = tl.zeros([BD], tl.float32)
    if BIAS:
        start += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)
    past = enter(x, state, row, begin, x_row, d, D, W, STATE and not PACKED)
    pending = ()
    grown = (tl.zeros([BD], tl.float32),)
    for s in tl.static_range(W):
        grown = grown + (tl.zeros([BD], tl.float32),)
        if s > 0:
            pending = pending + (tl.zeros([BD], tl.float32),)
    for t0 in range(begin, end, AT_ONCE):
        x_rows = load_rows(x, t0, tokens, x_row, d, D, AT_ONCE)
        dy_rows = load_rows(dy, t0, tokens, dy_row, d, D, AT_ONCE)
        for i in tl.static_range(AT_ONCE):
            now, slope, seen, sums = back_step(
                x_rows[i], dy_rows[i], t0 + i, past, pending, state, sequence, cu_seqlens, tokens,
                weights, start, d, D, W, STATE, SILU, PACKED,
            )  # fmt: skip
            grown = add_slopes(grown, slope, seen, W)
            store_dx(dx, sums, t0 + i, begin, tokens, d, D, W)
            if KEEP:
                at = dz + tl.cast(t0 + i, tl.int64) * D + d
                tl.store(at, slope.to(dz.dtype.element_ty), mask=(d < D) & (t0 + i < tokens))
            past = move_on(now, past, W)
            pending = sums[: W - 1]
    t0 = begin + tl.cdiv(end - begin, AT_ONCE) * AT_ONCE
    x_rows = load_rows(x, t0, tokens, x_row, d, D, W - 1)
    dy_rows = load_rows(dy, t0, tokens, dy_row, d, D, W - 1)
    for i in tl.static_range(W - 1):
        now, _, _, sums = back_step(
            x_rows[i], dy_rows[i], t0 + i, past, pending, state, sequence, cu_seqlens, tokens,
            weights, start, d, D, W, STATE, SILU, PACKED,
        )  # fmt: skip
        store_dx(dx, sums, t0 + i, begin, tokens, d, D, W)
        past = move_on(now, past, W)
        pending = sums[: W - 1]
    parts += piece.to(tl.int64) * ((W + 1) * D) + d
    for s in tl.static_range(W):
        tl.store(parts + (W - 1 - s) * D, grown[s], mask=d < D)
    tl.store(parts + W * D, grown[W], mask=d < D)


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
    if PACKED:  # wrong bounds give wrong numbers, but reach nothing outside of dz
        begin = tl.maximum(tl.load(cu_seqlens + own).to(tl.int64), 0)
        length = tl.minimum(tl.load(cu_seqlens + own + 1), tokens) - begin
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
    """One token of each sequence: y [rows, D] and the next state; `new` may be `state` itself."""
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
