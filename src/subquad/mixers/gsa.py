"""Gated slot attention: a softmax over a fixed number of slots, each with a forget gate.

B batch   T time   H heads   Hk key heads   K = V head size   M slots
"""

import torch.nn.functional as F
from torch import Tensor, nn

from subquad.engines import linear_recurrence
from subquad.engines.gates.api import log_sigmoid
from subquad.layers.norms import RMSNorm, at_least_float32
from subquad.layers.projection import project
from subquad.mixers.base import Mixer, State, divide


class GSA(Mixer):
    """Zhang et al. 2024, "Gated Slot Attention" (arXiv:2409.07146, eq. 6-9).

        K_t = diag(a_t) K_{t-1} + (1 - a_t) k_t^T      p_t = softmax(K_t q_t)      [M,K], [M]
        V_t = diag(a_t) V_{t-1} + (1 - a_t) v_t^T      o_t = V_t^T p_t             [M,V], [V]
        y = Wo RMSNorm(silu(o))        a_t = sigmoid(Wa x)^{1/8}

    Two matrix recurrences with a softmax between: the first decays along its values (its slots),
    the second along its keys.

    State: keys [B,H,K,M] and values [B,H,M,V], float32.

    Args:
        hidden_size: width of the input and output.
        num_heads: heads of q.
        num_kv_heads: heads of k, v and the gates, a divisor of num_heads (its default).
        num_slots: M, the size of a head by default.
        gate_divisor: 8 in a^{1/8}: the larger, the longer slots remember.
        norm_eps: of the RMSNorm over all heads.
    """

    row = "gsa"
    state_names = ("keys", "values")
    writes_state_in_place = True

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        num_slots: int | None = None,
        gate_divisor: float = 8.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(
            hidden_size, num_heads=num_heads, num_kv_heads=num_kv_heads, num_slots=num_slots
        )
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        divide(num_heads, self.num_kv_heads, "num_heads", "num_kv_heads")
        self.head_dim = divide(hidden_size, num_heads, "hidden_size", "num_heads")
        self.num_slots = self.head_dim if num_slots is None else num_slots
        self.gate_divisor = gate_divisor
        kv = self.num_kv_heads * self.head_dim
        self.sizes = (hidden_size, kv, kv, self.num_kv_heads * self.num_slots)  # q, k, v, gate
        self.in_proj = nn.Linear(hidden_size, sum(self.sizes), bias=False)
        self.norm = RMSNorm(hidden_size, eps=norm_eps)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.reset_parameters()

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        past = self.check_inputs(x, state, cu_seqlens)
        q, k, v, gate = project(self.in_proj, x).split_with_sizes(self.sizes, -1)
        q = F.silu(q).unflatten(-1, (self.num_heads, -1))  # [B,T,H,K]
        k = F.silu(k).unflatten(-1, (self.num_kv_heads, -1))  # [B,T,Hk,K]
        v = F.silu(v).unflatten(-1, (self.num_kv_heads, -1))  # [B,T,Hk,V]
        log_a = log_sigmoid(gate, self.gate_divisor)
        log_a = log_a.unflatten(-1, (self.num_kv_heads, -1))  # [B,T,Hk,M]
        write = (1 - log_a.exp()).to(x.dtype)
        if self.num_kv_heads < self.num_heads:  # each head of q has slots of its own
            k, v, log_a, write = (self._for_each_query(t) for t in (k, v, log_a, write))
        read, keys = linear_recurrence(
            q,
            k,
            write,  # [B,T,H,M]
            value_log_decay=log_a,  # [B,T,H,M]
            scale=1.0,
            state=past.get("keys"),
            cu_seqlens=cu_seqlens,
        )
        o, values = linear_recurrence(
            at_least_float32(read).softmax(-1).to(x.dtype),  # [B,T,H,M]
            write,
            v,
            log_decay=log_a,
            scale=1.0,
            state=past.get("values"),
            cu_seqlens=cu_seqlens,
        )
        y = self.norm(F.silu(o.flatten(-2)))
        return project(self.o_proj, y), {"keys": keys, "values": values}

    def _for_each_query(self, t: Tensor) -> Tensor:
        """[B,T,Hk,D] -> [B,T,H,D]."""
        times = self.num_heads // self.num_kv_heads
        return t.unsqueeze(3).expand(-1, -1, -1, times, -1).flatten(2, 3)
