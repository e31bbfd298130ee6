"""Whether compiled CPU code may be called directly, without the dispatcher of a custom operator.

Decoding one token takes microseconds; registering it with autograd would take longer than that.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def can_call_compiled_code(tensors: Iterable[Tensor]) -> bool:
    """True for plain float32 CPU tensors of which nobody records a gradient or a graph."""
    if torch.compiler.is_compiling():
        return False
    grad = torch.is_grad_enabled()
    return all(
        type(t) in (Tensor, torch.nn.Parameter)  # not a fake, functional or wrapped tensor
        and t.dtype == torch.float32
        and t.device.type == "cpu"
        and not (grad and t.requires_grad)
        for t in tensors
    )
