"""S4D: a diagonal, time-invariant state space a channel; a convolution to train, a step to decode.

B batch   T time   D hidden channels   N state size, as N/2 conjugate pairs
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.engines.invariant.api import diagonal_ssm
from subquad.engines.runtime.validation import check_shape
from subquad.errors import fail
from subquad.layers.initialization import no_weight_decay, set_
from subquad.layers.projection import project
from subquad.mixers.base import Mixer, State
from subquad.ssm.discretize import zero_order_hold
from subquad.ssm.initial import poles


class S4D(Mixer):
    """Gu, Gupta, Goel and Re 2022, "On the parameterization and initialization of diagonal state
    space models" (arXiv:2206.11893, sections 3 and 4; the layer as in its appendix and code).

        h' = A h + u, held over steps dt:  h_t = e^(dt A) h_{t-1} + A^-1 (e^(dt A) - 1) u_t
        y_t = GELU(2 Re(C . h_t) + D u_t)      output = GLU(W y + b)
        A = -exp(log_A_real) + i A_imag

    Published training gives log_dt, log_A_real and A_imag a learning rate of 1e-3 and no weight
    decay; the latter is marked on the parameters.

    State: recurrent [B,D,N/2,2] float32, the real and imaginary parts of h.

    Args:
        hidden_size: width D of the input and output.
        state_size: N, even.
        init: where the poles A start: "legs", "inv", "lin" or "real"; see `subquad.ssm.initial`.
        dt_min, dt_max: the steps start log-uniform between these.
    """

    row = "s4d"
    state_names = ("recurrent",)
    writes_state_in_place = True

    def __init__(
        self,
        hidden_size: int,
        *,
        state_size: int = 64,
        init: str = "lin",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
    ) -> None:
        super().__init__(hidden_size, state_size=state_size)
        if state_size % 2:
            raise fail("state_size", state_size, "an even number", "poles come in pairs")
        if not 0 < dt_min <= dt_max:
            raise fail("dt_min", dt_min, f"0 < dt_min <= dt_max = {dt_max}", "order the two")
        self.steps = (dt_min, dt_max)
        self.init = init
        self.state_size = state_size
        shape = (hidden_size, poles(init, state_size).shape[0])
        self.log_dt = no_weight_decay(nn.Parameter(torch.empty(hidden_size)))
        self.log_A_real = no_weight_decay(nn.Parameter(torch.empty(shape)))
        self.A_imag = no_weight_decay(nn.Parameter(torch.empty(shape)))
        self.C = nn.Parameter(torch.empty(*shape, 2))  # real and imaginary part
        self.D = no_weight_decay(nn.Parameter(torch.empty(hidden_size)))
        self.out_proj = nn.Linear(hidden_size, 2 * hidden_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Steps log-uniform, poles as chosen, C complex normal of variance one, D normal."""
        low, high = (math.log(step) for step in self.steps)
        nn.init.uniform_(self.log_dt, low, high)
        A = poles(self.init, self.state_size).to(self.C.device)
        set_(self.log_A_real, (-A.real).log().expand_as(self.log_A_real))
        set_(self.A_imag, A.imag.expand_as(self.A_imag))
        nn.init.normal_(self.C, std=0.5**0.5)
        nn.init.normal_(self.D)
        self.out_proj.reset_parameters()

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        past = self.check_inputs(x, state, cu_seqlens).get("recurrent")
        if past is not None:
            shape = (past.shape[0], *self.C.shape)
            if past.dtype not in (torch.float32, torch.float64):
                raise fail("state['recurrent']", past.dtype, "float32 or float64", "cast it")
            check_shape("state['recurrent']", past, shape, "[B,D,N/2,2]")
        A = torch.complex(-self.log_A_real.float().exp(), self.A_imag.float())  # [D,N/2]
        log_A_bar, B_bar = zero_order_hold(self.log_dt.float().exp(), A)
        y, recurrent = diagonal_ssm(
            x,
            log_A_bar,
            B_bar,
            torch.view_as_complex(self.C.float()),
            self.D,
            state=None if past is None else torch.view_as_complex(past),
            cu_seqlens=cu_seqlens,
        )
        y = F.glu(project(self.out_proj, F.gelu(y)), dim=-1)
        return y, {"recurrent": torch.view_as_real(recurrent)}
