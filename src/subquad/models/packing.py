"""Padding is packing: only real tokens reach the mixers, laid end to end.

A mixer knows rows that are full and rows that are packed (`cu_seqlens`), and nothing of masks.
So whatever leaves holes in a batch (left, right or middle padding, a row with no token in this
call) or joins several texts in one row (position_ids that start again at 0) is turned here into
packed sequences, each with the row of the cache that it continues. The results go back to where
the tokens came from, and zeros to the holes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.engines.runtime.validation import check_cu_seqlens
from subquad.errors import fail
from subquad.mixers.base import State


@dataclass(frozen=True)
class Packing:
    """N sequences of one call that all start anew, or that all go on from the cache.

    Attributes:
        cu_seqlens: [N+1] int32, their bounds in the packed row.
        rows: [N] the cache's row that each belongs to.
        fresh: they start anew, so the mixers get no state.
        tokens: [n] the place of each packed token in the flattened [B*T]; None for all in order.
        final: [R] which of the sequences come last in their row, and so leave it their state;
            None for all.
    """

    cu_seqlens: Tensor
    rows: Tensor
    fresh: bool
    tokens: Tensor | None = None
    final: Tensor | None = None

    def gather(self, x: Tensor) -> Tensor:
        """[B,T,D] -> the packed row [1,n,D]."""
        flat = x.flatten(0, 1)
        return (flat if self.tokens is None else flat[self.tokens]).unsqueeze(0)

    def scatter(self, packed: Tensor, into: Tensor) -> Tensor:
        """The packed row [1,n,D] back to its places in [B,T,D]; `into` holds the others."""
        flat = packed.squeeze(0)
        if self.tokens is not None:
            flat = into.flatten(0, 1).to(flat.dtype).index_copy(0, self.tokens, flat)
        return flat.unflatten(0, into.shape[:2])

    def initial(self, state: State | None) -> State | None:
        """The states that the sequences start from, out of those of the cache's rows."""
        if self.fresh or state is None:
            return None
        return {name: t.index_select(0, self.rows) for name, t in state.items()}

    @property
    def final_rows(self) -> Tensor:
        """[R] the rows that get a new state."""
        return self.rows if self.final is None else self.rows[self.final]

    def last_of(self, tensor: Tensor) -> Tensor:
        """[N, ...] -> [R, ...]: the sequences that end their rows."""
        return tensor if self.final is None else tensor.index_select(0, self.final)

    def covers(self, rows: int) -> bool:
        """The sequences are the cache's rows one for one (`rows` is sorted within a call)."""
        return self.final is None and len(self.rows) == rows

    def new_lengths(self, lengths: Tensor) -> Tensor:
        """[rows] tokens of each row's current sequence, after this call."""
        read = self.last_of(self.cu_seqlens.diff().to(lengths.dtype))
        before = 0 if self.fresh else lengths[self.final_rows]
        return lengths.index_copy(0, self.final_rows, before + read)


def check_past(attention_mask: Tensor | None, length: int, past: int, read: Tensor | None) -> None:
    """ValueError where a mask over the past says that other tokens were read than were.

    Args:
        attention_mask: [B,past+length] or shorter; then there is nothing to check.
        read: [B] tokens that each row of the cache has read in all; None where that is not known.
    """
    if attention_mask is None or read is None or past == 0 or attention_mask.ndim != 2:
        return
    if attention_mask.shape != (len(read), past + length):
        return
    claimed = (attention_mask[:, :past] != 0).sum(1)
    wrong = (claimed != read.to(claimed.device)).nonzero().flatten()
    if len(wrong):
        row = int(wrong[0])
        raise fail(
            "attention_mask",
            f"{int(claimed[row])} tokens in the past of sequence {row}",
            f"{int(read[row])}, which its cache has read (generate() goes on reading a sequence "
            "that has ended until the last of its batch has)",
            "continue sequences that ended early by themselves, or without a cache",
        )


def pack(
    batch: int,
    length: int,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    past: int,
    lengths: Tensor | None,
    has_empty_rows: bool,
) -> list[Packing] | None:
    """Sequences as mask and positions tell them; None if the batch is simply full rows.

    Args:
        attention_mask: [B,T] or [B,past+T]; 1 for tokens, 0 for padding.
        position_ids: [B,T] or [1,T]. From one real token of a row to the next they count up by
            one, from the number of tokens that the cache has of the row, or are 0 where another
            text starts (also at once, and then the row's old state is dropped).
        past: columns read by earlier calls.
        lengths: [B] tokens that the cache has of each row; None for none.
        has_empty_rows: some of them are 0.

    Raises:
        ValueError: masks that are not 2-D or not 0 and 1; positions that jump.
    """
    real = _real_tokens(attention_mask, batch, length, past)
    if real is None and position_ids is None and not has_empty_rows:
        return None
    like = next(t for t in (real, position_ids, lengths) if t is not None)
    if lengths is None:
        lengths = torch.zeros(batch, dtype=torch.int64, device=like.device)
    tokens = None if real is None else real.flatten().nonzero().squeeze(1)
    if tokens is not None and len(tokens) == 0:
        return []
    places = torch.arange(batch * length, device=like.device) if tokens is None else tokens
    row = places // length
    starts = torch.ones_like(row, dtype=torch.bool)
    starts[1:] = row[1:] != row[:-1]
    restarts = torch.zeros_like(starts)
    if position_ids is not None:
        positions = _check_position_shape(position_ids, batch, length).flatten()[places]
        restarts = _restarts(positions, starts, row, lengths)
        if real is None and not has_empty_rows and not bool(restarts.any()):
            return None
    starts = starts | restarts
    fresh = restarts | (lengths == 0)[row]
    return _packings(tokens, starts, row[starts], fresh[starts])


def pack_given(
    cu_seqlens: Tensor,
    batch: int,
    length: int,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    lengths: Tensor | None,
    has_empty_rows: bool,
) -> list[Packing]:
    """Sequences as the caller bounded them; sequence i goes on from row i of the cache.

    Raises:
        ValueError: bounds that do not fit, or a mask or positions that contradict them.
    """
    sequences = check_cu_seqlens(cu_seqlens, length, batch)
    if _real_tokens(attention_mask, batch, length, past=0) is not None:
        raise fail("attention_mask", "padding", "none beside cu_seqlens", "pack real tokens only")
    rows = torch.arange(sequences, device=cu_seqlens.device)
    if position_ids is None and (lengths is None or not has_empty_rows):
        return [Packing(cu_seqlens, rows, fresh=lengths is None)]
    if lengths is None:
        lengths = torch.zeros_like(rows)
    starts = torch.zeros(length, dtype=torch.bool, device=cu_seqlens.device)
    starts[cu_seqlens[:-1].long()] = True
    if position_ids is not None:
        positions = _check_position_shape(position_ids, batch, length).flatten()
        if bool(_restarts(positions, starts, starts.cumsum(0) - 1, lengths).any()):
            raise fail(
                "position_ids",
                "a restart inside a sequence of cu_seqlens",
                "positions that count up within each",
                "pass one of the two",
            )
    return _packings(None, starts, rows, lengths == 0)


def _packings(tokens: Tensor | None, starts: Tensor, rows: Tensor, fresh: Tensor) -> list[Packing]:
    """Pack the sequences that start anew and those that go on, each kind by itself.

    Apart, because a mixer's fresh start is `state=None`: no filling of a state's tensors means
    "nothing yet" for every mixer.

    Args:
        tokens: [n] places of the tokens in the flattened batch; None for all in order.
        starts: [n] bool, the first token of each of the N sequences.
        rows, fresh: [N].
    """
    final = torch.ones_like(fresh)
    final[:-1] = rows[1:] != rows[:-1]
    sizes = F.pad(starts.nonzero().squeeze(1), (0, 1), value=len(starts)).diff()
    mixed = bool(fresh.any()) and not bool(fresh.all())
    packings = []
    for kind in (False, True) if mixed else (bool(fresh[0]),):
        chosen = fresh == kind
        places = tokens
        if mixed:
            mine = chosen[starts.cumsum(0) - 1]
            places = mine.nonzero().squeeze(1) if tokens is None else tokens[mine]
        cu_seqlens = F.pad(sizes[chosen].cumsum(0), (1, 0)).to(torch.int32)
        last = final[chosen]
        ends = None if bool(last.all()) else last.nonzero().squeeze(1)
        packings.append(Packing(cu_seqlens, rows[chosen], fresh=kind, tokens=places, final=ends))
    return packings


def _real_tokens(mask: Tensor | None, batch: int, length: int, past: int) -> Tensor | None:
    """[B,T] bool: the columns of this call; None if there is no padding among them."""
    if mask is None:
        return None
    if mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] not in (length, past + length):
        widths = f"{length}" if past == 0 else f"{length} or {past} + {length}"
        raise fail(
            "attention_mask",
            f"shape {tuple(mask.shape)}",
            f"[{batch}, {widths}], 1 for tokens and 0 for padding",
            "a recurrence is causal as it is; 4-D masks mean nothing to it. Bound packed texts "
            "by cu_seqlens or position_ids",
        )
    window = mask[:, mask.shape[1] - length :]
    real = window != 0
    if bool(real.all()) and bool((window == 1).all()):
        return None
    if not bool((window == real).all()):
        raise fail(
            "attention_mask",
            f"values such as {window[window != real][0].item()}",
            "1 for tokens and 0 for padding",
            "bound packed texts by cu_seqlens or position_ids, not by numbers in the mask",
        )
    return real


def _check_position_shape(position_ids: Tensor, batch: int, length: int) -> Tensor:
    """[B,T], from that or from [1,T]."""
    shape = tuple(position_ids.shape)
    if shape not in ((batch, length), (1, length)):
        raise fail("position_ids", f"shape {shape}", f"[{batch}, {length}]", "one number a token")
    return position_ids.expand(batch, length)


def _restarts(positions: Tensor, first: Tensor, row: Tensor, lengths: Tensor) -> Tensor:
    """[n] bool: tokens at position 0 that do not go on from what came before them in their row.

    Args:
        positions, first, row: [n] of real tokens: their position, whether they are the first of
            their row in this call, and the row.
        lengths: [B] tokens that the cache has of each row.
    """
    expected = lengths[row]
    expected[1:] = torch.where(first[1:], expected[1:], positions[:-1] + 1)
    jumps = (positions != expected) & (positions != 0)
    if bool(jumps.any()):
        at = int(jumps.nonzero()[0])
        raise fail(
            "position_ids",
            f"{int(positions[at])} in row {int(row[at])}",
            f"{int(expected[at])}, one more than the token before, or 0 where another text starts",
            "leave position_ids out: positions are counted from the tokens themselves",
        )
    return (positions == 0) & (positions != expected)
