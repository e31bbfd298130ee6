"""Linear attention: a feature map in place of the softmax's exponential.

B batch   T time   H heads   K = V head size
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from subquad.engines import linear_recurrence, normalised_recurrence
from subquad.errors import choose, fail
from subquad.layers.norms import RMSNorm
from subquad.layers.projection import project
from subquad.mixers.base import Mixer, State, divide

_FEATURE_MAPS = {
    "elu1": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "identity": lambda x: x,
}
_EPS = 1e-6  # the paper's own code adds it to the denominator


class LinearAttention(Mixer):
    """Katharopoulos et al. 2020, "Transformers are RNNs" (arXiv:2006.16236, eq. 16-20).

        S_t = S_{t-1} + phi(k_t) v_t^T      z_t = z_{t-1} + phi(k_t)
        o_t = S_t^T phi(q_t) / (z_t . phi(q_t) + 1e-6)

    Without the normaliser the outputs grow with T, so they get a headwise RMSNorm (Qin et al. 2022,
    arXiv:2210.10340, section 4.1). As published, nothing in the layer tells positions apart.

    State: recurrent [B,H,K,V] and, with the normaliser, normaliser [B,H,K], float32.

    Args:
        hidden_size: width of the input and output.
        num_heads: by default one for each 64 channels.
        feature_map: phi, "elu1" (elu(x) + 1), "relu" or "identity".
        normalise: whether to divide by z . phi(q); it needs a phi that is never negative.
        norm_eps: of the RMSNorm that stands in for the normaliser.
    """

    row = "linear_attention"
    state_names = ("recurrent", "normaliser")
    writes_state_in_place = True

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int | None = None,
        feature_map: str = "elu1",
        normalise: bool = True,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(hidden_size, num_heads=num_heads)
        choose("feature_map", feature_map, tuple(_FEATURE_MAPS))
        if normalise and feature_map == "identity":
            expected = "'elu1' or 'relu', never negative, when normalise=True"
            raise fail("feature_map", repr(feature_map), expected, "pass normalise=False")
        self.num_heads = max(1, hidden_size // 64) if num_heads is None else num_heads
        self.head_dim = divide(hidden_size, self.num_heads, "hidden_size", "num_heads")
        self.feature_map = feature_map
        self.qkv_proj = nn.Linear(hidden_size, 3 * hidden_size)
        self.norm = None if normalise else RMSNorm(self.head_dim, eps=norm_eps)
        if not normalise:
            self.state_names = ("recurrent",)  # type: ignore[misc, assignment]
        self.o_proj = nn.Linear(hidden_size, hidden_size)
        self.reset_parameters()

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        past = self.check_inputs(x, state, cu_seqlens)
        qkv = project(self.qkv_proj, x).unflatten(-1, (3 * self.num_heads, self.head_dim))
        qk, v = qkv.split((2 * self.num_heads, self.num_heads), dim=2)
        q, k = _FEATURE_MAPS[self.feature_map](qk).chunk(2, dim=2)  # [B,T,H,K]
        options: dict[str, Any] = {"state": past.get("recurrent"), "cu_seqlens": cu_seqlens}
        if self.norm is None:
            z = past.get("normaliser")
            o, n, recurrent, z = normalised_recurrence(q, k, v, scale=1.0, normaliser=z, **options)
            o, new = o / (n.unsqueeze(-1) + _EPS), {"recurrent": recurrent, "normaliser": z}
        else:
            o, recurrent = linear_recurrence(q, k, v, scale=1.0, **options)
            o, new = self.norm(o), {"recurrent": recurrent}
        return project(self.o_proj, o.to(x.dtype).flatten(-2)), new
