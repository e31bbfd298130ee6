"""The engines take part in `__torch_function__`, so that modes and subclasses see them called."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch.overrides import handle_torch_function, has_torch_function

P = ParamSpec("P")
R = TypeVar("R")


def overridable(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, but a `TorchFunctionMode` or a tensor's `__torch_function__` comes first.

    They are shown one call of an engine, not the dozens of operations within.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        given = (*args, *kwargs.values())
        if has_torch_function(given):
            result: R = handle_torch_function(call, given, *args, **kwargs)
            return result
        return function(*args, **kwargs)

    return call
