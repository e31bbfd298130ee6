"""Whether compiled CPU code may be called directly, without the dispatcher of a custom operator.

Decoding one token takes microseconds; registering it with autograd would take longer than that.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from subquad.engines.runtime.operator import operations_are_watched

_PLAIN = (Tensor, torch.nn.Parameter)


def can_call_compiled_code(tensors: Iterable[Tensor]) -> bool:
    """True for plain float32 CPU tensors where no gradient and no graph is being recorded.

    Not under another default dtype, which what is made for the results would have.
    """
    tensors = tuple(tensors)
    return (
        all(t.dtype == torch.float32 and t.is_cpu for t in tensors)
        and torch.get_default_dtype() == torch.float32
        and is_plain(tensors)
    )


def is_plain(tensors: Iterable[Tensor]) -> bool:
    """Whether their memory may be read and written behind torch's back.

    Not where a gradient or a graph is recorded, nor for fake, functional or wrapped tensors.
    """
    if torch.compiler.is_compiling() or _is_transformed():
        return False
    grad = torch.is_grad_enabled()
    # A tensor may say of its memory that it holds the negative, as `z.conj().imag` does.
    return all(
        type(t) in _PLAIN and not (grad and t.requires_grad) and not t.is_neg() for t in tensors
    )


def can_call_operators() -> bool:
    """Outside forward differentiation and vmap, of which our custom operators know nothing.

    `torch.compile` sees through both questions, and traces transforms that it finds inside.
    """
    return forward_ad._current_level < 0 and not torch._C._are_functorch_transforms_active()


def _is_transformed() -> bool:
    """Within vmap, jvp, tracing or a mode, which must see every operation."""
    return operations_are_watched() or (
        torch._C._len_torch_function_stack() > 0 and _shows_functions()
    )


def _shows_functions() -> bool:
    """To a function mode. Not to `torch.device`, which only says where new tensors are made.

    An engine whose call a mode was shown runs without that mode.
    """
    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())
