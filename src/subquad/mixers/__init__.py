"""Published layers, one file each: projections, gates and norms around one call of the engine."""

from subquad.mixers.attention import SlidingWindowAttention, SoftmaxAttention
from subquad.mixers.base import Mixer, State
from subquad.mixers.deltanet import DeltaNet
from subquad.mixers.gated_deltanet import GatedDeltaNet
from subquad.mixers.gla import GLA
from subquad.mixers.linear_attention import LinearAttention
from subquad.mixers.mamba import Mamba
from subquad.mixers.mamba2 import Mamba2
from subquad.mixers.retnet import RetNet

_CLASSES: tuple[type[Mixer], ...] = (
    SoftmaxAttention,
    SlidingWindowAttention,
    LinearAttention,
    RetNet,
    GLA,
    Mamba,
    Mamba2,
    DeltaNet,
    GatedDeltaNet,
)

MIXERS: dict[str, type[Mixer]] = {cls.row: cls for cls in _CLASSES}
"""The mixers by the name of their row in the table."""

__all__ = [
    "GLA",
    "MIXERS",
    "DeltaNet",
    "GatedDeltaNet",
    "LinearAttention",
    "Mamba",
    "Mamba2",
    "Mixer",
    "RetNet",
    "SlidingWindowAttention",
    "SoftmaxAttention",
    "State",
]
