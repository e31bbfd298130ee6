"""The Triton kernels of a skip around the recurrence: y + D_h x, a number D a head.

A program owns one head of several tokens. Arithmetic is float32.

Shape suffixes: T tokens of a tile, P channels of a head.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])
def forward(
    y, x, weight, out, tokens, y_row, x_row,
    H: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    head = pid % H
    t = (pid // H).to(tl.int64) * BT + tl.arange(0, BT)
    p = tl.arange(0, BP)
    inside = (t < tokens)[:, None] & (p < P)[None, :]
    channel = (head * P + p)[None, :]
    y_TP = tl.load(y + t[:, None] * y_row + channel, mask=inside, other=0.0).to(tl.float32)
    x_TP = tl.load(x + t[:, None] * x_row + channel, mask=inside, other=0.0).to(tl.float32)
    y_TP += x_TP * tl.load(weight + head).to(tl.float32)
    tl.store(out + t[:, None] * (H * P) + channel, y_TP.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def backward(
    dy, x, weight, dx, parts, tokens, dy_row, x_row,
    H: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, BT: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """parts [programs along the tokens, H]: shares of D's gradient."""
    pid = tl.program_id(0)
    head = pid % H
    piece = (pid // H).to(tl.int64)
    p = tl.arange(0, BP)
    channel = (head * P + p)[None, :]
    factor = tl.load(weight + head).to(tl.float32)
    grown_TP = tl.zeros([BT, BP], tl.float32)
    for step in range(0, STEPS):
        t = (piece * STEPS + step) * BT + tl.arange(0, BT)
        inside = (t < tokens)[:, None] & (p < P)[None, :]
        dy_TP = tl.load(dy + t[:, None] * dy_row + channel, mask=inside, other=0.0).to(tl.float32)
        x_TP = tl.load(x + t[:, None] * x_row + channel, mask=inside, other=0.0).to(tl.float32)
        grown_TP += dy_TP * x_TP
        cells = t[:, None] * (H * P) + channel
        tl.store(dx + cells, (dy_TP * factor).to(dx.dtype.element_ty), mask=inside)
    tl.store(parts + piece * H + head, tl.sum(tl.sum(grown_TP, 0), 0))
