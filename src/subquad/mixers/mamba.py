"""Mamba: a diagonal recurrence whose step size, input and output weights depend on the token.

B batch   T time   D = expand * hidden channels   N state size   R rank of the step size
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.engines.gates.api import silu_product
from subquad.engines.selective.api import selective_scan
from subquad.errors import fail
from subquad.layers.initialization import no_weight_decay, set_, set_step_size_
from subquad.layers.norms import at_least_float32
from subquad.layers.projection import project
from subquad.layers.short_convolution import ShortConvolution
from subquad.mixers.base import Mixer, State


class Mamba(Mixer):
    """Gu and Dao 2023, "Mamba" (arXiv:2312.00752, algorithm 2 and figure 3).

        [x, z] = W_in u      x = silu(conv(x))      [r, B, C] = W_x x      dt = softplus(W_dt r + b)
        h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t      y_t = C_t . h_t + D x_t      A = -exp(A_log)
        output = W_out (y * silu(z))

    State: recurrent [B,D,N] float32, conv [B,W-1,D].

    Args:
        hidden_size: width of the input and output.
        expand: width of x and z over hidden_size.
        state_size: N.
        dt_rank: R; "auto" is hidden_size / 16, rounded up.
        conv_width: taps W of the convolution over time.
        conv_bias, bias: whether the convolution, and the input and output projections, have a bias.
        dt_min, dt_max, dt_floor: the steps start log-uniform in [dt_min, dt_max], none below floor.
    """

    row = "mamba"
    state_names = ("conv", "recurrent")
    writes_state_in_place = True
    has_channel_mixing = True
    shrunk_by_depth = ("out_proj.weight",)

    def __init__(
        self,
        hidden_size: int,
        *,
        expand: int = 2,
        state_size: int = 16,
        dt_rank: int | str = "auto",
        conv_width: int = 4,
        conv_bias: bool = True,
        bias: bool = False,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_floor: float = 1e-4,
    ) -> None:
        super().__init__(
            hidden_size,
            expand=expand,
            state_size=state_size,
            dt_rank=None if dt_rank == "auto" else dt_rank,
            conv_width=conv_width,
        )
        rank = -(-hidden_size // 16) if dt_rank == "auto" else dt_rank
        if not 0 < dt_min <= dt_max:
            raise fail("dt_min", dt_min, f"0 < dt_min <= dt_max = {dt_max}", "order the two")
        inner, rank = expand * hidden_size, int(rank)
        self.steps = (dt_min, dt_max, dt_floor)
        self.sizes = (rank, state_size, state_size)  # r, B, C
        self.in_proj = nn.Linear(hidden_size, 2 * inner, bias=bias)
        self.conv = ShortConvolution(inner, conv_width, bias=conv_bias)
        self.x_proj = nn.Linear(inner, rank + 2 * state_size, bias=False)
        self.dt_proj = nn.Linear(rank, inner, bias=False)
        self.dt_bias = no_weight_decay(nn.Parameter(torch.empty(inner)))
        self.A_log = no_weight_decay(nn.Parameter(torch.empty(inner, state_size)))
        self.D = no_weight_decay(nn.Parameter(torch.empty(inner)))
        self.out_proj = nn.Linear(inner, hidden_size, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A = -1..-N in each channel (S4D-Real), steps log-uniform, W_dt within R^-1/2, D one."""
        for child in (self.in_proj, self.conv, self.x_proj, self.out_proj):
            child.reset_parameters()
        bound = self.dt_proj.in_features**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        set_step_size_(self.dt_bias, *self.steps)
        rates = torch.arange(1, self.A_log.shape[1] + 1, device=self.A_log.device)
        set_(self.A_log, rates.log().expand_as(self.A_log))
        nn.init.ones_(self.D)

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        past = self.check_inputs(x, state, cu_seqlens)
        x, z = project(self.in_proj, x).chunk(2, dim=-1)  # [B,T,D]
        x, conv = self.conv(x, past.get("conv"), cu_seqlens)
        r, B, C = project(self.x_proj, x).split_with_sizes(self.sizes, -1)
        # In float32 also under autocast: small steps are what a long memory is made of.
        dt = at_least_float32(project(self.dt_proj, r)) + self.dt_bias  # [B,T,D]
        A = -at_least_float32(self.A_log).exp()
        y, recurrent = selective_scan(
            x, F.softplus(dt), A, B, C, self.D, state=past.get("recurrent"), cu_seqlens=cu_seqlens
        )
        return project(self.out_proj, silu_product(z, y)), {"conv": conv, "recurrent": recurrent}
