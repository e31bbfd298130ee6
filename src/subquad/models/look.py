"""What modules are like, to see between two tokens whether that has changed."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from functools import partial
from itertools import chain
from operator import attrgetter, is_not
from types import BuiltinFunctionType, FunctionType, NoneType

import torch
from torch import Tensor, nn

_MEMBERS = ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")
_DTYPE = attrgetter("dtype")


class Look:
    """At all modules in `roots`: their members, hooks, classes, and where their tensors lie.

    Everything is looked at with every token, so it is laid out flat once, for quick passes.

    Args:
        watched: of these, and all in them, the settings are looked at too.
        roots: what `changed` will be given again.
    """

    def __init__(self, watched: Iterable[nn.Module], *roots: nn.Module) -> None:
        self._roots = roots
        self._modules = [m for root in roots for m in root.modules()]
        self._owns = list(map(vars, self._modules))
        classes = dict.fromkeys(c for m in self._modules for c in type(m).__mro__[:-1])
        settings = [vars(m) for root in watched for m in root.modules()]
        members = [own[name] for own in self._owns for name in _MEMBERS]
        # Views, not copies: they show what is there at each look.
        self._values = [d.values() for d in (*members, *settings, *map(vars, classes))]
        self._kept = list(chain.from_iterable(self._values))  # so that no other gets their identity
        tensors = [t for root in roots for t in (*root.parameters(), *root.buffers())]
        self._tensors = [t for t in tensors if _lies_somewhere(t)]
        self._seen = self._see()

    def changed(self, *roots: nn.Module) -> bool:
        """Whether anything that matters has."""
        if any(map(is_not, roots, self._roots)):
            return True
        values = list(chain.from_iterable(self._values))
        if len(values) != len(self._kept) or any(map(is_not, values, self._kept)):
            return True
        return self._see() != self._seen

    def _see(self) -> tuple[list[object], ...]:
        """A `forward` of a module's own is an entry more in its dictionary."""
        return (
            list(map(len, self._owns)),
            list(map(type, self._modules)),
            list(map(Tensor.data_ptr, self._tensors)),
            list(map(Tensor.size, self._tensors)),
            list(map(Tensor.stride, self._tensors)),
            list(map(_DTYPE, self._tensors)),
        )


def _lies_somewhere(x: Tensor) -> bool:
    """Not what only looks like a tensor: of those it is seen when they are replaced."""
    return type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided


def is_value(x: object) -> bool:
    """Whether it can only be replaced, not changed, so that its identity is all there is to it."""
    if isinstance(x, tuple):
        return all(map(is_value, x))
    return isinstance(x, _VALUES)


_VALUES = (
    *(NoneType, bool, int, float, complex, str, bytes, Enum, type),
    *(FunctionType, BuiltinFunctionType, partial),
    *(torch.dtype, torch.device, torch.layout),
)
