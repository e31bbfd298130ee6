"""The short causal convolution that modern mixers put before their queries, keys and values."""

import torch
from torch import Tensor, nn

from subquad.engines.convolution.api import short_convolution
from subquad.layers.initialization import no_weight_decay
from subquad.layers.traceable import traceable


@traceable
class ShortConvolution(nn.Module):
    """A depthwise causal convolution over time, then silu.

    Args:
        channels: D, each with a filter of its own.
        width: W, the taps, the current token's the last.
        bias: whether to add one number to each channel.
    """

    def __init__(self, channels: int, width: int = 4, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = no_weight_decay(nn.Parameter(torch.empty(channels))) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The standard start of a depthwise convolution: uniform within W^-1/2."""
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(
        self, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """x [B,T,D], state [B,W-1,D] or None -> y [B,T,D], next state."""
        return short_convolution(x, self.weight, self.bias, "silu", state, cu_seqlens)
