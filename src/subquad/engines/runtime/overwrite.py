"""When GPU kernels may be called, and when they may write the next state over the one given.

The kernels are custom operators: autograd in reverse, tracing and compilation know them, forward
differentiation and vmap do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from subquad.engines.runtime.eager import can_call_operators

# Where the states lie that may be written over; None: wherever they lie.
_NOWHERE: frozenset[int] = frozenset()
_OVERWRITE: ContextVar[frozenset[int] | None] = ContextVar("overwrite", default=_NOWHERE)


@contextmanager
def overwriting_states(only: Iterable[Tensor] | None = None) -> Iterator[None]:
    """Within, one-token calls on a GPU may write the next state over the one they are given.

    For a caller that owns the states and reads none but the last: a loop that decodes. It saves
    half of a step's memory traffic, and states keep their addresses, as a captured CUDA graph
    needs. An engine that overwrote a state returns it, the same object; others return a new one.

    Args:
        only: the states that may be written over; None for any.
    """
    places = None if only is None else frozenset(state.data_ptr() for state in only)
    token = _OVERWRITE.set(places)
    try:
        yield
    finally:
        _OVERWRITE.reset(token)


def may_overwrite(state: Tensor | None) -> bool:
    """Whether a kernel may write over this state, here and now."""
    if torch.compiler.is_compiling() or state is None:
        return False
    places = _OVERWRITE.get()
    if places == _NOWHERE:  # nor is it asked where a fake tensor lies
        return False
    return (places is None or state.data_ptr() in places) and state.is_contiguous()


def can_call_kernels(tensors: Iterable[Tensor | None]) -> bool:
    """True for CUDA tensors outside forward differentiation and functorch's transforms."""
    return can_call_operators() and all(t is None or t.is_cuda for t in tensors)


def records_gradient(tensors: Iterable[Tensor | None]) -> bool:
    """Whether autograd will want a backward pass through a call with these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
