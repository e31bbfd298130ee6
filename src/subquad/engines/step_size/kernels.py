"""The Triton kernels of a selective step size: from the projected step to values and decay.

    dt = softplus(raw + bias)      v = dt * x      log_decay = -exp(A_log) * dt

A program owns one head of several tokens. Arithmetic is float32.

Shape suffixes: T tokens of a tile, P channels of a head.
"""

import triton
import triton.language as tl


@triton.jit
def load_step(raw, bias, head, t, real, raw_row):
    """raw + bias of a head's tokens [T]."""
    z_T = tl.load(raw + t * raw_row + head, mask=real, other=0.0).to(tl.float32)
    return z_T + tl.load(bias + head).to(tl.float32)


@triton.jit
def softplus(z):
    """max(z, 0) + log(1 + u) with u = exp(-|z|); log(w) u / (w - 1), w = 1 + u, keeps small u."""
    u = tl.exp(-tl.abs(z))
    w = 1.0 + u
    small = w == 1.0
    return tl.maximum(z, 0.0) + tl.where(small, u, tl.log(w) * u / tl.where(small, 1.0, w - 1.0))


@triton.jit(do_not_specialize=["tokens"])
def forward(
    x, raw, bias, rate, v, log_decay, tokens, x_row, raw_row,
    H: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, BT: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    head = pid % H
    t = (pid // H).to(tl.int64) * BT + tl.arange(0, BT)
    real = t < tokens
    dt_T = softplus(load_step(raw, bias, head, t, real, raw_row))
    tl.store(log_decay + t * H + head, -tl.exp(tl.load(rate + head).to(tl.float32)) * dt_T, real)
    if VALUES:
        p = tl.arange(0, BP)
        inside = real[:, None] & (p < P)[None, :]
        x_TP = tl.load(x + t[:, None] * x_row + (head * P + p)[None, :], mask=inside, other=0.0)
        v_TP = x_TP.to(tl.float32) * dt_T[:, None]
        cells = t[:, None] * (H * P) + (head * P + p)[None, :]
        tl.store(v + cells, v_TP.to(v.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def backward(
    dv, dlog_decay, x, raw, bias, rate, dx, draw, parts, tokens, dv_row, x_row, raw_row,
    H: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, BT: tl.constexpr, STEPS: tl.constexpr,
    VALUES: tl.constexpr,
):  # fmt: skip
    """parts [programs along the tokens, 2, H]: shares of the gradients of bias and A_log."""
    pid = tl.program_id(0)
    head = pid % H
    piece = (pid // H).to(tl.int64)
    decay_rate = tl.exp(tl.load(rate + head).to(tl.float32))
    dbias = 0.0
    drate = 0.0
    for step in range(0, STEPS):
        t = (piece * STEPS + step) * BT + tl.arange(0, BT)
        real = t < tokens
        z_T = load_step(raw, bias, head, t, real, raw_row)
        dt_T = softplus(z_T)
        slope_T = -decay_rate * tl.load(dlog_decay + t * H + head, mask=real, other=0.0)
        drate += tl.sum(slope_T * dt_T, 0)  # A_log enters as its own exponential
        if VALUES:
            p = tl.arange(0, BP)
            inside = real[:, None] & (p < P)[None, :]
            channel = (head * P + p)[None, :]
            x_TP = tl.load(x + t[:, None] * x_row + channel, mask=inside, other=0.0)
            dv_TP = tl.load(dv + t[:, None] * dv_row + channel, mask=inside, other=0.0)
            dv_TP = dv_TP.to(tl.float32)
            slope_T += tl.sum(dv_TP * x_TP.to(tl.float32), 1)
            dx_TP = dv_TP * dt_T[:, None]
            tl.store(
                dx + t[:, None] * (H * P) + channel, dx_TP.to(dx.dtype.element_ty), mask=inside
            )
        slope_T = tl.where(real, slope_T * tl.sigmoid(z_T), 0.0)
        tl.store(draw + t * H + head, slope_T.to(draw.dtype.element_ty), mask=real)
        dbias += tl.sum(slope_T, 0)
    tl.store(parts + (piece * 2) * H + head, dbias)
    tl.store(parts + (piece * 2 + 1) * H + head, drate)
