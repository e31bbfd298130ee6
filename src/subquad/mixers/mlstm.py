"""mLSTM: a matrix memory with exponential gates, the heart of xLSTM.

B batch   T time   H heads   D inner channels   K = V = D / H head size
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.engines import normalised_recurrence, stabilise
from subquad.engines.norm.layer import layer_norm
from subquad.layers.block_layout import BlockLayout
from subquad.layers.headwise import HeadwiseLinear
from subquad.layers.initialization import no_weight_decay
from subquad.layers.norms import at_least_float32
from subquad.layers.projection import project
from subquad.layers.short_convolution import ShortConvolution
from subquad.mixers.base import Depth, Mixer, State, divide


class MLSTM(Mixer):
    """Beck et al. 2024, "xLSTM: Extended Long Short-Term Memory" (arXiv:2405.04517, eq. 19-27, the
    block of figure 11).

        C_t = f_t C_{t-1} + i_t k_t v_t^T      n_t = f_t n_{t-1} + i_t k_t
        h_t = C_t^T q_t / max(|n_t . q_t|, 1)      i = exp(.), f = sigmoid(.)
        y = down((GroupNorm(h) + skip * c) * silu(z))

    x and z are projected up; q and k come from c = silu(conv(x)), v from x, each by matrices of
    4 x 4, and the gates from all three. Gates are stabilised by their running maximum m, so that C
    and n hold e^{-m} times the above.

    State: conv [B,W-1,D]; recurrent [B,H,K,V], normaliser [B,H,K] and maximum [B,H], float32.

    Args:
        hidden_size: width of the input and output.
        num_heads: heads of the inner channels.
        expand: inner channels over hidden_size.
        conv_width: taps of the short convolution.
        qkv_block_size: size of the blocks that project to q, k and v.
        norm_eps: of the group norm.
    """

    row = "mlstm"
    state_names = ("conv", "recurrent", "normaliser", "maximum")
    writes_state_in_place = True
    has_channel_mixing = True
    layout = BlockLayout(norm="layer")

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int = 4,
        expand: int = 2,
        conv_width: int = 4,
        qkv_block_size: int = 4,
        norm_eps: float = 1e-5,
        depth: Depth | None = None,
    ) -> None:
        super().__init__(
            hidden_size,
            num_heads=num_heads,
            expand=expand,
            conv_width=conv_width,
            qkv_block_size=qkv_block_size,
        )
        D = self.inner_size = expand * hidden_size
        self.num_heads, self.norm_eps, self.depth = num_heads, norm_eps, depth or Depth(0, 1)
        self.head_dim = divide(D, num_heads, "expand * hidden_size", "num_heads")
        self.up_proj = nn.Linear(hidden_size, 2 * D, bias=False)
        self.conv = ShortConvolution(D, conv_width, bias=True)
        self.q_proj, self.k_proj, self.v_proj = (
            HeadwiseLinear(D, qkv_block_size) for _ in range(3)
        )
        self.gate_proj = nn.Linear(3 * D, 2 * num_heads)  # to i and f
        self.norm_weight = no_weight_decay(nn.Parameter(torch.empty(D)))
        self.skip = no_weight_decay(nn.Parameter(torch.empty(D)))
        self.down_proj = nn.Linear(D, hidden_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As published: small projections, gates by their biases alone, f from 0.95 to 0.998."""
        small = (2 / (5 * self.hidden_size)) ** 0.5
        nn.init.normal_(self.up_proj.weight, std=small)
        for proj in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.normal_(proj.weight, std=small)
        nn.init.normal_(self.down_proj.weight, std=2 / self.depth.total / self.hidden_size**0.5)
        self.conv.reset_parameters()
        nn.init.zeros_(self.gate_proj.weight)
        i, f = self.gate_proj.bias.chunk(2)
        nn.init.normal_(i, std=0.1)
        with torch.no_grad():
            f.copy_(torch.linspace(3.0, 6.0, self.num_heads))
        nn.init.ones_(self.norm_weight)
        nn.init.ones_(self.skip)

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        past = self.check_inputs(x, state, cu_seqlens)
        inner, z = project(self.up_proj, x).chunk(2, dim=-1)
        c, conv = self.conv(inner, past.get("conv"), cu_seqlens)
        q, k, v = self.q_proj(c), self.k_proj(c), self.v_proj(inner)
        i, f = at_least_float32(project(self.gate_proj, torch.cat((q, k, v), -1))).chunk(2, dim=-1)
        maximum = past.get("maximum")
        if maximum is None:
            rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            maximum = torch.zeros(rows, self.num_heads, dtype=i.dtype, device=i.device)
        log_f, log_i, m, maximum = stabilise(F.logsigmoid(f), i, maximum, cu_seqlens)
        heads = (self.num_heads, self.head_dim)
        k = k.unflatten(-1, heads)
        h, n, recurrent, normaliser = normalised_recurrence(
            q.unflatten(-1, heads),  # [B,T,H,K]
            (k * log_i.exp().unsqueeze(-1)).to(x.dtype),
            v.unflatten(-1, heads),
            log_f,  # [B,T,H]
            state=past.get("recurrent"),
            normaliser=past.get("normaliser"),
            cu_seqlens=cu_seqlens,
        )
        h = h / (torch.maximum(n.abs(), (-m).exp()) + 1e-6).unsqueeze(-1)
        weight = self.norm_weight.to(x.dtype)
        h = layer_norm(h.to(x.dtype).flatten(-2), self.head_dim, weight, None, self.norm_eps)
        y = project(self.down_proj, torch.addcmul(h, self.skip.to(x.dtype), c) * F.silu(z))
        new = {"recurrent": recurrent, "normaliser": normaliser, "maximum": maximum}
        return y, {"conv": conv, **new}
