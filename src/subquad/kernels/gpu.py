"""What launchers of Triton kernels share: whether they can run these tensors, how those lie."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def reason_to_decline(*tensors: Tensor | None) -> str | None:
    """None if Triton kernels can take these tensors (or None for an absent one), else why not."""
    given = [t for t in tensors if t is not None]
    device = next((t.device for t in given if not t.is_cuda), None)
    if device is not None:
        return f"the Triton kernels need CUDA tensors, and these are on {device}"
    dtype = next((t.dtype for t in given if t.dtype not in DTYPES), None)
    if dtype is not None:
        return f"a tensor is {dtype}; the Triton kernels take bfloat16, float16, float32"
    return triton_missing()


@lru_cache(maxsize=1)
def triton_missing() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError:
        return "Triton is not installed"
    return None


def rows(x: Tensor) -> Tensor:
    """[..., D] as [tokens, D] with adjacent channels: a view where its layout allows it."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.reshape(-1, x.shape[-1])


def head_tiles(heads: int, size: int, tile: int) -> dict[str, int]:
    """Sizes of a kernel whose programs own one head of several tokens, `tile` numbers in all."""
    width = 1 << (size - 1).bit_length()
    return {"H": heads, "P": size, "BP": width, "BT": min(128, max(1, tile // width))}
