"""What modules are like: whether a trace or a captured graph of theirs still computes what they do.

One rule for both devices. A token that is replayed reads weights by address and runs no Python, so
whatever would let the modules compute something else must be noticed before it: other members,
hooks, settings, classes, code, and tensors that lie elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import Enum
from functools import partial
from itertools import chain
from operator import attrgetter, is_not
from types import BuiltinFunctionType, FunctionType, MethodType, NoneType

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from subquad.layers.projection import is_every_module_watched

_MEMBERS = ("_modules", "_parameters")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_OF_ANY_MODULE = vars(nn.Module()).keys()
_CODE = (FunctionType, BuiltinFunctionType, MethodType, partial)
_DTYPE = attrgetter("dtype")


class Fingerprint:
    """Of modules whose computation is to be replayed.

    The CPU asks before every token. So what is there is laid out flat once, for quick passes that
    touch few objects: weights have driven all of them out of the caches.

    Args:
        replayed: of these, and all in them, everything counts; of the other modules, which are
            called as they are, only what could let them be replayed.
        roots: what `changed` will be given again; all modules are in them.
        outer: a module whose own hooks run around what is replayed, and so do not count.
    """

    def __init__(
        self, replayed: Iterable[nn.Module], *roots: nn.Module, outer: nn.Module | None = None
    ) -> None:
        self._roots = roots
        self._modules = [m for root in roots for m in root.modules()]
        inside = dict.fromkeys(m for root in replayed for m in root.modules())
        plain = [m for m in inside if has_plain_settings(m)]
        self._rich = [m for m in inside if not has_plain_settings(m)]
        classes = dict.fromkeys(
            c for m in inside for c in type(m).__mro__ if c not in nn.Module.__mro__
        )
        dicts = [vars(m)[name] for m in self._modules for name in _MEMBERS]
        dicts += [vars(m)[name] for m in self._modules if m is not outer for name in _HOOKS]
        dicts += [vars(m) for m in plain]
        dicts += [m._buffers for m in inside]
        # Views, not copies: they show what is there whenever they are asked.
        self._empty = [d for d in dicts if not d]
        self._values = [d.values() for d in dicts if d]
        self._values += [vars(c).values() for c in classes]
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
            list(map(Tensor.stride, self._tensors)),
            list(map(_DTYPE, self._tensors)),
            [list(_rich_settings(m)) for m in self._rich],
        )


def has_plain_settings(module: nn.Module) -> bool:
    """Whether none can change without being replaced: of a list, for instance, its content can."""
    return all(is_value(x) for name, x in vars(module).items() if name not in _OF_ANY_MODULE)


def runs_hooks(model: nn.Module) -> bool:
    """Whether modules inside it have hooks: they run Python, which a replayed step would leave
    out. (The model's own run outside the step.)"""
    inside = list(model.modules())[1:]
    return is_every_module_watched() or any(
        m._forward_hooks or m._forward_pre_hooks for m in inside
    )


def lies_somewhere(x: Tensor) -> bool:
    """Not what only looks like a tensor: of those it is seen when they are replaced."""
    return type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided


def is_value(x: object) -> bool:
    """Whether it can only be replaced, not changed, so that its identity is all there is to it."""
    if isinstance(x, tuple):
        return all(map(is_value, x))
    settings = getattr(type(x), "__dataclass_params__", None)
    if settings is not None and settings.frozen and not isinstance(x, type):
        return all(map(is_value, vars(x).values()))
    return isinstance(x, _VALUES)


_VALUES = (
    *(NoneType, bool, int, float, complex, str, bytes, Enum, type),
    *(FunctionType, BuiltinFunctionType, partial),
    *(torch.dtype, torch.device, torch.layout),
)


def _rich_settings(module: nn.Module) -> Iterator[tuple[str, object]]:
    """Settings by content: code, plain values and containers of them, a model's configuration.

    Other objects (a cache, a tensor that somebody keeps) are not settings and may change.
    """
    own = vars(module)
    settings = {name: x for name, x in own.items() if name not in _OF_ANY_MODULE}
    settings["training"] = module.training
    config = own.get("config")
    if isinstance(config, PreTrainedConfig):  # some of it is read at each step
        settings |= vars(config)
    for name, x in settings.items():
        if isinstance(x, _CODE):
            yield name, x
        elif _is_plain(x):
            yield name, repr(x)


_SETTINGS = (bool, int, float, complex, str, bytes, Enum, torch.dtype, torch.device)


def _is_plain(x: object) -> bool:
    if isinstance(x, dict):
        x = [*x, *x.values()]
    if isinstance(x, (tuple, list, set)):
        return all(map(_is_plain, x))
    return x is None or isinstance(x, _SETTINGS)
