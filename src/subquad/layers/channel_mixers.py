"""What mixes channels beside a mixer, by the name that a `BlockLayout` gives."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.engines.gates.api import silu_product
from subquad.layers.depth import Depth
from subquad.layers.initialization import no_weight_decay, set_
from subquad.layers.projection import project
from subquad.layers.token_shift import token_shift
from subquad.layers.traceable import traceable


class ChannelMixer(nn.Module):
    """From [B,T,hidden] to the same, token by token.

    One that needs to remember names its state's tensors; its `forward` then takes (x, state,
    cu_seqlens), a dict of them or {}, and returns (y, next state), as a mixer's does.
    """

    state_names: ClassVar[tuple[str, ...]] = ()
    starts_itself: ClassVar[bool] = False  # by `reset_parameters`, not as transformers starts it
    takes_depth: ClassVar[bool] = False  # whether its constructor takes a keyword `depth`

    @staticmethod
    def default_size(hidden_size: int) -> int:
        """Inner channels where a configuration names none."""
        return 4 * hidden_size


@traceable
class SwiGLU(ChannelMixer):
    """down(silu(gate(x)) * up(x)): Shazeer 2020, "GLU Variants Improve Transformer", eq. 6."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    @staticmethod
    def default_size(hidden_size: int) -> int:
        """8/3 of hidden_size, rounded up to a multiple of 32: the weights of 4 without a gate."""
        return -(-8 * hidden_size // (3 * 32)) * 32

    def forward(self, x: Tensor) -> Tensor:
        return project(self.down, silu_product(project(self.gate, x), project(self.up, x)))


@traceable
class GELU(ChannelMixer):
    """down(gelu(up(x))), with biases: Hendrycks and Gimpel 2016, as in GPT-2."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, intermediate_size)
        self.down = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return project(self.down, F.gelu(project(self.up, x)))


@traceable
class RWKV7ChannelMix(ChannelMixer):
    """V relu(K (x + (x_{t-1} - x) * mix))^2: Peng et al. 2025, RWKV-7 (arXiv:2503.14456, eq. 23).

    State: shift [B,1,hidden].
    """

    state_names = ("shift",)
    starts_itself = True
    takes_depth = True

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, depth: Depth | None = None
    ) -> None:
        super().__init__()
        self.depth = depth or Depth(0, 1)
        self.mix = no_weight_decay(nn.Parameter(torch.empty(hidden_size)))
        self.up = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the paper's training code: mixes by channel and depth, no output at first."""
        C = self.mix.shape[0]
        remaining = 1 - self.depth.index / self.depth.total
        set_(self.mix, 1 - (torch.arange(C) / C) ** remaining**4)
        nn.init.uniform_(self.up.weight, -0.5 * C**-0.5, 0.5 * C**-0.5)
        nn.init.zeros_(self.down.weight)

    def forward(
        self, x: Tensor, state: dict[str, Tensor], cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        before, shift = token_shift(x, state.get("shift"), cu_seqlens)
        mixed = torch.addcmul(x, before - x, self.mix.to(x.dtype))
        return project(self.down, F.relu(project(self.up, mixed)).square()), {"shift": shift}


CHANNEL_MIXERS: dict[str, type[ChannelMixer]] = {
    "swiglu": SwiGLU,
    "gelu": GELU,
    "rwkv7": RWKV7ChannelMix,
}
