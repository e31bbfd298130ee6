"""DeltaNet: before it writes, a token erases what its key already holds.

B batch   T time   H heads   K = V head size
"""

from torch import Tensor, nn

from subquad.engines import Delta, linear_recurrence
from subquad.engines.norm.api import l2_norm
from subquad.layers.norms import RMSNorm, at_least_float32
from subquad.layers.projection import project
from subquad.layers.short_convolution import ShortConvolution
from subquad.mixers.base import Mixer, State, divide


class DeltaNet(Mixer):
    """Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule" (arXiv:2406.06484).

        q, k, v = silu(conv(Wq x, Wk x, Wv x))      q, k to norm 1      beta = sigmoid(Wb x)
        S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T      o_t = K^-1/2 S_t^T q_t
        y = Wo RMSNorm_head(o)

    With `allow_negative_eigenvalues` beta is doubled, so that the transition 1 - beta k k^T may
    reflect and the layer can track states such as parity (Grazzi et al. 2024, arXiv:2411.12537).

    State: recurrent [B,H,K,V] float32, conv [B,W-1,3*hidden_size].

    Args:
        hidden_size: width of the input and output.
        num_heads: by default one for each 128 channels.
        conv_width: taps W of the convolution over time.
        allow_negative_eigenvalues: beta in [0, 2] instead of [0, 1].
        norm_eps: of the headwise norm.
    """

    row = "deltanet"
    state_names = ("conv", "recurrent")
    writes_state_in_place = True

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int | None = None,
        conv_width: int = 4,
        allow_negative_eigenvalues: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(hidden_size, num_heads=num_heads, conv_width=conv_width)
        self.num_heads = max(1, hidden_size // 128) if num_heads is None else num_heads
        self.head_dim = divide(hidden_size, self.num_heads, "hidden_size", "num_heads")
        self.beta_scale = 2.0 if allow_negative_eigenvalues else 1.0
        self.in_proj = nn.Linear(hidden_size, 3 * hidden_size + self.num_heads, bias=False)
        self.conv = ShortConvolution(3 * hidden_size, conv_width)
        self.norm = RMSNorm(self.head_dim, eps=norm_eps)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.reset_parameters()

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        past = self.check_inputs(x, state, cu_seqlens)
        H = self.num_heads
        qkv, beta = project(self.in_proj, x).split((3 * self.hidden_size, H), dim=-1)
        qkv, conv = self.conv(qkv, past.get("conv"), cu_seqlens)
        beta = at_least_float32(beta).sigmoid() * self.beta_scale  # [B,T,H]
        qk, v = qkv.split((2 * self.hidden_size, self.hidden_size), dim=-1)
        qk = l2_norm(qk, self.head_dim).unflatten(-1, (2 * H, self.head_dim))
        q, k = qk.chunk(2, dim=2)  # [B,T,H,K]
        o, recurrent = linear_recurrence(
            q,
            k,
            v.unflatten(-1, (H, self.head_dim)),  # [B,T,H,V]
            erase=Delta(beta),
            state=past.get("recurrent"),
            cu_seqlens=cu_seqlens,
        )
        return project(self.o_proj, self.norm(o).flatten(-2)), {
            "conv": conv,
            "recurrent": recurrent,
        }
