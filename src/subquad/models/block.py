"""One block of the stack: a mixer over time and, for rows that need it, one over channels."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from subquad.layers.channel_mixers import CHANNEL_MIXERS
from subquad.layers.initialization import no_weight_decay
from subquad.layers.norms import normed
from subquad.layers.traceable import traceable
from subquad.mixers.base import Depth, State
from subquad.models.config import SubquadConfig

CHANNELS = "mlp."  # before the names of a channel mixer's tensors in a block's state


@traceable
class Block(GradientCheckpointingLayer):
    """A mixer and a channel mixer, each with its norm, around one residual.

    How they are put together is the row's `layout`, overridden by the configuration's `block`. The
    sum keeps the dtype that x came in.
    """

    def __init__(self, config: SubquadConfig, index: int) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.layout = config.layout(index)
        self.mixer_norm = self.layout.make_norm(hidden, config.norm_eps)
        depth = Depth(index, config.num_hidden_layers)
        self.mixer = config.make_mixer(index)
        size = config.mlp_size(index)
        self.mlp_norm = self.layout.make_norm(hidden, config.norm_eps) if size else None
        cls = CHANNEL_MIXERS[self.layout.channel_mixer]
        options: dict[str, Any] = {"depth": depth} if cls.takes_depth else {}
        self.mlp = cls(hidden, size, **options) if size else None
        marked = (n for n, p in self.named_parameters() if getattr(p, "_no_weight_decay", False))
        self.undecayed = tuple(marked)

    def mark_undecayed(self) -> None:
        """Mark again what no optimiser should decay: parameters come unmarked from a checkpoint."""
        for name in self.undecayed:
            no_weight_decay(self.get_parameter(name))

    # Tensors come positionally: checkpointing (`use_reentrant`) tracks no gradient of keywords.
    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        cu_seqlens: Tensor | None = None,
        carried: dict[str, Tensor] | None = None,
        shared: nn.Module | None = None,
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        """The block's output and next state, and what layers carry to later ones.

        Args:
            x: [B,T,hidden].
            state: the mixer's, and the channel mixer's under "mlp.*"; None for a fresh start.
            cu_seqlens: the bounds of packed sequences, as a mixer's.
            carried: from earlier layers; it is not changed.
            shared: what the row's layers share, if anything.
        """
        layout, carried = self.layout, dict(carried or {})
        own, of_channels = _split(state)
        n = normed(self.mixer_norm, x) if layout.residual != "post" else _cast(self.mixer_norm, x)
        options: dict[str, Any] = {"cu_seqlens": cu_seqlens}
        if self.mixer.carries:
            options["carried"] = carried
        if shared is not None:
            options["shared"] = shared
        mixed, new = self.mixer(n, own, **options)
        if self.mlp is None or self.mlp_norm is None:
            return self._join(self.mixer_norm, x, n, mixed), new, carried
        if layout.residual != "parallel":
            x = self._join(self.mixer_norm, x, n, mixed)
        n = normed(self.mlp_norm, x) if layout.residual != "post" else _cast(self.mlp_norm, x)
        if self.mlp.state_names:
            y, after = self.mlp(n, of_channels, cu_seqlens)
            new = new | {CHANNELS + name: tensor for name, tensor in after.items()}
        else:
            y = self.mlp(n)
        if layout.residual == "parallel":
            return x + mixed + y, new, carried
        return self._join(self.mlp_norm, x, n, y), new, carried

    def _join(self, norm: nn.Module, x: Tensor, n: Tensor, y: Tensor) -> Tensor:
        """The residual after f gave y of n."""
        layout = self.layout
        if layout.residual == "post":
            y = normed(norm, y)
        kept = n.to(x.dtype) if layout.residual == "normed" else x
        if (layout.alpha, layout.beta) != (1.0, 1.0):
            kept, y = layout.alpha * kept, layout.beta * y
        return kept + y


def _cast(norm: nn.Module, x: Tensor) -> Tensor:
    """x in the weights' dtype, where no norm stands before f."""
    return x.to(norm.weight.dtype)  # type: ignore[union-attr, arg-type]


def _split(state: State | None) -> tuple[State | None, State]:
    """The mixer's state and the channel mixer's."""
    if state is None:
        return None, {}
    of_channels = {n[len(CHANNELS) :]: t for n, t in state.items() if n.startswith(CHANNELS)}
    if not of_channels:
        return state, {}
    return {n: t for n, t in state.items() if not n.startswith(CHANNELS)}, of_channels
