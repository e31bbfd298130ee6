"""Token ids and labels are checked here, before they fail deep inside an embedding or a loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from subquad.errors import fail
from subquad.labels import IGNORE


def embed(embedding: nn.Module, input_ids: object, vocab_size: int) -> Tensor:
    """[B,T] int -> [B,T,hidden].

    Values are not checked beforehand: that costs time with every decoded token, and a GPU would
    have to wait. A CPU finds a wrong one by itself, and it is put in words here.
    """
    ids = _check_ids("input_ids", input_ids)
    try:
        return embedding(ids)
    except IndexError as error:
        raise _outside("input_ids", ids, vocab_size, "use the tokenizer of the model") from error


def check_labels(labels: object, shape: torch.Size, vocab_size: int) -> Tensor:
    """[B,T] int like the logits' positions, each a token or -100 (values: on the CPU only).

    Returns them as int64, which cross-entropy wants.

    Raises:
        ValueError: naming `labels`.
    """
    ids = _check_ids("labels", labels)
    if ids.shape != shape:
        raise fail(
            "labels",
            f"shape {tuple(ids.shape)}",
            f"{tuple(shape)}, a label for each position that has logits",
            "pass input_ids as labels; they are shifted inside",
        )
    if ids.is_cpu and not torch.compiler.is_compiling():
        wrong = ids[ids != IGNORE]
        if len(wrong) and (int(wrong.min()) < 0 or int(wrong.max()) >= vocab_size):
            raise _outside("labels", wrong, vocab_size, "set what shall not count to -100")
    return ids.long()


def _check_ids(name: str, ids: object) -> Tensor:
    if not isinstance(ids, Tensor):
        raise fail(name, type(ids).__name__, "a tensor [B, T] of int64", f"torch.tensor({name})")
    if ids.dtype not in (torch.int64, torch.int32):
        raise fail(name, ids.dtype, "int64 (or int32) token ids", f"{name}.long(), if they are ids")
    if ids.ndim != 2:
        raise fail(name, f"shape {tuple(ids.shape)}", "[B, T]", f"{name}[None] is a batch of one")
    return ids


def _outside(name: str, ids: Tensor, vocab_size: int, fix: str) -> ValueError:
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    return fail(name, f"token {int(wrong[0])}", f"tokens from 0 to {vocab_size - 1}", fix)
