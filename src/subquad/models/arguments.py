"""Arguments that a model's `forward` is given beside its own: honoured, or refused by name."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import Tensor

from subquad.errors import fail
from subquad.models.cache import SubquadCache

# What transformers, its Trainer and its collators pass beside a model's own arguments.
_UNDERSTOOD = {
    "num_items_in_batch",  # the loss
    "shift_labels",
    "cu_seq_lens_q",  # packing, as its collators name it
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "return_dict",
    "output_attentions",
}
_INSTEAD = {
    "attn_mask": "attention_mask",
    "mask": "attention_mask",
    "cache_params": "past_key_values",
    "past": "past_key_values",
    "cache": "past_key_values",
    "segment_ids": "seq_idx",
    "sequence_ids": "seq_idx",
    "cu_seq_lens": "cu_seqlens",
    "token_type_ids": "nothing: the model has one type of token",
    "head_mask": "nothing: a recurrence has no attention weights",
}
_OWN = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds",
        "use_cache", "cu_seqlens", "seq_idx", "output_hidden_states", "labels")  # fmt: skip


def check_known(kwargs: dict[str, Any]) -> None:
    """ValueError for an argument that would not be read. One that is None asks for nothing."""
    for name, value in kwargs.items():
        if name in _UNDERSTOOD or value is None:
            if name == "output_attentions" and value:
                fix = "leave it out: a recurrence has no attention weights to return"
                raise fail(name, value, "False", fix)
            continue
        close = difflib.get_close_matches(name, _OWN, n=1)
        instead = _INSTEAD.get(name, close[0] if close else "one of " + ", ".join(_OWN))
        raise fail(name, "an argument of that name", instead, "rename it or leave it out")


def positions_from(
    seq_idx: object, shape: torch.Size, position_ids: Tensor | None, cache: SubquadCache | None
) -> Tensor:
    """[B,T] positions that restart at 0 wherever `seq_idx` changes along a row.

    Raises:
        ValueError: a `seq_idx` of another shape or type, beside position_ids, or with a past.
    """
    if not isinstance(seq_idx, Tensor) or seq_idx.dtype not in (torch.int32, torch.int64):
        got = seq_idx.dtype if isinstance(seq_idx, Tensor) else type(seq_idx).__name__
        raise fail("seq_idx", got, "a tensor [B,T] of int32 or int64", "cast it")
    if seq_idx.shape != shape:
        raise fail("seq_idx", f"shape {tuple(seq_idx.shape)}", f"{tuple(shape)}", "one a token")
    if position_ids is not None:
        raise fail("seq_idx", "position_ids beside it", "one of the two", "leave one out")
    if cache is not None and cache.lengths is not None:
        fix = "start afresh, or bound the texts by position_ids or cu_seqlens"
        raise fail("seq_idx", "a cache with a past", "no past", fix)
    token = torch.arange(shape[1], device=seq_idx.device).expand(shape)
    begins = torch.ones_like(seq_idx, dtype=torch.bool)
    begins[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return token - torch.where(begins, token, 0).cummax(1).values
