"""A projection as a module, computed by the engines where nobody wants to see it called."""

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from subquad.recurrence.linear import linear


def project(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`, by `linear` if it is a projection that nobody replaced, hooked or wrapped."""
    if torch.compiler.is_compiling() or type(module) is not nn.Linear:
        y: Tensor = module(x)
        return y
    own = vars(module)
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
        return module(x)
    return module(x) if _has_any_global_hook() else linear(x, module.weight, module.bias)
