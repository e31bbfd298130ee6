"""The Triton kernels of the cross-entropy of labels, with logits that are read once each way.

    loss = log(sum_v exp(x_v)) - x_label        dx_v = (softmax(x)_v - [v = label]) dloss

A program of the forward pass walks along the vocabulary with the greatest logit so far and the sum
of exponentials relative to it; both are kept for the backward pass, apart, since the digits of the
sum's logarithm would be lost beside a large logit. Arithmetic is float32.

Shape suffix: V logits of a block.
"""

import triton
import triton.language as tl

from subquad.labels import IGNORE

IGNORED = tl.constexpr(IGNORE)


@triton.jit
def forward(logits, labels, losses, sums, row, V: tl.constexpr, BV: tl.constexpr):
    """sums [rows, 2]: the greatest logit, and the log of the sum of the others relative to it."""
    t = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + t).to(tl.int64)
    asked = label != IGNORED
    logits += t * row
    peak = float("-inf")
    total = 0.0
    for first in range(0, tl.where(asked, V, 0), BV):
        v = first + tl.arange(0, BV)
        x_V = tl.load(logits + v, mask=v < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, tl.max(x_V, 0))
        # Where all so far is -inf, its difference from itself would be no number. Triton's maximum
        # drops what is none, but it stays in the sum.
        origin = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(peak - origin) + tl.sum(tl.exp(x_V - origin), 0)
        peak = higher
    known = (label >= 0) & (label < V)
    own = tl.load(logits + label, mask=known, other=0.0).to(tl.float32)
    rest = tl.where(known, tl.log(total), float("nan"))
    tl.store(losses + t, tl.where(asked, peak - own + rest, 0.0))
    tl.store(sums + 2 * t, peak)
    tl.store(sums + 2 * t + 1, rest)


@triton.jit
def backward(
    dlosses, logits, labels, sums, dlogits, row,
    V: tl.constexpr, BV: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    t = (pid // BLOCKS).to(tl.int64)
    v = (pid % BLOCKS) * BV + tl.arange(0, BV)
    label = tl.load(labels + t).to(tl.int64)
    asked = label != IGNORED
    x_V = tl.load(logits + t * row + v, mask=(v < V) & asked, other=0.0).to(tl.float32)
    share_V = tl.exp(x_V - tl.load(sums + 2 * t) - tl.load(sums + 2 * t + 1))
    share_V -= (v == label).to(tl.float32)
    dx_V = tl.where(asked, share_V * tl.load(dlosses + t), 0.0)
    tl.store(dlogits + t * V + v, dx_V.to(dlogits.dtype.element_ty), mask=v < V)
