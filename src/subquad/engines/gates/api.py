"""What gates do to each number: a gated product, and how much a key channel forgets.

They stand with the engines because on a GPU they are bound by memory, and one kernel each way
reads and writes each number once; in PyTorch these are two and three operations, each with results
that are written, kept and read again. The GPU kernels have first derivatives only.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from subquad.engines.runtime.eager import can_call_operators


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, element by element; on a GPU in float32, and rounded once."""
    if gate.is_cuda and gate.shape == up.shape and _has_kernel(gate, up):
        from subquad.engines.gates import gpu as activation

        y: Tensor = activation.silu_product(gate, up)
        return y
    return F.silu(gate) * up


def log_sigmoid(x: Tensor, temperature: float = 1.0) -> Tensor:
    """log(sigmoid(x)) / temperature, float32 or wider: the log decay of a gate sigmoid(x).

    Far below 0 that is x / temperature, not -inf.

    Args:
        x: raw gates, any shape.
        temperature: larger forgets more slowly; GLA's is 16.
    """
    if x.is_cuda and _has_kernel(x):
        from subquad.engines.gates import gpu as activation

        y: Tensor = activation.log_sigmoid(x, 1.0 / temperature)
        return y
    return F.logsigmoid(x if x.dtype.itemsize >= 4 else x.float()) / temperature


def _has_kernel(x: Tensor, *others: Tensor) -> bool:
    from subquad.backend.gpu import tensors as gpu

    fits = x.ndim > 0 and x.shape[-1] > 0 and can_call_operators()
    return fits and gpu.reason_to_decline(x, *others) is None
