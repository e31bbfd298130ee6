"""subquad: linear-time rivals of the Transformer, each a row of one table.

    import subquad

    o, state = subquad.linear_recurrence(q, k, v, log_decay=g, erase=subquad.Delta(beta))
    y, state = subquad.mixers.GatedDeltaNet(hidden_size=1024, num_heads=8)(x)
    model = subquad.SubquadForCausalLM(subquad.SubquadConfig(mixer="gated_deltanet"))

Names are imported when first used, so `import subquad` costs no more than `import torch`.
"""

import importlib
from typing import Any

from subquad.registration import register_when_asked

__version__ = "0.1.0"

# Public name -> the module that defines it. A submodule stands for itself.
_EXPORTS = {
    "linear_recurrence": "subquad.engines",
    "normalised_recurrence": "subquad.engines",
    "Delta": "subquad.engines",
    "LowRank": "subquad.engines",
    "Recurrence": "subquad.table",
    "explain": "subquad.engines",
    "watch": "subquad.engines",
    "selective_scan": "subquad.engines",
    "diagonal_ssm": "subquad.engines",
    "short_convolution": "subquad.engines",
    "long_convolution": "subquad.engines",
    "stabilise": "subquad.engines",
    "ROWS": "subquad.table",
    "Row": "subquad.table",
    "fast_paths": "subquad.backend.fast_paths",
    "checks": "subquad.backend.checks",
    "SubquadCache": "subquad.models",
    "SubquadConfig": "subquad.models",
    "SubquadForCausalLM": "subquad.models",
    "SubquadModel": "subquad.models",
}
_SUBMODULES = ("engines", "ssm", "mixers", "models", "tasks", "train", "generate", "arena")

__all__ = ["__version__", *_EXPORTS, *_SUBMODULES]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"subquad.{name}")
    else:
        raise AttributeError(f"module 'subquad' has no attribute {name!r}; it has {__all__}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


register_when_asked()
