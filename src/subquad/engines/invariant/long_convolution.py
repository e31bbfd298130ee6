"""The causal convolution with a filter as long as the sequence (Hyena, H3, S4, AFT-conv)."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.engines.runtime.autocast import no_autocast
from subquad.engines.runtime.validation import check_shape, check_tensor
from subquad.errors import fail, is_whole


def long_convolution(u: Tensor, kernel: Tensor, last: int | None = None) -> Tensor:
    """y_t = sum_{l <= t} kernel_l u_{t-l}, each channel by itself.

    By FFT of twice the length, so that nothing wraps round into the past: O(T log T). A single
    output is a sum, O(T).

    Args:
        u: [B,T,D], all inputs since the sequence began.
        kernel: [L,D], L >= T; what reaches further back than T is not used.
        last: only the last so many outputs, for a sequence that goes on; None for all.

    Returns:
        [B,last,D] in u's dtype, computed in float32 (float64 for float64 inputs), whatever autocast
        says. Differentiable any number of times.

    Raises:
        ValueError: naming the argument that does not fit, and the fix.
    """
    _, T, D = check_tensor("u", u, 3, "[B,T,D]").shape
    check_tensor("kernel", kernel, 2, "[L,D]", u)
    if kernel.shape[0] < T:
        expected = f"[L,D] with L >= T = {T}"
        raise fail("kernel", f"shape {tuple(kernel.shape)}", expected, "give it every lag")
    check_shape("kernel", kernel, (kernel.shape[0], D), "[L,D] with u's D")
    if last is not None and not (is_whole(last, 1) and last <= T):
        raise fail("last", last, f"1 to T = {T}", "pass None for all outputs")
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    x, h = u.to(dtype), kernel[:T].to(dtype)
    with no_autocast(u.device.type):
        if last == 1:
            return (x.flip(1) * h).sum(1, keepdim=True).to(u.dtype)
        length = 1 << (2 * T - 1).bit_length()
        spectrum = torch.fft.rfft(x, length, dim=1) * torch.fft.rfft(h, length, dim=0)
        y: Tensor = torch.fft.irfft(spectrum, length, dim=1)[:, :T]
    return y[:, T - (last or T) :].to(u.dtype)
