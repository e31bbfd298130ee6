"""The Triton kernels of the RMS norm of groups of channels, with a gate before, after, or none.

    NORM_FIRST   y = n(x) * w * silu(gate)        n(x) = x * scale / sqrt(mean(x^2) + eps)
    GATE_FIRST   y = n(x * silu(gate)) * w

With a HEAD of channels x is x + skip_head * values, the feed-through of a state space.

A program holds whole groups of several tokens, so each number is read once and written once; the
backward pass computes the norms again rather than storing them. Arithmetic is float32.

Shape suffixes: T tokens of a tile, S channels of a group.
"""

import triton
import triton.language as tl

NORM_FIRST = tl.constexpr(1)  # ORDER; 0 is no gate
GATE_FIRST = tl.constexpr(2)
SHARED = tl.constexpr(1)  # WEIGHT: one for all groups, or (2) each channel its own; 0 is none


@triton.jit
def load_weight(weight, group, s, S: tl.constexpr, WEIGHT: tl.constexpr):
    if WEIGHT == SHARED:
        return tl.load(weight + s, mask=s < S, other=0.0).to(tl.float32)
    else:
        return tl.load(weight + group * S + s, mask=s < S, other=0.0).to(tl.float32)


@triton.jit
def load_skip(skip, group, s, S: tl.constexpr, HEAD: tl.constexpr):
    return tl.load(skip + (group * S + s) // HEAD, mask=s < S, other=0.0).to(tl.float32)


@triton.jit
def reciprocal(h_TS, eps, S: tl.constexpr):
    """1 / root mean square, [T, 1]."""
    return tl.rsqrt(tl.sum(h_TS * h_TS, 1) / S + eps)[:, None]


@triton.jit(do_not_specialize=["tokens"])
def forward(
    x, gate, weight, values, skip, y, tokens, x_row, gate_row, values_row, eps, scale,
    G: tl.constexpr, S: tl.constexpr, BS: tl.constexpr, BT: tl.constexpr, ORDER: tl.constexpr,
    WEIGHT: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    group = pid % G
    t = (pid // G).to(tl.int64) * BT + tl.arange(0, BT)
    s = tl.arange(0, BS)
    inside = (t < tokens)[:, None] & (s < S)[None, :]
    channel = (group * S + s)[None, :]
    y_TS = tl.load(x + t[:, None] * x_row + channel, mask=inside, other=0.0).to(tl.float32)
    if HEAD != 0:
        value_TS = tl.load(values + t[:, None] * values_row + channel, mask=inside, other=0.0)
        y_TS += value_TS.to(tl.float32) * load_skip(skip, group, s, S, HEAD)[None, :]
    if ORDER != 0:
        gate_TS = tl.load(gate + t[:, None] * gate_row + channel, mask=inside, other=0.0)
        gate_TS = gate_TS.to(tl.float32)
        gate_TS *= tl.sigmoid(gate_TS)
    if ORDER == GATE_FIRST:
        y_TS *= gate_TS
    y_TS *= reciprocal(y_TS, eps, S) * scale
    if WEIGHT != 0:
        y_TS *= load_weight(weight, group, s, S, WEIGHT)[None, :]
    if ORDER == NORM_FIRST:
        y_TS *= gate_TS
    tl.store(y + t[:, None] * (G * S) + channel, y_TS.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def backward(
    dy, x, gate, weight, values, skip, dx, dgate, dvalues, parts, skip_parts, tokens, dy_row,
    x_row, gate_row, values_row, eps, scale,
    G: tl.constexpr, S: tl.constexpr, BS: tl.constexpr, BT: tl.constexpr, STEPS: tl.constexpr,
    ORDER: tl.constexpr, WEIGHT: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """parts, skip_parts [programs along the tokens, G, S]: shares of the gradients of parameters.

    Those of skip are by channel, and still to be summed over each head's.
    """
    pid = tl.program_id(0)
    group = pid % G
    piece = (pid // G).to(tl.int64)
    s = tl.arange(0, BS)
    channel = (group * S + s)[None, :]
    grown_TS = tl.zeros([BT, BS], tl.float32)  # summed over T once, at the end
    skipped_TS = tl.zeros([BT, BS], tl.float32)
    for step in range(0, STEPS):
        t = (piece * STEPS + step) * BT + tl.arange(0, BT)
        inside = (t < tokens)[:, None] & (s < S)[None, :]
        x_TS = tl.load(x + t[:, None] * x_row + channel, mask=inside, other=0.0).to(tl.float32)
        dn_TS = tl.load(dy + t[:, None] * dy_row + channel, mask=inside, other=0.0).to(tl.float32)
        if HEAD != 0:
            value_TS = tl.load(values + t[:, None] * values_row + channel, mask=inside, other=0.0)
            value_TS = value_TS.to(tl.float32)
            x_TS += value_TS * load_skip(skip, group, s, S, HEAD)[None, :]
        if ORDER != 0:
            gate_TS = tl.load(gate + t[:, None] * gate_row + channel, mask=inside, other=0.0)
            gate_TS = gate_TS.to(tl.float32)
            open_TS = tl.sigmoid(gate_TS)
            slope_TS = open_TS * (1.0 + gate_TS * (1.0 - open_TS))
            gate_TS *= open_TS
        h_TS = x_TS
        if ORDER == GATE_FIRST:
            h_TS = x_TS * gate_TS
        # Behind the last token all is 0, and with eps = 0 its root is infinite.
        root_T = tl.where((t < tokens)[:, None], reciprocal(h_TS, eps, S), 0.0)
        n_TS = h_TS * root_T
        dgate_TS = dn_TS * n_TS  # of NORM_FIRST, all but the weight and the slope
        if ORDER == NORM_FIRST:
            dn_TS *= gate_TS
        if WEIGHT != 0:
            grown_TS += dn_TS * n_TS
            w_S = load_weight(weight, group, s, S, WEIGHT)[None, :]
            dn_TS *= w_S
            dgate_TS *= w_S
        dh_TS = (dn_TS - n_TS * (tl.sum(dn_TS * n_TS, 1) / S)[:, None]) * (root_T * scale)
        if ORDER == GATE_FIRST:
            dgate_TS = dh_TS * x_TS
            dh_TS *= gate_TS
        elif ORDER == NORM_FIRST:
            dgate_TS *= scale
        cells = t[:, None] * (G * S) + channel
        tl.store(dx + cells, dh_TS.to(dx.dtype.element_ty), mask=inside)
        if HEAD != 0:
            skipped_TS += dh_TS * value_TS
            dh_TS *= load_skip(skip, group, s, S, HEAD)[None, :]
            tl.store(dvalues + cells, dh_TS.to(dvalues.dtype.element_ty), mask=inside)
        if ORDER != 0:
            dgate_TS *= slope_TS
            tl.store(dgate + cells, dgate_TS.to(dgate.dtype.element_ty), mask=inside)
    if WEIGHT != 0:
        grown_S = tl.sum(grown_TS, 0) * scale
        tl.store(parts + (piece * G + group) * S + s, grown_S, mask=s < S)
    if HEAD != 0:
        skipped_S = tl.sum(skipped_TS, 0)
        tl.store(skip_parts + (piece * G + group) * S + s, skipped_S, mask=s < S)
