"""RWKV starts with outputs of zero, behind which a test would see nothing of a layer."""

import torch
from torch import nn


@torch.no_grad()
def awake(module: nn.Module) -> nn.Module:
    """The module, its zero matrices filled."""
    for parameter in module.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return module
