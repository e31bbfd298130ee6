"""A fingerprint of modules: whether anything about them has changed between two tokens."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from functools import partial
from itertools import chain
from operator import attrgetter, is_not
from types import BuiltinFunctionType, FunctionType, MethodType, NoneType

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from subquad.layers.projection import is_every_module_watched

_SHOWN = ("_modules", "_parameters", "_forward_hooks", "_forward_pre_hooks")
_DTYPE = attrgetter("dtype")


class Look:
    """At modules: their members, hooks, settings, classes, and where their tensors lie.

    Everything is looked at with every token, so it is laid out flat once, for quick passes that
    touch few objects: weights have driven all of them out of the caches.

    Args:
        traced: of these, and all in them, whatever could change what they compute is looked at; of
            the others, which may change themselves at every call, what would let them be traced.
        roots: what `changed` will be given again; all modules are in them.
    """

    def __init__(self, traced: Iterable[nn.Module], *roots: nn.Module) -> None:
        self._roots = roots
        self._modules = [m for root in roots for m in root.modules()]
        inside = dict.fromkeys(m for root in traced for m in root.modules())
        owns = list(map(vars, self._modules))
        shown = [own[name] for own in owns for name in _SHOWN]
        settings = [own for m in inside for own in (vars(m), m._buffers)]
        classes = dict.fromkeys(
            c for m in inside for c in type(m).__mro__ if c not in nn.Module.__mro__
        )
        # Views, not copies: they show what is there at each look.
        dicts = [*shown, *settings, *map(vars, classes)]
        self._empty = [d for d in dicts if not d]
        self._values = [d.values() for d in dicts if d]
        self._kept = list(chain.from_iterable(self._values))  # so that no other gets their identity
        self._others = [vars(m) for m in self._modules if m not in inside]
        tensors: list[Tensor] = [p for root in roots for p in root.parameters()]
        tensors += [b for m in inside for b in m._buffers.values() if b is not None]
        self._tensors = [t for t in tensors if lies_somewhere(t)]
        self._seen = self._see()

    def changed(self, *roots: nn.Module) -> bool:
        """Whether anything has."""
        if any(map(is_not, roots, self._roots)) or any(self._empty):
            return True
        values = list(chain.from_iterable(self._values))
        if len(values) != len(self._kept) or any(map(is_not, values, self._kept)):
            return True
        return self._see() != self._seen

    def _see(self) -> tuple[list[object], ...]:
        return (
            list(map(type, self._modules)),
            ["forward" in own or "_compiled_call_impl" in own for own in self._others],
            list(map(Tensor.data_ptr, self._tensors)),
            list(map(Tensor.size, self._tensors)),
            list(map(Tensor.is_contiguous, self._tensors)),
            list(map(_DTYPE, self._tensors)),
        )


def lies_somewhere(x: Tensor) -> bool:
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


def shown(model: nn.Module) -> list[object] | None:
    """What a step computes beside weights and states, as far as modules show it.

    An adapter that is switched off, say, has its weights where they were. None where a module has
    hooks: they run Python, which a replayed step would leave out. (The model's own run outside.)
    """
    modules = list(model.modules())
    if any(m._forward_hooks or m._forward_pre_hooks for m in modules[1:]):
        return None
    if is_every_module_watched():
        return None
    classes = dict.fromkeys(chain.from_iterable(type(m).__mro__ for m in modules))
    code = [[f for f in vars(c).values() if isinstance(f, FunctionType)] for c in classes]
    return [code, *map(_look, modules)]


def _look(module: nn.Module) -> tuple[object, ...]:
    own = [(n, x) for n, x in vars(module).items() if n not in _OF_ANY_MODULE]
    code = [id(x) for _, x in own if isinstance(x, _CODE)]
    settings = [pair for pair in own if _is_plain(pair[1])]
    config = vars(module).get("config")
    if isinstance(config, PreTrainedConfig):  # some of it is read at each step
        settings += [pair for pair in vars(config).items() if _is_plain(pair[1])]
    tensors = [_place(t) for t in chain(module._parameters.values(), module._buffers.values())]
    return id(module), type(module), code, repr(settings), tensors


_OF_ANY_MODULE = vars(nn.Module()).keys() - {"training"}
_CODE = (FunctionType, BuiltinFunctionType, MethodType, partial)
_SETTINGS = (bool, int, float, complex, str, bytes, Enum, torch.dtype, torch.device)


def _is_plain(x: object) -> bool:
    if isinstance(x, dict):
        x = [*x, *x.values()]
    if isinstance(x, (tuple, list, set)):
        return all(map(_is_plain, x))
    return x is None or isinstance(x, _SETTINGS)


def _place(x: Tensor | None) -> object:
    """Where a module's tensor lies and how it is read there."""
    if x is None or not lies_somewhere(x):
        return id(x)
    return x.data_ptr(), x.dtype, x.shape, x.stride()
