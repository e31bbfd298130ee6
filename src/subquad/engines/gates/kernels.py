"""The Triton kernels of a gated product and of GLA's forget gate: each number is read once.

    silu_product    y = gate sigmoid(gate) up
    log_sigmoid     y = log(sigmoid(x)) scale

The backward passes compute the sigmoids again from what went in. Arithmetic is float32.

Shape suffixes: T tokens of a tile, C channels of it.
"""

import triton
import triton.language as tl

from subquad.engines.step_size.kernels import softplus


@triton.jit
def tile(tokens, C: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr):
    """A program's tokens [T,1], channels [1,C], and which of these are there."""
    pid = tl.program_id(0)
    BLOCKS: tl.constexpr = (C + BC - 1) // BC
    t = (pid // BLOCKS).to(tl.int64) * BT + tl.arange(0, BT)[:, None]
    c = (pid % BLOCKS) * BC + tl.arange(0, BC)[None, :]
    return t, c, (t < tokens) & (c < C)


@triton.jit
def load(x, row, t, c, inside):
    return tl.load(x + t * row + c, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store(y, y_TC, t, c, inside, C: tl.constexpr):
    tl.store(y + t * C + c, y_TC.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def silu_product(
    gate, up, y, tokens, gate_row, up_row, C: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr
):
    t, c, inside = tile(tokens, C, BC, BT)
    gate_TC = load(gate, gate_row, t, c, inside)
    y_TC = gate_TC * tl.sigmoid(gate_TC) * load(up, up_row, t, c, inside)
    store(y, y_TC, t, c, inside, C)


@triton.jit(do_not_specialize=["tokens"])
def silu_product_backward(
    dy, gate, up, dgate, dup, tokens, dy_row, gate_row, up_row,
    C: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    t, c, inside = tile(tokens, C, BC, BT)
    dy_TC = load(dy, dy_row, t, c, inside)
    gate_TC = load(gate, gate_row, t, c, inside)
    open_TC = tl.sigmoid(gate_TC)
    slope_TC = open_TC * (1.0 + gate_TC * (1.0 - open_TC))
    store(dgate, dy_TC * slope_TC * load(up, up_row, t, c, inside), t, c, inside, C)
    store(dup, dy_TC * gate_TC * open_TC, t, c, inside, C)


@triton.jit(do_not_specialize=["tokens"])
def log_sigmoid(x, y, tokens, x_row, scale, C: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr):
    t, c, inside = tile(tokens, C, BC, BT)
    store(y, -softplus(-load(x, x_row, t, c, inside)) * scale, t, c, inside, C)


@triton.jit(do_not_specialize=["tokens"])
def log_sigmoid_backward(
    dy, x, dx, tokens, dy_row, x_row, scale, C: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr
):
    t, c, inside = tile(tokens, C, BC, BT)
    slope_TC = tl.sigmoid(-load(x, x_row, t, c, inside)) * scale
    store(dx, load(dy, dy_row, t, c, inside) * slope_TC, t, c, inside, C)
