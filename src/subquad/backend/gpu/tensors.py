"""What launchers of Triton kernels share: whether they can run these tensors, how those lie."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def reason_to_decline(*tensors: Tensor | None) -> str | None:
    """None if Triton kernels can take these tensors (or None for an absent one), else why not."""
    for t in tensors:
        if t is not None and not t.is_cuda:
            return f"the Triton kernels need CUDA tensors, and these are on {t.device}"
        if t is not None and t.dtype not in DTYPES:
            return f"a tensor is {t.dtype}; the Triton kernels take bfloat16, float16, float32"
    return triton_missing()


@lru_cache(maxsize=1)
def triton_missing() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError:
        return "Triton is not installed"
    return None


def rows(x: Tensor, axes: int = 1) -> tuple[Tensor, int]:
    """x [tokens.., channels..], its last `axes` the channels, and the stride between two tokens.

    A copy of x if a token's channels are apart, or if no one stride leads through all tokens. Not a
    view of two axes: making one takes the host as long as everything else that is done for x.
    """
    sizes, strides = x.shape, x.stride()
    channels = math.prod(sizes[-axes:])
    token = _one_stride(sizes[:-axes], strides[:-axes], channels)
    if token is not None and _one_stride(sizes[-axes:], strides[-axes:], 1) == 1:
        return x, token
    return x.clone(memory_format=torch.contiguous_format), channels


def _one_stride(sizes: Sequence[int], strides: Sequence[int], alone: int) -> int | None:
    """The stride that leads through axes as through one, `alone` for a lone place, None if none."""
    found, reach = alone, None
    for size, stride in zip(reversed(sizes), reversed(strides)):
        if size != 1:
            if reach is None:
                found = stride
            elif stride != reach:
                return None
            reach = max(size, 1) * stride
    return found


def head_tiles(heads: int, size: int, tile: int) -> dict[str, int]:
    """Sizes of a kernel whose programs own one head of several tokens, `tile` numbers in all."""
    width = 1 << (size - 1).bit_length()
    return {"H": heads, "P": size, "BP": width, "BT": min(128, max(1, tile // width))}
