"""Gated DeltaNet: Mamba-2's decay forgets everything a little, the delta rule one key precisely.

B batch   T time   Hk key heads   H value heads   K key size   V value size
"""

import torch
from torch import Tensor, nn

from subquad.engines import Delta, linear_recurrence
from subquad.engines.norm.api import l2_norm
from subquad.engines.step_size.api import step_decay
from subquad.errors import fail
from subquad.layers.initialization import no_weight_decay, set_log_uniform_, set_step_size_
from subquad.layers.norms import NormThenGate, at_least_float32
from subquad.layers.projection import project
from subquad.layers.short_convolution import ShortConvolution
from subquad.mixers.base import Mixer, State, divide


class GatedDeltaNet(Mixer):
    """Yang, Kautz and Hatamizadeh 2024, "Gated Delta Networks" (arXiv:2412.06464, eq. 10).

        q, k, v = silu(conv(Wq x, Wk x, Wv x))      q, k to norm 1      beta = sigmoid(Wb x)
        g = -A softplus(Wa x + dt_bias)
        S' = exp(g_t) S_{t-1};  S_t = S' + beta_t k_t (v_t - S'^T k_t)^T      o_t = K^-1/2 S_t^T q_t
        y = Wo (RMSNorm_head(o) * silu(Wg x))

    State: recurrent [B,H,K,V] float32, conv [B,W-1,2*Hk*K+H*V].

    Args:
        hidden_size: width of the input and output.
        num_heads: Hk, heads of queries and keys.
        num_v_heads: H, heads of values, a multiple of num_heads (its default): Qwen3-Next has 32
            for 16 of keys.
        head_dim: K; by default such that the key heads are 0.75 * hidden_size wide together.
        expand_v: V over K.
        value_head_dim: V itself, instead of expand_v.
        conv_width: taps W of the convolution over time.
        allow_negative_eigenvalues: beta in [0, 2] instead of [0, 1] (arXiv:2411.12537).
        norm_eps: of the headwise norm.
    """

    row = "gated_deltanet"
    state_names = ("conv", "recurrent")
    writes_state_in_place = True

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int = 6,
        num_v_heads: int | None = None,
        head_dim: int | None = None,
        expand_v: float = 2.0,
        value_head_dim: int | None = None,
        conv_width: int = 4,
        allow_negative_eigenvalues: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(
            hidden_size,
            num_heads=num_heads,
            num_v_heads=num_v_heads,
            head_dim=head_dim,
            value_head_dim=value_head_dim,
            conv_width=conv_width,
        )
        self.num_heads = num_heads
        self.num_v_heads = num_heads if num_v_heads is None else num_v_heads
        if self.num_v_heads % num_heads:
            expected = f"a multiple of num_heads = {num_heads}"
            raise fail("num_v_heads", self.num_v_heads, expected, "change one of the two")
        if head_dim is None:
            head_dim = divide(3 * hidden_size, 4 * num_heads, "3 * hidden_size", "4 * num_heads")
        self.head_dim = head_dim
        if value_head_dim is None:
            value_head_dim = round(expand_v * head_dim)
            # 120/88 of 88 is 119.99999999999999: a factor cannot say every whole number exactly.
            if value_head_dim < 1 or abs(value_head_dim - expand_v * head_dim) > 1e-6 * head_dim:
                expected = f"a factor that gives head_dim = {head_dim} a whole number of values"
                raise fail("expand_v", expand_v, expected, "change it, or pass value_head_dim")
        self.value_head_dim = value_head_dim
        self.beta_scale = 2.0 if allow_negative_eigenvalues else 1.0

        H = self.num_v_heads
        keys, values = num_heads * head_dim, H * self.value_head_dim
        self.conv_sizes = (2 * keys, values)  # [q, k], v
        self.sizes = (2 * keys + values, values, H, H)  # [q, k, v], gate, b, a
        self.in_proj = nn.Linear(hidden_size, sum(self.sizes), bias=False)
        self.conv = ShortConvolution(2 * keys + values, conv_width)
        self.A_log = no_weight_decay(nn.Parameter(torch.empty(H)))
        self.dt_bias = no_weight_decay(nn.Parameter(torch.empty(H)))
        self.norm = NormThenGate(self.value_head_dim, norm_eps)
        self.o_proj = nn.Linear(values, hidden_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A uniform in (0, 16], steps log-uniform as Mamba's, the rest as the base class."""
        super().reset_parameters()
        set_log_uniform_(self.A_log, 1e-2, 16.0)  # away from 0, whose logarithm is -inf
        set_step_size_(self.dt_bias)

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        past = self.check_inputs(x, state, cu_seqlens)
        B, T, _ = x.shape
        qkv, gate, b, a = project(self.in_proj, x).split_with_sizes(self.sizes, -1)
        qkv, conv = self.conv(qkv, past.get("conv"), cu_seqlens)
        qk, v = qkv.split_with_sizes(self.conv_sizes, -1)
        qk = l2_norm(qk, self.head_dim).view(B, T, -1, self.head_dim)
        q, k = qk.chunk(2, dim=2)  # [B,T,Hk,K]
        beta = at_least_float32(b).sigmoid() * self.beta_scale  # [B,T,H]
        o, recurrent = linear_recurrence(
            q,
            k,
            v.view(B, T, self.num_v_heads, -1),  # [B,T,H,V]
            log_decay=step_decay(a, self.dt_bias, self.A_log),  # [B,T,H]
            erase=Delta(beta),
            state=past.get("recurrent"),
            cu_seqlens=cu_seqlens,
        )
        return project(self.o_proj, self.norm(o.flatten(-2), gate)), {
            "conv": conv,
            "recurrent": recurrent,
        }
