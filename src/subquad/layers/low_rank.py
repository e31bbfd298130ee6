"""A projection through few channels: how RWKV, GLA and KDA make gates from tokens."""

import torch
from torch import Tensor, nn

from subquad.layers.initialization import no_weight_decay, set_
from subquad.layers.projection import project
from subquad.layers.traceable import traceable


@traceable
class LowRankProjection(nn.Module):
    """bias + W2 f(W1 x), f the identity, tanh or sigmoid.

    Args:
        inputs, rank, outputs: channels on the way.
        activation: None, "tanh" or "sigmoid".
        bias: whether there is one.
    """

    def __init__(
        self,
        inputs: int,
        rank: int,
        outputs: int,
        activation: str | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)
        self.bias = no_weight_decay(nn.Parameter(torch.zeros(outputs))) if bias else None

    def reset(self, bias: Tensor | None) -> None:
        """RWKV's start: constant at first, since W1 is zero; W2 orthogonal and small."""
        nn.init.zeros_(self.down.weight)
        rows, columns = self.up.weight.T.shape
        gain = 0.1 * (max(1.0, rows / columns)) ** 0.5
        if not self.up.weight.is_meta:
            nn.init.orthogonal_(self.up.weight.T, gain)
        if bias is not None and self.bias is not None:
            set_(self.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [...,inputs] -> [...,outputs]."""
        x = project(self.down, x)
        if self.activation == "tanh":
            x = x.tanh()
        elif self.activation == "sigmoid":
            x = x.sigmoid()
        y = project(self.up, x)
        return y if self.bias is None else y + self.bias.to(y.dtype)
