"""Engines choose their own precision: bfloat16 is too coarse for states and decays."""

from __future__ import annotations

from contextlib import nullcontext

import torch


def no_autocast(device_type: str) -> torch.autocast | nullcontext[None]:
    """Within, operations on such devices compute in the dtypes that they are given."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
