"""The cross-entropy of labels: the cost of a language model beside its layers, once a step.

On a GPU one kernel each way reads the logits where they lie; in PyTorch a batch of logits exists
three times more in float32 (widened, log-softmax, gradient). First derivatives only.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from subquad.engines.runtime.eager import can_call_operators
from subquad.errors import fail
from subquad.labels import IGNORE


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label], in nats, float32 or wider.

    Args:
        logits: [..., V].
        labels: [...] int64 or int32, each from 0 to V - 1, or -100, which has a loss of 0. On a
            GPU one outside of the vocabulary has a loss of NaN, and nothing waits to look for it.

    Returns:
        [...], a loss a label.

    Raises:
        ValueError: for labels that are not one for each position of logits.
    """
    if labels.shape != logits.shape[:-1] or not logits.ndim:
        fix = "give a label for each row of logits, -100 where nothing is asked"
        expected = f"the shape of logits {tuple(logits.shape)} without its last axis"
        raise fail("labels", f"shape {tuple(labels.shape)}", expected, fix)
    if logits.is_cuda and _has_kernel(logits, labels):
        from subquad.engines.cross_entropy import gpu as loss

        losses: Tensor = loss.cross_entropy(logits, labels)[0]
        return losses
    wide = logits if logits.dtype.itemsize >= 4 else logits.float()
    flat = wide.reshape(-1, logits.shape[-1]), labels.reshape(-1).long()
    return F.cross_entropy(*flat, ignore_index=IGNORE, reduction="none").view(labels.shape)


def _has_kernel(logits: Tensor, labels: Tensor) -> bool:
    from subquad.engines.cross_entropy import gpu as loss

    fits = logits.shape[-1] > 0 and can_call_operators()
    return fits and loss.supported(logits, labels) is None
