"""Gated linear attention: every key channel forgets at a pace that the token decides.

B batch   T time   H heads   K key size   V value size
"""

from torch import Tensor, nn

from subquad.engines import linear_recurrence
from subquad.engines.gates.api import log_sigmoid
from subquad.errors import fail
from subquad.layers.initialization import no_weight_decay
from subquad.layers.norms import NormThenGate
from subquad.layers.projection import project
from subquad.mixers.base import Mixer, State, divide


class GLA(Mixer):
    """Yang et al. 2023, "Gated Linear Attention Transformers" (arXiv:2312.06635, section 4.4).

        alpha_t = sigmoid(W2 W1 x_t + b)^(1/16)
        S_t = diag(alpha_t) S_{t-1} + k_t v_t^T      o_t = K^-1/2 S_t^T q_t
        y = Wo (RMSNorm_head(o) * silu(Wg x))

    State: recurrent [B,H,K,V] float32.

    Args:
        hidden_size: width of the input, the output and the values.
        num_heads: heads; keys are half as wide as values.
        gate_rank: rank of the forget gate's projection W2 W1.
        gate_temperature: the 16 of the formula; larger forgets more slowly.
        norm_eps: of the headwise norm.
    """

    row = "gla"
    state_names = ("recurrent",)
    writes_state_in_place = True

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int = 4,
        gate_rank: int = 16,
        gate_temperature: float = 16.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(hidden_size, num_heads=num_heads, gate_rank=gate_rank)
        if not gate_temperature > 0:
            raise fail("gate_temperature", gate_temperature, "a positive number", "16 is published")
        divide(hidden_size, 2 * num_heads, "hidden_size", "2 * num_heads")
        self.num_heads = num_heads
        self.gate_temperature = gate_temperature
        self.key_dim = hidden_size // 2
        self.sizes = (self.key_dim, self.key_dim, hidden_size, hidden_size, gate_rank)
        self.in_proj = nn.Linear(hidden_size, sum(self.sizes), bias=False)  # [q, k, v, g, W1 x]
        self.decay_proj = nn.Linear(gate_rank, self.key_dim)
        no_weight_decay(self.decay_proj.bias)
        self.norm = NormThenGate(hidden_size // num_heads, norm_eps)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.reset_parameters()

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        past = self.check_inputs(x, state, cu_seqlens)
        heads = (self.num_heads, -1)
        q, k, v, gate, low = project(self.in_proj, x).split_with_sizes(self.sizes, -1)
        log_decay = log_sigmoid(project(self.decay_proj, low), self.gate_temperature)
        o, recurrent = linear_recurrence(
            q.unflatten(-1, heads),  # [B,T,H,K]
            k.unflatten(-1, heads),  # [B,T,H,K]
            v.unflatten(-1, heads),  # [B,T,H,V]
            log_decay=log_decay.unflatten(-1, heads),  # [B,T,H,K]
            state=past.get("recurrent"),
            cu_seqlens=cu_seqlens,
        )
        return project(self.o_proj, self.norm(o.flatten(-2), gate)), {"recurrent": recurrent}
