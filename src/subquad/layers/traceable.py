"""Which modules decoding may record: those that compute the same whenever they are the same."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

AnyModule = TypeVar("AnyModule", bound=type[nn.Module])

_TRACEABLE: set[type[nn.Module]] = {nn.Linear}


def traceable(cls: AnyModule) -> AnyModule:
    """Class decorator: what `forward` computes follows from tensors and plain settings alone."""
    _TRACEABLE.add(cls)
    return cls


def is_traceable(module: nn.Module) -> bool:
    """Whether its class was declared so. A subclass was not: it may do something else."""
    return type(module) in _TRACEABLE
