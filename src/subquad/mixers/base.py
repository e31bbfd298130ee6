"""What every mixer is: a module from [B,T,hidden] and a state to [B,T,hidden] and the next state."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from subquad.recurrence.validate import check_cu_seqlens

State = dict[str, Tensor]
"""What a mixer remembers of a sequence: tensors by name, each with the batch's rows (or, when
packed, the sequences) first, so that `{n: t.index_select(0, rows) for n, t in state.items()}`
reorders it and the sum of `nbytes` is its size."""


class Mixer(nn.Module, ABC):
    """A causal sequence mixer.

    Subclasses state their `row` in the table, the names of the tensors in their state, and whether
    they mix channels too (and so need no MLP beside them). Their constructors take `hidden_size`
    and keyword-only options, with the published defaults, and end with `reset_parameters()`.
    """

    row: ClassVar[str]
    state_names: ClassVar[tuple[str, ...]]
    has_channel_mixing: ClassVar[bool] = False

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        if not isinstance(hidden_size, int) or hidden_size < 1:
            raise ValueError(f"hidden_size: got {hidden_size!r}; expected a positive integer")
        self.hidden_size = hidden_size

    @abstractmethod
    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Mix the tokens of `x` and move the state past them.

        Args:
            x: [B,T,hidden_size], T >= 1.
            state: where an earlier call stopped; None is a fresh start. It is never changed, so
                two continuations may start from it. Its rows are the B rows of `x`, or the N
                sequences packed in its only row.
            cu_seqlens: [N+1] int, the bounds of N sequences packed one after another in the only
                row of `x`: 0 first, T last, increasing. Nothing leaks from one into the next.

        Returns:
            y [B,T,hidden_size] and the next state.

        Raises:
            ValueError: naming the argument that does not fit, and how to mend it.
        """

    def reset_parameters(self) -> None:
        """Draw every parameter anew, as published. Here: each child's own standard start."""
        for child in self.children():
            if hasattr(child, "reset_parameters"):
                child.reset_parameters()

    def check_inputs(self, x: Tensor, state: State | None, cu_seqlens: Tensor | None) -> State:
        """Raise ValueError for inputs that do not fit; give the state back, {} for a fresh start."""
        if x.ndim != 3 or x.shape[2] != self.hidden_size or x.shape[1] < 1:
            raise ValueError(
                f"x: got shape {tuple(x.shape)}; expected [B, T, {self.hidden_size}] with T >= 1"
            )
        rows = x.shape[0]
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, x.shape[1], rows)
            rows = cu_seqlens.shape[0] - 1
        if state is None:
            return {}
        if state.keys() != set(self.state_names):
            raise ValueError(
                f"state: got the entries {sorted(state)}; a {type(self).__name__} expects "
                f"{sorted(self.state_names)}; pass what it returned, or None to start afresh"
            )
        for name, tensor in state.items():
            if tensor.shape[0] != rows:
                raise ValueError(
                    f"state[{name!r}]: got {tensor.shape[0]} rows; expected {rows}, one for each "
                    + ("row of x" if cu_seqlens is None else "sequence in cu_seqlens")
                )
        return state


def divide(total: int, parts: int, total_name: str, parts_name: str) -> int:
    """`total / parts`, or a ValueError that names both when it is not a whole number."""
    if parts < 1 or total % parts:
        raise ValueError(
            f"{parts_name}: got {parts}; expected a positive divisor of {total_name} = {total}"
        )
    return total // parts


def set_(parameter: nn.Parameter, value: Tensor) -> None:
    """Fill a parameter that `torch.nn.init` has no formula for.

    While it loads a checkpoint transformers marks what it has loaded and makes `torch.nn.init`
    skip it; whatever is set by other means must look at the mark itself.
    """
    if not getattr(parameter, "_is_hf_initialized", False):
        with torch.no_grad():
            parameter.copy_(value)


def no_weight_decay(parameter: nn.Parameter) -> nn.Parameter:
    """Mark a parameter (a decay, a bias, a skip) that an optimiser should not pull to zero."""
    parameter._no_weight_decay = True  # type: ignore[attr-defined]
    return parameter
