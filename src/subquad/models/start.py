"""Where weights start, and in which precision they stay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from subquad.models.block import Block


def draw_missing(module: Any, depth: int, shrunk: Iterable[str] = ()) -> None:
    """Start a module by its `reset_parameters`, but for what has just been loaded.

    Its projections come here with transformers' standard start, for children are visited first.
    transformers marks each tensor that it loads and makes `torch.nn.init` skip those; a mixer may
    fill parts of a tensor (a view bears no mark), so what was loaded is put back.

    `depth` layers add to one residual, so what a mixer says is shrunk by depth is divided by its
    root (Radford et al. 2019, GPT-2, section 2.3; so do Mamba and Mamba-2).
    """
    tensors = [*module.parameters(), *module.buffers()]
    loaded = [t for t in tensors if getattr(t, "_is_hf_initialized", False)]
    if len(loaded) == len(tensors):
        return
    values = [t.clone() for t in loaded]
    module.reset_parameters()
    for name in shrunk:
        module.get_parameter(name).mul_(depth**-0.5)
    for tensor, value in zip(loaded, values):
        tensor.copy_(value)


def float32_names(blocks: list[Block]) -> set[str]:
    """Patterns of what stays float32 when a model is loaded in half precision.

    They are the parameters that mixers own themselves and not through a projection: decays, time
    steps, skips. Over thousands of steps their rounding would add up.
    """
    parts = [("mixer", block.mixer) for block in blocks] + [("mlp", block.mlp) for block in blocks]
    return {
        rf"{place}\.{name}$"
        for place, module in parts
        if module is not None
        for name, _ in module.named_parameters(recurse=False)
    }
