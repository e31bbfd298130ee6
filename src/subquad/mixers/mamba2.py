"""Mamba-2: one decay a head and token, keys and queries shared by groups of heads.

B batch   T time   H heads   G groups   P head size   N state size (the key size)
"""

import torch
from torch import Tensor, nn

from subquad.engines import linear_recurrence
from subquad.engines.step_size.api import discretize
from subquad.layers.initialization import no_weight_decay, set_log_uniform_, set_step_size_
from subquad.layers.norms import GateThenNorm
from subquad.layers.projection import project
from subquad.layers.short_convolution import ShortConvolution
from subquad.mixers.base import Mixer, State, divide


class Mamba2(Mixer):
    """Dao and Gu 2024, "Transformers are SSMs" (arXiv:2405.21060, section 7 and figure 6).

        [z, x, B, C, dt] = W_in u      x, B, C = silu(conv(x, B, C))      dt = softplus(dt + bias)
        S_t = exp(-dt_t A_h) S_{t-1} + B_t (dt_t x_t)^T      y_t = S_t^T C_t + D_h x_t
        output = W_out RMSNorm_group(y * silu(z))

    In the words of the matrix recurrence: q = C, k = B, v = dt x and log_decay = -dt A. B and C
    belong to groups of heads, as keys shared by query heads do.

    State: recurrent [B,H,N,P] float32, conv [B,W-1,HP+2GN].

    Args:
        hidden_size: width of the input and output.
        expand: width of x and z over hidden_size.
        head_dim: P; the number of heads is expand * hidden_size / head_dim.
        state_size: N.
        num_groups: G, how many B and C the heads share, and how many norms the output has.
        conv_width: taps W of the convolution over time.
        conv_bias, bias: whether the convolution, and the two projections, have a bias.
        norm_eps: of the gated norm.
    """

    row = "mamba2"
    state_names = ("conv", "recurrent")
    writes_state_in_place = True
    has_channel_mixing = True
    shrunk_by_depth = ("out_proj.weight",)

    def __init__(
        self,
        hidden_size: int,
        *,
        expand: int = 2,
        head_dim: int = 64,
        state_size: int = 128,
        num_groups: int = 1,
        conv_width: int = 4,
        conv_bias: bool = True,
        bias: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(
            hidden_size,
            expand=expand,
            head_dim=head_dim,
            state_size=state_size,
            num_groups=num_groups,
            conv_width=conv_width,
        )
        inner = expand * hidden_size
        self.num_heads = divide(inner, head_dim, "expand * hidden_size", "head_dim")
        divide(self.num_heads, num_groups, "the number of heads", "num_groups")
        self.head_dim = head_dim
        self.state_size = state_size
        shared = num_groups * state_size
        self.sizes = (inner, inner + 2 * shared, self.num_heads)  # z, xBC, dt
        self.conv_sizes = (inner, shared, shared)  # x, B, C
        self.in_proj = nn.Linear(hidden_size, sum(self.sizes), bias=bias)
        self.conv = ShortConvolution(self.sizes[1], conv_width, bias=conv_bias)
        self.dt_bias = no_weight_decay(nn.Parameter(torch.empty(self.num_heads)))
        self.A_log = no_weight_decay(nn.Parameter(torch.empty(self.num_heads)))
        self.D = no_weight_decay(nn.Parameter(torch.empty(self.num_heads)))
        self.norm = GateThenNorm(inner, num_groups, norm_eps)
        self.out_proj = nn.Linear(inner, hidden_size, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each child's standard start; A uniform in [1, 16], steps log-uniform, D one."""
        for child in (self.in_proj, self.conv, self.norm, self.out_proj):
            child.reset_parameters()
        set_step_size_(self.dt_bias)
        set_log_uniform_(self.A_log, 1.0, 16.0)
        nn.init.ones_(self.D)

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        past = self.check_inputs(x, state, cu_seqlens)
        B, T, _ = x.shape
        z, xBC, dt = project(self.in_proj, x).split_with_sizes(self.sizes, -1)
        xBC, conv = self.conv(xBC, past.get("conv"), cu_seqlens)
        x, k, q = xBC.split_with_sizes(self.conv_sizes, -1)
        x = x.view(B, T, self.num_heads, self.head_dim)
        v, log_decay = discretize(x, dt, self.dt_bias, self.A_log)  # [B,T,H,P], [B,T,H]
        y, recurrent = linear_recurrence(
            q.view(B, T, -1, self.state_size),  # [B,T,G,N]
            k.view(B, T, -1, self.state_size),  # [B,T,G,N]
            v,
            log_decay=log_decay,
            scale=1.0,
            state=past.get("recurrent"),
            cu_seqlens=cu_seqlens,
        )
        y = self.norm(y, x, self.D, z)
        return project(self.out_proj, y), {"conv": conv, "recurrent": recurrent}
