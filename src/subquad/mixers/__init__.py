"""Published layers, one file each: projections, gates and norms around one call of the engine."""

from subquad.mixers.attention import SlidingWindowAttention, SoftmaxAttention
from subquad.mixers.base import Mixer, State
from subquad.mixers.deltanet import DeltaNet
from subquad.mixers.gated_deltanet import GatedDeltaNet
from subquad.mixers.gla import GLA
from subquad.mixers.linear_attention import LinearAttention
from subquad.mixers.mamba import Mamba
from subquad.mixers.mamba2 import Mamba2
from subquad.mixers.registry import MIXERS, register
from subquad.mixers.retnet import RetNet
from subquad.mixers.s4d import S4D

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
    S4D,
)

MIXERS.update({cls.row: cls for cls in _CLASSES})

__all__ = [
    "GLA",
    "MIXERS",
    "S4D",
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
    "register",
]
