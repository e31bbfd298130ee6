"""Higher derivatives of compiled operators: those of the same recurrence in plain PyTorch.

A compiled backward pass is itself not differentiable. Where its own gradients will be wanted
(`create_graph=True`: gradient penalties, Hessian-vector products, learning to learn), PyTorch runs
it with gradients enabled, and only then; it then gives way to a form that PyTorch can follow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from subquad.engines.runtime.autocast import no_autocast


def will_be_differentiated() -> bool:
    """Asked in a backward pass: whether gradients of these gradients are wanted."""
    return torch.is_grad_enabled()


def recorded_gradients(
    form: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    gradients: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients with respect to `inputs`, as a part of autograd's graph.

    Args:
        form: from `inputs` to outputs, in operations that PyTorch differentiates any number of
            times.
        inputs: as they came to the operator; None for those that were not given.
        gradients: with respect to each output; None for those that nothing depended on.

    Returns:
        One for each input; None for what needs none, or has no part in those outputs.
    """
    # A view each: a tensor that is given as two arguments has a gradient through either.
    own = [None if x is None else x.view_as(x) for x in inputs]
    # Who asks for them within autocast has the same gradients as who does not differentiate them.
    with no_autocast(next(x for x in own if x is not None).device.type):
        return _recorded(form, own, gradients)


def _recorded(
    form: Callable[..., tuple[Tensor, ...]],
    own: Sequence[Tensor | None],
    gradients: Sequence[Tensor | None],
) -> list[Tensor | None]:
    pairs = zip(form(*own), gradients, strict=True)
    # An operator's outputs all look recorded; of the form's, one may depend on no input that is.
    outputs = [(y, dy) for y, dy in pairs if dy is not None and y.requires_grad]
    needed = [x for x in own if x is not None and x.requires_grad]
    found = iter(
        torch.autograd.grad(
            [output for output, _ in outputs],
            needed,
            [gradient for _, gradient in outputs],
            create_graph=True,
            allow_unused=True,
        )
    )
    return [next(found) if x is not None and x.requires_grad else None for x in own]
