"""A projection as a module, computed by the engines unless it is hooked, wrapped or replaced."""

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules

from subquad.engines.projection.api import linear

_FORWARD = nn.Linear.forward


def project(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`, by `linear` if it is a plain projection: not replaced, hooked or wrapped."""
    if (
        torch.compiler.is_compiling()
        or type(module) is not nn.Linear
        or nn.Linear.forward is not _FORWARD
        or not _has_plain_tensors(module)
        or is_watched(module)
        or is_every_module_watched()
    ):
        y: Tensor = module(x)
        return y
    return linear(x, module.weight, module.bias)


def _has_plain_tensors(module: nn.Linear) -> bool:
    """Not weights that bring operations of their own, as quantised ones do."""
    bias = module.bias
    return type(module.weight) is nn.Parameter and (bias is None or type(bias) is nn.Parameter)


def is_watched(module: nn.Module) -> bool:
    """Whether the module has hooks, or something else is called in its place."""
    own = vars(module)
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or "_compiled_call_impl" in own  # module.compile()
    )


def is_every_module_watched() -> bool:
    """By hooks on all modules, as `torch.nn.modules.module.register_module_forward_hook` sets."""
    return bool(
        modules._global_forward_hooks
        or modules._global_forward_pre_hooks
        or modules._global_backward_hooks
        or modules._global_backward_pre_hooks
    )
