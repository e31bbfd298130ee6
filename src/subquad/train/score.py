"""How well a model predicts text: nats per token, and bits per byte whatever its tokens are."""

import math
from typing import Any

import torch
from torch import Tensor

from subquad.engines.cross_entropy.api import cross_entropy
from subquad.train.data import Tokens, heldout_starts


def token_losses(model: Any, inputs: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of each target [B,T], nats, computed in float32."""
    logits = model(input_ids=inputs, use_cache=False).logits
    return cross_entropy(logits, targets).flatten()


@torch.no_grad()
def evaluate(
    model: Any, heldout: Tokens, *, seq_len: int, batch_size: int, tokens: int
) -> dict[str, float | int]:
    """Loss (nats per token) and bits per byte over evenly spread held-out windows.

    Depends on no random number: two models that are given the same arguments see the same text.
    """
    training, device = model.training, next(model.parameters()).device
    model.eval()
    nats, n_tokens, n_bytes = 0.0, 0, 0
    starts = heldout_starts(heldout, seq_len, tokens)
    for first in range(0, len(starts), batch_size):
        inputs, targets, b = heldout.windows(starts[first : first + batch_size], seq_len)
        nats += token_losses(model, inputs.to(device), targets.to(device)).double().sum().item()
        n_tokens += targets.numel()
        n_bytes += b
    model.train(training)
    return {
        "loss": nats / n_tokens,
        "bits_per_byte": bits_per_byte(nats, n_bytes),
        "tokens": n_tokens,
        "bytes": n_bytes,
    }


def bits_per_byte(nats: float, n_bytes: int) -> float:
    return nats / math.log(2) / n_bytes if n_bytes else math.nan
