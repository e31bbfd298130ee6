"""One block of the stack: a mixer over time and, for rows that need it, an MLP over channels."""

from __future__ import annotations

from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from subquad.layers.initialization import no_weight_decay
from subquad.layers.mlp import SwiGLU
from subquad.layers.norms import RMSNorm, normed
from subquad.layers.traceable import traceable
from subquad.mixers import MIXERS
from subquad.mixers.base import State
from subquad.models.config import SubquadConfig


@traceable
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
