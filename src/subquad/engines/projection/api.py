"""A projection of one token: on the CPU it is bound by reading the weight, and by waking threads.

It stands with the engines because their threads do it: where PyTorch's threads waited for work
beside ours, they would fight for the cores.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.backend.fast_paths import are_fast_paths_on
from subquad.engines.runtime.eager import can_call_compiled_code
from subquad.engines.runtime.overrides import overridable

_WORTH = 1 << 16  # weights: for fewer, PyTorch is as fast


@overridable
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias, as `torch.nn.functional.linear`.

    Args:
        x: [..., K].
        weight: [N,K].
        bias: [N] or None.

    Returns:
        [..., N].
    """
    given = (x, weight) if bias is None else (x, weight, bias)
    worth = (
        are_fast_paths_on()
        and x.is_cpu
        and weight.numel() >= _WORTH
        and _is_one_row(x, weight, bias)
    )
    if worth and not torch.is_autocast_enabled("cpu") and can_call_compiled_code(given):
        # Compiles, and imports numba, when first used.
        from subquad.engines.projection import cpu as linear_cpu

        y: Tensor = linear_cpu.linear(x, weight, bias)
        return y
    return F.linear(x, weight, bias)


def _is_one_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """And shaped as documented: PyTorch knows more, and refuses the rest."""
    if weight.ndim != 2 or x.shape[-1:] != weight.shape[1:] or x.numel() != weight.shape[1]:
        return False
    return bias is None or bias.shape == weight.shape[:1]
