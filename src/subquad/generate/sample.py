"""One token from one row of logits."""

import torch
from torch import Tensor


def choose(
    logits: Tensor, *, temperature: float, top_p: float, generator: torch.Generator | None
) -> int:
    """Draw a token from logits [vocabulary]; temperature 0 takes the likeliest.

    `top_p` < 1 draws among the fewest tokens whose probabilities reach it together (nucleus
    sampling: Holtzman et al. 2020, sec. 3.1), at least one.
    """
    if temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    if top_p < 1:
        ordered, tokens = probabilities.sort(descending=True)
        before = ordered.cumsum(-1) - ordered  # what the likelier tokens reach without this one
        ordered = ordered.masked_fill(before >= top_p, 0.0)
        ordered[0] = ordered[0].clamp(min=torch.finfo(ordered.dtype).tiny)  # top_p = 0 keeps it
        return int(tokens[torch.multinomial(ordered, 1, generator=generator)])
    return int(torch.multinomial(probabilities, 1, generator=generator))
