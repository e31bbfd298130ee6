"""How a block is put together around a row's mixer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from subquad.errors import choose, fail
from subquad.layers.channel_mixers import CHANNEL_MIXERS
from subquad.layers.norms import LayerNorm, RMSNorm

NORMS = {"rms": RMSNorm, "layer": LayerNorm}
RESIDUALS = ("pre", "post", "normed", "parallel")


@dataclass(frozen=True)
class BlockLayout:
    """Norms, channel mixer and residual of a row's block, as published with it.

    Args:
        norm: "rms" or "layer" (with a bias).
        channel_mixer: one of `CHANNEL_MIXERS`.
        residual: with f the mixer, then the channel mixer,
            "pre"       x + f(norm(x))
            "post"      x + norm(f(x))
            "normed"    alpha n + beta f(n), n = norm(x)
            "parallel"  x + mixer(norm(x)) + channel mixer(its norm(x)), both of the same x
        embed_norm: whether a norm stands between the embedding and the first block.
        alpha, beta: weights of the residual and of f.

    Raises:
        ValueError: a field that is not a choice.
    """

    norm: str = "rms"
    channel_mixer: str = "swiglu"
    residual: str = "pre"
    embed_norm: bool = False
    alpha: float = 1.0
    beta: float = 1.0

    def __post_init__(self) -> None:
        choose("norm", self.norm, tuple(NORMS))
        choose("channel_mixer", self.channel_mixer, tuple(CHANNEL_MIXERS))
        choose("residual", self.residual, RESIDUALS)
        if not isinstance(self.embed_norm, bool):
            raise fail("embed_norm", repr(self.embed_norm), "True or False", "pass a bool")
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise fail(name, repr(value), "a number", "1.0 leaves the sum as it is")

    def make_norm(self, size: int, eps: float) -> nn.Module:
        """A norm of this block."""
        return NORMS[self.norm](size, eps=eps)
