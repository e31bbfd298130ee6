"""One block of the stack: a mixer over time and, for rows that need it, an MLP over channels."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from subquad.mixers import MIXERS
from subquad.mixers.base import State
from subquad.mixers.init import no_weight_decay
from subquad.mixers.norms import RMSNorm
from subquad.mixers.projection import project
from subquad.models.config import SubquadConfig
from subquad.recurrence.activation import silu_product


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): Shazeer 2020, "GLU Variants Improve Transformer", eq. 6."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return project(self.down, silu_product(project(self.gate, x), project(self.up, x)))


class Block(GradientCheckpointingLayer):
    """x + mixer(norm(x)), then x + mlp(norm(x)); the sum keeps the dtype that `x` came in."""

    def __init__(self, config: SubquadConfig, row: str) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.mixer_norm = RMSNorm(hidden, eps=config.norm_eps)
        self.mixer = MIXERS[row](hidden, **config.mixer_kwargs(row))
        size = config.mlp_size(row)
        self.mlp_norm = RMSNorm(hidden, eps=config.norm_eps) if size else None
        self.mlp = SwiGLU(hidden, size) if size else None
        marked = (n for n, p in self.named_parameters() if getattr(p, "_no_weight_decay", False))
        self.undecayed = tuple(marked)

    def mark_undecayed(self) -> None:
        """Mark again what no optimiser should decay: parameters come unmarked from a checkpoint."""
        for name in self.undecayed:
            no_weight_decay(self.get_parameter(name))

    # Tensors come positionally: checkpointing (`use_reentrant`) tracks no gradient of keywords.
    def forward(
        self, x: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """x [B,T,hidden] -> the same, and the mixer's state after the last token."""
        mixed, state = self.mixer(normed(self.mixer_norm, x), state, cu_seqlens=cu_seqlens)
        x = x + mixed
        if self.mlp is not None and self.mlp_norm is not None:
            x = x + self.mlp(normed(self.mlp_norm, x))
        return x, state


def normed(norm: RMSNorm, x: Tensor) -> Tensor:
    """The norm of a residual that may be wider (float32) than the weights (bfloat16), in theirs."""
    dtype = norm.weight.dtype
    if x.dtype != dtype and type(norm) is RMSNorm:
        return norm(x, dtype)  # rounds what it returns, not what it reads, where it can
    return norm(x.to(dtype))
