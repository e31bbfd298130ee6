"""RWKV-7 "Goose": a state that each token can erase along one direction and write along another.

B batch   T time   H heads   K = V head size
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from subquad.engines import LowRank, linear_recurrence
from subquad.engines.norm.api import l2_norm
from subquad.engines.norm.layer import layer_norm
from subquad.layers.block_layout import BlockLayout
from subquad.layers.initialization import no_weight_decay, set_
from subquad.layers.low_rank import LowRankProjection
from subquad.layers.norms import at_least_float32
from subquad.layers.projection import project
from subquad.layers.token_shift import token_shift
from subquad.mixers.base import Depth, Mixer, State, divide

_MIX_POWERS = (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)  # of the mixes that feed r, w, k, v, a and g


class RWKV7(Mixer):
    """Peng et al. 2025, "RWKV-7 Goose with expressive dynamic state evolution" (arXiv:2503.14456,
    eq. 4-22).

        S_t = diag(w_t) S_{t-1} - (kappa_t * a_t) (kappa_t^T S_{t-1}) + k_t v_t^T
        o_t = S_t^T r_t            w_t = exp(-e^{-1/2} sigmoid(.)),  a_t = sigmoid(.)
        y = Wo (g * (GroupNorm(o) + (r . (rho * k)) v))

    r, w, k, v, a and g each come from a mix of the token with the one before. kappa is k of norm 1,
    k is scaled by 1 + (a - 1) k_a. Layers after the first mix their values with the first layer's.

    State: shift [B,1,hidden], recurrent [B,H,K,V] float32.

    Args:
        hidden_size: width of the input and output, a multiple of head_dim.
        head_dim: size of a head; by default 64, or as much of it as divides hidden_size.
        decay_rank, rate_rank, value_rank, gate_rank: inner sizes of the low-rank projections to w,
            a, the mix with the first layer's values, and g. None: as published, by hidden_size.
        norm_eps: of the group norm.
    """

    row = "rwkv7"
    state_names = ("shift", "recurrent")
    writes_state_in_place = True
    layout = BlockLayout(norm="layer", channel_mixer="rwkv7", embed_norm=True)
    carries: ClassVar[tuple[str, ...]] = ("v_first",)

    def __init__(
        self,
        hidden_size: int,
        *,
        head_dim: int | None = None,
        decay_rank: int | None = None,
        rate_rank: int | None = None,
        value_rank: int | None = None,
        gate_rank: int | None = None,
        norm_eps: float = 64e-5,
        depth: Depth | None = None,
    ) -> None:
        ranks = {"decay_rank": decay_rank, "rate_rank": rate_rank}
        ranks |= {"value_rank": value_rank, "gate_rank": gate_rank}
        super().__init__(hidden_size, head_dim=head_dim, **ranks)
        head_dim = math.gcd(64, hidden_size) if head_dim is None else head_dim
        self.head_dim = head_dim
        self.num_heads = divide(hidden_size, head_dim, "hidden_size", "head_dim")
        self.norm_eps = norm_eps
        self.depth = depth or Depth(0, 1)
        C = hidden_size
        self.mix = no_weight_decay(nn.Parameter(torch.empty(len(_MIX_POWERS), C)))
        self.r_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(C, C, bias=False) for _ in range(4)
        )
        self.w_lora = LowRankProjection(C, decay_rank or published_rank(C, 2.5), C, "tanh")
        self.a_lora = LowRankProjection(C, rate_rank or published_rank(C, 2.5), C)
        self.v_lora = None
        if self.depth.index > 0:
            self.v_lora = LowRankProjection(C, value_rank or published_rank(C, 1.7), C)
        self.g_lora = LowRankProjection(C, gate_rank or published_rank(C, 5), C, "sigmoid", False)
        self.k_k = no_weight_decay(nn.Parameter(torch.empty(C)))
        self.k_a = no_weight_decay(nn.Parameter(torch.empty(C)))
        self.r_k = no_weight_decay(nn.Parameter(torch.empty(self.num_heads, head_dim)))
        self.norm_weight = no_weight_decay(nn.Parameter(torch.empty(C)))
        self.norm_bias = no_weight_decay(nn.Parameter(torch.empty(C)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the paper's training code: paces, rates and mixes by channel and depth, no output."""
        C, depth = self.hidden_size, self.depth
        remaining = 1 - depth.index / depth.total
        channel = torch.arange(C, dtype=torch.float32)
        powers = torch.tensor(_MIX_POWERS)[:, None] * remaining
        set_(self.mix, 1 - (channel / C) ** powers)
        linear = channel / max(1, C - 1) - 0.5
        zigzag = (channel % self.head_dim) / max(1, self.head_dim - 1) * 2 - 1
        zigzag = zigzag * zigzag.abs()
        pace = -6 + 6 * (linear + 0.5) ** (1 + depth.fraction**0.3)
        self.w_lora.reset(pace + 0.5 + 2.5 * zigzag)
        self.a_lora.reset(-0.19 + 0.3 * zigzag + 0.4 * linear)
        if self.v_lora is not None:
            self.v_lora.reset(0.73 - 0.4 * linear)
        self.g_lora.reset(None)
        set_(self.k_k, 0.71 - 0.1 * linear)
        set_(self.k_a, torch.full((C,), 1.02))
        set_(self.r_k, torch.full((self.num_heads, self.head_dim), -0.04))
        set_(self.norm_weight, torch.full((C,), ((1 + depth.index) / depth.total) ** 0.7))
        nn.init.zeros_(self.norm_bias)
        for proj, size in ((self.r_proj, 0.5), (self.k_proj, 0.05), (self.v_proj, 0.5)):
            nn.init.uniform_(proj.weight, -size * C**-0.5, size * C**-0.5)
        nn.init.zeros_(self.o_proj.weight)

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        carried: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, State]:
        past = self.check_inputs(x, state, cu_seqlens)
        heads = (self.num_heads, self.head_dim)
        before, shift = token_shift(x, past.get("shift"), cu_seqlens)
        apart = before - x
        mixes = self.mix.to(x.dtype).unbind()
        xr, xw, xk, xv, xa, xg = (torch.addcmul(x, apart, mix) for mix in mixes)
        r, k, v = project(self.r_proj, xr), project(self.k_proj, xk), project(self.v_proj, xv)
        log_w = -math.exp(-0.5) * at_least_float32(self.w_lora(xw)).sigmoid()
        a = self.a_lora(xa).sigmoid()
        if carried is not None and "v_first" not in carried:
            carried["v_first"] = v
        elif carried is not None and self.v_lora is not None:
            v = v + (carried["v_first"] - v) * self.v_lora(xv).sigmoid()
        kappa = l2_norm(k * self.k_k.to(x.dtype), self.head_dim, 1e-24).unflatten(-1, heads)
        k = k + k * (a - 1) * self.k_a.to(x.dtype)
        r, k, v, a = (t.unflatten(-1, heads) for t in (r, k, v, a))  # [B,T,H,K]
        o, recurrent = linear_recurrence(
            r,
            k,
            v,
            log_decay=log_w.unflatten(-1, heads),
            erase=LowRank(-kappa, kappa * a),
            scale=1.0,
            state=past.get("recurrent"),
            cu_seqlens=cu_seqlens,
        )
        weight, bias = self.norm_weight.to(x.dtype), self.norm_bias.to(x.dtype)
        o = layer_norm(o.flatten(-2), self.head_dim, weight, bias, self.norm_eps)
        own = (r * k * self.r_k.to(x.dtype)).sum(-1, keepdim=True) * v  # the token's own value
        y = (o + own.flatten(-2)) * self.g_lora(xg)
        return project(self.o_proj, y), {"shift": shift, "recurrent": recurrent}


def published_rank(hidden_size: int, factor: float) -> int:
    """factor * sqrt(hidden_size) to the nearest multiple of 32, at least 32."""
    return max(32, round(factor * hidden_size**0.5 / 32) * 32)
