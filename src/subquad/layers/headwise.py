"""A projection in small blocks: each group of channels by a matrix of its own."""

import torch
from torch import Tensor, nn

from subquad.errors import fail
from subquad.layers.traceable import traceable


@traceable
class HeadwiseLinear(nn.Module):
    """y = W_b x_b for each block b of the channels; weight [channels/size,size,size] (out, in)."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        if channels % size:
            raise fail("qkv_block_size", size, f"a divisor of {channels} channels", "change it")
        self.weight = nn.Parameter(torch.empty(channels // size, size, size))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """x [...,channels] -> the same."""
        blocks, size, _ = self.weight.shape
        x = x.unflatten(-1, (blocks, 1, size))
        # A sum of products, not a matrix product: these are tiny, and there are many.
        return (x * self.weight.to(x.dtype)).sum(-1).flatten(-2)
