"""Published layers, one file each: projections, gates and norms around a call of an engine.

Beside them what a layer of your own is built from; docs/add-a-row.md shows how. Each is imported
when it is first asked for.
"""

import importlib
from typing import Any

from subquad.mixers.base import Mixer, State
from subquad.mixers.registry import MIXERS, PLACES, register

_MIXERS = {cls: module for module, cls in (place.split(":") for place in PLACES.values())}

# What mixers are built from: the public name, and where it is defined.
_PARTS = {
    "RMSNorm": "subquad.layers.norms",
    "NormThenGate": "subquad.layers.norms",
    "GateThenNorm": "subquad.layers.norms",
    "ShortConvolution": "subquad.layers.short_convolution",
    "no_weight_decay": "subquad.layers.initialization",
    "set_": "subquad.layers.initialization",
    "set_step_size_": "subquad.layers.initialization",
    "project": "subquad.layers.projection",
    "positions": "subquad.layers.rotary",
    "l2_norm": "subquad.engines.norm.api",
    "divide": "subquad.mixers.base",
}

__all__ = ["MIXERS", "Mixer", "State", "register", *_MIXERS, *_PARTS]


def __getattr__(name: str) -> Any:
    if name in _MIXERS:
        module = f"subquad.mixers.{_MIXERS[name]}"
    elif name in _PARTS:
        module = _PARTS[name]
    else:
        raise AttributeError(f"module 'subquad.mixers' has no attribute {name!r}; it has {__all__}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
