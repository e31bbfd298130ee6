"""Tensors that grow by a few slots at a time, without copying what they hold each time.

Concatenating each decoded token to the keys of all before it copies the whole cache a token, which
costs several times what attention itself does. So the slots lie at the start of a larger buffer,
and new ones are written behind them. Nothing that anybody holds changes: a tensor of S slots never
shows what is written after its S-th.

Two continuations of one state must not write to the same place. The right to write behind S slots
is an entry S in a dictionary that all tensors of one buffer share, and taking it out is atomic: who
comes second finds none and copies.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.backend.fast_paths import are_fast_paths_on
from subquad.engines.runtime.eager import is_plain
from subquad.engines.runtime.overrides import overridable

_SPARE = 0.5  # of the slots held: a slot is then copied twice on average, and a third may be empty


@overridable
def append(slots: Tensor, new: Tensor) -> Tensor:
    """[B,S,...] and [B,T,...] -> [B,S+T,...] as `torch.cat` gives, in amortised O(T) time.

    Where a gradient is recorded, something watches every operation, or the two differ in more than
    S and T, it is `torch.cat`, which promotes dtypes and refuses the rest.
    """
    if not are_fast_paths_on() or not is_plain((slots, new)) or not _alike(slots, new):
        return torch.cat((slots, new), dim=1)
    S, total = slots.shape[1], slots.shape[1] + new.shape[1]
    rights: dict[int, Tensor] = getattr(slots, "_room", {})
    buffer = rights.pop(S, None)
    if buffer is None or buffer.shape[1] < total or _sealed(buffer):
        spare = int(_SPARE * total) + 16
        buffer = slots.new_empty(slots.shape[0], total + spare, *slots.shape[2:])
        buffer[:, :S] = slots
        rights = {}
    buffer[:, S:total] = new
    rights[total] = buffer
    grown = buffer[:, :total]
    grown._room = rights  # type: ignore[attr-defined]
    return grown


def end_together(rows: Sequence[Tensor]) -> Tensor:
    """Stack rows [1,S_n,...] of different lengths so that each ends in the last slot; before its
    first, a row holds zeros."""
    S = max(row.shape[1] for row in rows)
    around = (0, 0) * (rows[0].ndim - 2)
    return torch.cat([F.pad(row, (*around, S - row.shape[1], 0)) for row in rows])


def _alike(slots: Tensor, new: Tensor) -> bool:
    """Writing into a buffer would convert, move and broadcast where `torch.cat` does not."""
    return (
        slots.dtype == new.dtype
        and slots.device == new.device
        and slots.shape[:1] + slots.shape[2:] == new.shape[:1] + new.shape[2:]
    )


def _sealed(buffer: Tensor) -> bool:
    """Tensors made in inference mode may not be written outside it."""
    return buffer.is_inference() and not torch.is_inference_mode_enabled()
