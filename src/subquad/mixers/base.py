"""What every mixer is: from [B,T,hidden] and a state to [B,T,hidden] and the next state."""

import inspect
from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from subquad.engines.runtime.validation import check_cu_seqlens, check_tensor
from subquad.errors import fail
from subquad.layers.block_layout import BlockLayout
from subquad.layers.depth import Depth

__all__ = ["Depth", "Mixer", "State", "check_positive_integers", "divide", "takes_depth"]

State = dict[str, Tensor]
"""What a mixer remembers: tensors by name, the batch's (or packed) sequences first, so that
`{n: t.index_select(0, order) for n, t in state.items()}` reorders it and the sum of `nbytes` is its
size."""


class Mixer(nn.Module, ABC):
    """A causal sequence mixer.

    Subclasses state their `row` in the table, the names of the tensors in their state, and whether
    they mix channels too (and so need no MLP beside them). What `shrunk_by_depth` names is divided
    by the root of the number of layers when a model starts it. Their constructors take
    `hidden_size` and keyword-only options, with the published defaults, and end with
    `reset_parameters()`.

    `writes_state_in_place` lets engines write the next state over the one given, where a decoding
    loop owns it: `forward` promises not to read a state after it was handed to an engine. It is
    not inherited, since a subclass may.

    What few rows need, and others leave alone:

    - a `depth` among the constructor's keywords, default None: a model passes the layer's `Depth`.
    - `layout`: the block that the row was published with.
    - `growing`: which of the state's tensors, [B,S,...], get longer with the sequence. Sequences of
      different lengths end together in them; before its first token one holds zeros.
    - `shared`: a module that all layers of the row in a model share. The model owns it and passes
      it to each `forward` as `shared=`.
    - `carries`: names of tensors [B,T,...] that a layer leaves for later ones, such as RWKV-7's
      first values. `forward` is given them as `carried=`, a dict, and adds its own to it.
    """

    row: ClassVar[str]
    state_names: ClassVar[tuple[str, ...]]
    has_channel_mixing: ClassVar[bool] = False
    shrunk_by_depth: ClassVar[tuple[str, ...]] = ()
    writes_state_in_place: ClassVar[bool] = False
    growing: ClassVar[tuple[str, ...]] = ()
    layout: ClassVar[BlockLayout] = BlockLayout()
    carries: ClassVar[tuple[str, ...]] = ()

    def __init__(self, hidden_size: int, **sizes: object) -> None:
        """`sizes`: options that must be positive integers, by name; None stands for a default."""
        super().__init__()
        check_positive_integers(hidden_size=hidden_size, **sizes)
        self.hidden_size = hidden_size

    @abstractmethod
    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Mix the tokens of `x` and move the state past them.

        Args:
            x: [B,T,hidden_size], T >= 1.
            state: where an earlier call stopped; None is a fresh start. It is never changed, so
                two continuations may start from it. It has an entry for each of the B sequences of
                `x`, or of the N packed ones.
            cu_seqlens: [N+1] int, the bounds of N sequences packed end to end in `x` (B = 1):
                0 first, T last, increasing. Nothing leaks from one into the next.

        Returns:
            y [B,T,hidden_size] and the next state.

        Raises:
            ValueError: naming the argument that does not fit, and the fix.
        """

    @classmethod
    def shared(cls, hidden_size: int, layers: int, **options: object) -> nn.Module | None:
        """What a model's layers of this row share; None for nothing.

        Args:
            hidden_size: of the model.
            layers: how many the model has, of all rows.
            options: the row's, as its constructor takes them.
        """
        return None

    def reset_parameters(self) -> None:
        """Draw every parameter anew, as published.

        Here: projections normal with deviation 0.02 and no bias (Radford et al. 2019, GPT-2, and
        most layers since); the other children as they start themselves.
        """
        for child in self.children():
            if isinstance(child, nn.Linear):
                nn.init.normal_(child.weight, std=0.02)
                if child.bias is not None:
                    nn.init.zeros_(child.bias)
            elif callable(reset := getattr(child, "reset_parameters", None)):
                reset()

    def check_inputs(self, x: Tensor, state: State | None, cu_seqlens: Tensor | None) -> State:
        """Raise ValueError for inputs that do not fit; return the state, {} for a fresh start."""
        layout = f"[B, T, {self.hidden_size}] with T >= 1"
        check_tensor("x", x, 3, layout)
        rows, T, width = x.shape
        if width != self.hidden_size or T < 1:
            raise fail("x", f"shape {tuple(x.shape)}", layout, "give hidden_size the width of x")
        if cu_seqlens is not None:
            rows = check_cu_seqlens(cu_seqlens, T, rows, like=x)
        if state is None:
            return {}
        if not isinstance(state, dict):
            expected = "a dict of tensors by name"
            raise fail("state", type(state).__name__, expected, "pass what it returned, or None")
        if state.keys() != set(self.state_names):
            expected = f"the entries {sorted(self.state_names)} of a {type(self).__name__}"
            raise fail("state", sorted(state), expected, "pass what it returned, or None")
        for name, tensor in state.items():
            if tensor.shape[0] != rows:
                expected = f"{rows}, one for each row of x (or sequence in cu_seqlens)"
                got = f"{tensor.shape[0]} rows"
                raise fail(f"state[{name!r}]", got, expected, "select the rows of x")
        return state


def check_positive_integers(**sizes: object) -> None:
    """ValueError for the first that is neither None nor a positive integer."""
    for name, size in sizes.items():
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise fail(name, repr(size), "a positive integer", "see the default")


def divide(total: int, parts: int, total_name: str, parts_name: str) -> int:
    """`total / parts`, or a ValueError that names both when it is not a whole number."""
    if parts < 1 or total % parts:
        expected = f"a positive divisor of {total_name} = {total}"
        raise fail(parts_name, parts, expected, f"change it or {total_name}")
    return total // parts


def takes_depth(cls: type[Mixer]) -> bool:
    """Whether its constructor asks where the layer stands."""
    return "depth" in inspect.signature(cls).parameters
