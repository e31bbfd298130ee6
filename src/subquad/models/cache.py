"""What a model remembers between calls: the state of each layer, for every sequence."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache

from subquad.decode.gpu.graph import Lease
from subquad.errors import fail
from subquad.mixers.base import State
from subquad.models.cache_file import read_cache, write_cache
from subquad.models.packing import Packing


class SubquadCache(Cache):
    """The states of all layers, in transformers' Cache protocol.

    Attributes:
        states: one `State` per layer (a dict of tensors, sequences first), None before the first
            token.
        lengths: [B] int64, real tokens read by each sequence; None before the first call.
        read: [B] int64, real tokens read in all, those of earlier texts in the row included.
        lease: on the CUDA graph that decodes with it in generate(), if there is one.

    A mixer never changes a state in place, so `copy.copy(cache)` is a fork that costs nothing: the
    copy keeps what it has when the original moves on. A CUDA graph does overwrite its states, so
    the fork of a cache with a lease copies them.
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[])
        self.num_layers = num_layers
        self.reset()

    def reset(self) -> None:
        """Forget everything; the next call starts anew, with any number of sequences."""
        self.states: list[State | None] = [None] * self.num_layers
        self.lease: Lease | None = None
        self.lengths: Tensor | None = None
        self.read: Tensor | None = None
        # Rows that have seen nothing but padding have no state yet: what `states` holds for them
        # is filler and must not be continued.
        self.has_empty_rows = False
        self._columns = 0

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles hold."""
        held = self.__dict__.copy()
        if self.lease is not None:
            held["lease"] = None
            held["states"] = [
                None if state is None else {name: t.clone() for name, t in state.items()}
                for state in self.states
            ]
        return held

    # ---- what the model calls

    def check_batch(self, rows: int) -> None:
        if self.lengths is not None and len(self.lengths) != rows:
            raise fail(
                "past_key_values",
                f"a cache of {len(self.lengths)} rows",
                f"one row for each of the {rows} sequences given",
                "cache.batch_repeat_interleave(n) or cache.batch_select_indices(rows) makes it fit",
            )

    def advance(self, states: list[State], rows: int, tokens: int, device: torch.device) -> None:
        """Each of the sequences has read `tokens` more."""
        self.states = list(states)
        if self.lengths is None:
            self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
            self.read = self.lengths
        self.lengths = self.lengths + tokens
        self.read = None if self.read is None else self.read + tokens
        self._columns += tokens

    def advance_packed(
        self,
        results: list[tuple[Packing, list[State]]],
        rows: int,
        columns: int | None,
        device: torch.device,
    ) -> None:
        """Some sequences have read some tokens; the others stay as they are.

        Args:
            results: each packing with the states, by layer, after its sequences.
            rows: sequences of the cache, whether or not they read anything.
            columns: width of the call, padding included; None when sequences came one after
                another (`cu_seqlens`), and the longest counts.
        """
        before = self.lengths
        if before is None:
            before = torch.zeros(rows, dtype=torch.int64, device=device)
        lengths = before
        for packing, _ in results:
            lengths = packing.new_lengths(lengths)
        self.states = [
            _merge(old, [(packing, states[layer]) for packing, states in results], rows)
            for layer, old in enumerate(self.states)
        ]
        self._columns += int((lengths - before).max()) if columns is None else columns
        if self.lengths is None:
            self.read = before
        if self.read is not None:
            for packing, _ in results:
                self.read = self.read.index_add(0, packing.rows, packing.cu_seqlens.diff().long())
        self.lengths = lengths
        self.has_empty_rows = bool((lengths == 0).any())

    # ---- what generate() and its users call

    def __len__(self) -> int:
        return self.num_layers

    def __repr__(self) -> str:
        rows = 0 if self.lengths is None else len(self.lengths)
        length = self.get_seq_length()
        return f"SubquadCache({rows} rows after {length} tokens, {self.nbytes} bytes)"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far, padding included: the attention mask's width up to now."""
        return self._columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no limit."""
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """`get_max_length` under the name that transformers before 5.17 calls it by."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(width, offset) of a mask over all tokens read and `query_length` more."""
        return self._columns + query_length, 0

    @property
    def nbytes(self) -> int:
        """Bytes that the states take."""
        return sum(t.nbytes for state in self.states for t in (state or {}).values())

    @property
    def batch_size(self) -> int:
        """Sequences, or -1 before the first call."""
        return -1 if self.lengths is None else len(self.lengths)

    @property
    def is_initialized(self) -> bool:
        return self.lengths is not None

    @property
    def is_compileable(self) -> bool:
        """False: states are replaced, not written in place, as static addresses would need."""
        return False

    @property
    def is_croppable(self) -> bool:
        return False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes what sequence `beam_idx[i]` was (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences, in this order; one may be named more than once."""
        self._map(lambda t: t.index_select(0, indices.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence `repeats` times, next to each other."""
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def crop(self, max_length: int) -> None:
        """Refuse to forget the last tokens; a no-op where nothing would be forgotten.

        Args:
            max_length: tokens to keep, or, if negative, minus the tokens to forget; 0 forgets
                nothing (as transformers since 5.17 has it).

        Raises:
            ValueError: a recurrent state holds no record of the single tokens to take away.
        """
        if max_length == 0 or max_length >= self._columns:
            return
        raise fail(
            "crop",
            f"{max_length} of {self._columns} tokens",
            "to keep all of them, for a recurrent state cannot forget its last tokens",
            "take a snapshot first, copy.copy(cache), and go back to that",
        )

    def update(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(
            "SubquadCache holds whole states, not keys and values layer by layer; "
            "only a subquad model can write it"
        )

    # ---- files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one safetensors file, wholly or not at all, with its sum."""
        counts = {"lengths": self.lengths, "read": self.read}
        write_cache(Path(path), self.states, counts, self._columns)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str | torch.device = "cpu") -> SubquadCache:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is no cache of ours, or is damaged.
            FileNotFoundError: there is no such file.
        """
        states, counts, columns = read_cache(Path(path))
        cache = cls(len(states))
        cache.states, cache._columns = states, columns
        cache.lengths, cache.read = counts["lengths"], counts["read"]
        cache.has_empty_rows = cache.lengths is not None and bool((cache.lengths == 0).any())
        cache._map(lambda tensor: tensor.to(device))
        return cache

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.states = [
            None if state is None else {name: change(t) for name, t in state.items()}
            for state in self.states
        ]
        if self.lengths is not None:
            self.lengths = change(self.lengths)
        if self.read is not None:
            self.read = change(self.read)


def _merge(old: State | None, updates: list[tuple[Packing, State]], rows: int) -> State | None:
    """The state whose entries come from the updates where those have them, else from `old`."""
    if not updates:
        return old
    if len(updates) == 1 and updates[0][0].covers(rows):
        return updates[0][1]
    merged = {}
    for name, tensor in updates[0][1].items():
        parts = [packing.last_of(state[name]) for packing, state in updates]
        known = parts if old is None else [*parts, old[name]]
        # Keys and values of different ages differ in width; rows end together, so the start grows.
        shape = [max(sizes) for sizes in zip(*(t.shape[1:] for t in known))]
        out = tensor.new_zeros(rows, *shape) if old is None else _widen(old[name], shape)
        for (packing, _), part in zip(updates, parts):
            out = out.index_copy(0, packing.final_rows, _widen(part, shape))
        merged[name] = out
    return merged


def _widen(tensor: Tensor, shape: list[int]) -> Tensor:
    """`tensor` with zeros before the start of each dimension but the first, up to `shape`."""
    missing = [want - have for want, have in zip(shape, tensor.shape[1:])]
    if not any(missing):
        return tensor
    return F.pad(tensor, [amount for size in reversed(missing) for amount in (size, 0)])
