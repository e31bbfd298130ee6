"""Lightning attention: each head forgets at a pace set by its place in the model, not learned.

B batch   T time   H heads   D head size
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.engines import linear_recurrence
from subquad.layers.norms import RMSNorm
from subquad.layers.projection import project
from subquad.mixers.base import Depth, Mixer, State, divide


class LightningAttention(Mixer):
    """Qin et al. 2024, "Various lengths, constant speed: Lightning Attention" (arXiv:2405.17381);
    the layer as in MiniMax-01 (arXiv:2501.08313, section 2.2).

        q, k, v = silu(W x)      S_t = e^{-s_h} S_{t-1} + k_t v_t^T      o_t = S_t^T q_t
        y = Wo (sigmoid(Wg x) * RMSNorm(o))      s_h = 2^{-8 (h+1) / H} (1 - l / (L - 1) + 1e-5)

    l is the layer's place among L: the last layers hardly forget. By itself a layer is the first.

    State: recurrent [B,H,D,D] float32.

    Args:
        hidden_size: width of the input and output.
        num_heads: by default one for each 64 channels.
        head_dim: hidden_size / num_heads by default.
        norm_eps: of the RMSNorm over all heads.
    """

    row = "lightning_attention"
    state_names = ("recurrent",)
    writes_state_in_place = True

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int | None = None,
        head_dim: int | None = None,
        norm_eps: float = 1e-6,
        depth: Depth | None = None,
    ) -> None:
        super().__init__(hidden_size, num_heads=num_heads, head_dim=head_dim)
        self.num_heads = max(1, hidden_size // 64) if num_heads is None else num_heads
        if head_dim is None:
            head_dim = divide(hidden_size, self.num_heads, "hidden_size", "num_heads")
        self.head_dim = head_dim
        self.depth = depth or Depth(0, 1)
        inner = self.num_heads * head_dim
        self.qkv_proj = nn.Linear(hidden_size, 3 * inner, bias=False)
        self.output_gate = nn.Linear(hidden_size, inner, bias=False)
        self.norm = RMSNorm(inner, eps=norm_eps)
        self.out_proj = nn.Linear(inner, hidden_size, bias=False)
        self.reset_parameters()

    def log_decay(self, device: torch.device) -> Tensor:
        """-s_h, [H] float32."""
        head = torch.arange(self.num_heads, device=device, dtype=torch.float32)
        index, total = self.depth.index, self.depth.total
        pace = 1 - index / (total - 1 + 1e-5) + 1e-5
        return -pace * torch.exp(-8 * math.log(2) / self.num_heads * (head + 1))

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        past = self.check_inputs(x, state, cu_seqlens)
        qkv = F.silu(project(self.qkv_proj, x)).unflatten(-1, (3 * self.num_heads, self.head_dim))
        q, k, v = qkv.chunk(3, dim=2)  # [B,T,H,D]
        decay = self.log_decay(x.device)
        o, recurrent = linear_recurrence(
            q, k, v, decay, scale=1.0, state=past.get("recurrent"), cu_seqlens=cu_seqlens
        )
        gate = project(self.output_gate, x).sigmoid()
        return project(self.out_proj, gate * self.norm(o.flatten(-2))), {"recurrent": recurrent}
