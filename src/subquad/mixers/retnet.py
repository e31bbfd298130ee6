"""Multi-scale retention: each head forgets at a fixed pace of its own.

B batch   T time   H heads   K key size   V = value_expand * K value size
"""

import torch
from torch import Tensor, nn

from subquad.engines import linear_recurrence
from subquad.errors import fail
from subquad.layers.norms import NormThenGate
from subquad.layers.projection import project
from subquad.layers.rotary import angles, positions, rotate_pairs
from subquad.mixers.base import Mixer, State, divide


class RetNet(Mixer):
    """Sun et al. 2023, "Retentive Network" (arXiv:2307.08621, eq. 5-8).

        S_t = gamma_h S_{t-1} + k_t v_t^T      o_t = K^-1/2 S_t^T q_t      gamma_h = 1 - 2^(-5-h)
        y = Wo (RMSNorm_head(o) * silu(Wg x))

    q and k are rotated by their position (pairs of neighbours, wavelengths 10000^linspace(0, 1)):
    the complex half of the decay. The paper's code rescales S and o as well, which its norm undoes.

    State: recurrent [B,H,K,V] float32, length [B] int64.

    Args:
        hidden_size: width of the input and output.
        num_heads: heads, from the fastest to forget (h = 0) to the slowest.
        value_expand: value size over key size.
        norm_eps: of the headwise norm, which has no weight.
    """

    row = "retnet"
    state_names = ("recurrent", "length")
    writes_state_in_place = True

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int = 8,
        value_expand: int = 2,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(hidden_size, num_heads=num_heads, value_expand=value_expand)
        self.num_heads = num_heads
        self.head_dim = divide(hidden_size, num_heads, "hidden_size", "num_heads")
        if self.head_dim % 2:
            got = f"{num_heads}, so heads of {self.head_dim}"
            raise fail("num_heads", got, "heads of an even size, to rotate in pairs", "change it")
        self.value_dim = value_expand * hidden_size
        self.in_proj = nn.Linear(hidden_size, 2 * (hidden_size + self.value_dim), bias=False)
        self.norm = NormThenGate(self.value_dim // num_heads, norm_eps, affine=False)
        self.out_proj = nn.Linear(self.value_dim, hidden_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier uniform, gain 2^-2.5 for each input projection and 2^-1 for the output's."""
        sizes = (self.hidden_size, self.hidden_size, self.value_dim, self.value_dim)
        for weight in self.in_proj.weight.split(sizes):
            nn.init.xavier_uniform_(weight, gain=2**-2.5)
        nn.init.xavier_uniform_(self.out_proj.weight, gain=2**-1)

    def log_decay(self, device: torch.device) -> Tensor:
        """log gamma [H] float32."""
        head = torch.arange(self.num_heads, device=device, dtype=torch.float32)
        return torch.log1p(-torch.exp2(-5 - head))

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        past = self.check_inputs(x, state, cu_seqlens)
        H, K = self.num_heads, self.head_dim
        sizes = (2 * self.hidden_size, self.value_dim, self.value_dim)
        qk, v, gate = project(self.in_proj, x).split(sizes, dim=-1)

        position, length = positions(past.get("length"), x, cu_seqlens)
        inverse = 10_000.0 ** -torch.linspace(0, 1, K // 2, device=x.device)
        qk = rotate_pairs(qk.unflatten(-1, (2 * H, K)), *angles(position, inverse))
        q, k = qk.chunk(2, dim=2)  # [B,T,H,K]

        o, recurrent = linear_recurrence(
            q,
            k,
            v.unflatten(-1, (H, -1)),  # [B,T,H,V]
            log_decay=self.log_decay(x.device),
            state=past.get("recurrent"),
            cu_seqlens=cu_seqlens,
        )
        y = self.norm(o.flatten(-2), gate)
        return project(self.out_proj, y), {"recurrent": recurrent, "length": length}
