"""The next-token loss: transformers' own, computed by kernels unless the model has another."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from subquad.engines.cross_entropy.api import cross_entropy
from subquad.labels import IGNORE

# What may come beside logits and labels: for the loss, and of the stack's packing, for others.
_KNOWN = {
    "num_items_in_batch",
    "shift_labels",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
}


def loss_of(model: PreTrainedModel, logits: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
    """`model.loss_function` of logits [B,T,V] and labels [B,T].

    On a GPU `next_token_loss`, if that function is transformers' own and does the same.
    """
    vocab_size = model.config.vocab_size
    if (
        logits.is_cuda
        and type(logits) is Tensor  # a distributed one has losses of its own
        and logits.shape[-1] == vocab_size
        and kwargs.keys() <= _KNOWN
        and model.loss_function is ForCausalLMLoss
    ):
        items, shifted = kwargs.get("num_items_in_batch"), kwargs.get("shift_labels")
        return next_token_loss(logits, labels, items, shifted)
    loss: Tensor = model.loss_function(logits, labels, vocab_size=vocab_size, **kwargs)
    return loss


def next_token_loss(
    logits: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | float | None = None,
    shift_labels: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy, in nats, of the token after each; NaN if none counts, as in PyTorch.

    Args:
        logits: [B,T,V].
        labels: [B,T] int, -100 where nothing counts. The labels move, so that the logits need not.
        num_items_in_batch: what the sum is divided by, if not the number of labels that count.
        shift_labels: [B,T], in place of labels: already those of the token after.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=IGNORE)[:, 1:]
    shift_labels = shift_labels.to(logits.device).reshape(logits.shape[:-1])
    total = cross_entropy(logits, shift_labels).sum()
    if num_items_in_batch is None:
        return total / (shift_labels != IGNORE).sum()
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch
