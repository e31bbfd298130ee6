"""One token from each row of logits."""

import torch
from torch import Tensor

_COLDEST = 1e-30  # in float32, smaller ones divide like 0


def draw(
    logits: Tensor, *, temperature: float, top_p: float, generator: torch.Generator | None
) -> Tensor:
    """Draw tokens [...] from logits [..., vocabulary]; temperature 0 takes the likeliest.

    `top_p` < 1 draws among the fewest tokens whose probabilities reach it together (nucleus
    sampling: Holtzman et al. 2020, sec. 3.1), at least one. Nothing waits for the device:
    torch.multinomial would, to look for probabilities that are none.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float()
    # Below the largest logit nothing overflows, and at a tiny temperature only it is left.
    below = logits - logits.amax(-1, keepdim=True)
    probabilities = torch.softmax(below / max(temperature, _COLDEST), dim=-1)
    if top_p >= 1:
        return _race(probabilities, generator)
    ordered, tokens = probabilities.sort(dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered  # what the likelier tokens reach without this one
    ordered = ordered.masked_fill(before >= top_p, 0.0)
    ordered[..., 0].clamp_(min=torch.finfo(ordered.dtype).tiny)  # top_p = 0 keeps it
    return tokens.gather(-1, _race(ordered, generator)[..., None])[..., 0]


def _race(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """An index with probability proportional to its weight: the first of exponential arrivals."""
    return (weights / torch.empty_like(weights).exponential_(generator=generator)).argmax(-1)
