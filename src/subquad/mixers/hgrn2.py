"""HGRN-2: a forget gate whose complement is the key, and never forgets all in higher layers.

B batch   T time   H heads   K = V head size
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.engines import linear_recurrence
from subquad.layers.initialization import no_weight_decay
from subquad.layers.norms import RMSNorm, at_least_float32
from subquad.layers.projection import project
from subquad.layers.traceable import traceable
from subquad.mixers.base import Depth, Mixer, State, divide


@traceable
class LowerBounds(nn.Module):
    """The least that each layer's channels keep: a running sum of a softmax over layers.

    Qin et al. 2023 (HGRN, arXiv:2311.04823, section 3.2). The first layer's is 0, and no layer's
    is less than the one's before.
    """

    starts_itself = True

    def __init__(self, layers: int, channels: int) -> None:
        super().__init__()
        self.weight = no_weight_decay(nn.Parameter(torch.empty(layers, channels)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, index: int) -> Tensor:
        """Of layer `index` > 0: [channels] in (0, 1), float32."""
        shares = at_least_float32(self.weight).T.softmax(-1)  # [channels,layers]
        return shares[:, 1 : index + 1].sum(-1)


class HGRN2(Mixer):
    """Qin et al. 2024, "HGRN2: Gated Linear RNNs with State Expansion" (arXiv:2404.07904, eq. 5).

        f_t = lb + (1 - lb) sigmoid(Wf x)      S_t = diag(f_t) S_{t-1} + (1 - f_t) v_t^T
        o_t = K^-1/2 S_t^T silu(Wq x)          y = Wo RMSNorm(o)

    lb is shared by the model's layers; a layer by itself, like the first of a model, has none.

    State: recurrent [B,H,K,V] float32.

    Args:
        hidden_size: width of the input and output.
        num_heads: by default one for each 128 channels.
        lower_bounds: whether higher layers keep at least lb.
        norm_eps: of the RMSNorm over all heads.
    """

    row = "hgrn2"
    state_names = ("recurrent",)
    writes_state_in_place = True

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int | None = None,
        lower_bounds: bool = True,
        norm_eps: float = 1e-6,
        depth: Depth | None = None,
    ) -> None:
        super().__init__(hidden_size, num_heads=num_heads)
        self.num_heads = max(1, hidden_size // 128) if num_heads is None else num_heads
        self.head_dim = divide(hidden_size, self.num_heads, "hidden_size", "num_heads")
        self.depth = depth or Depth(0, 1)
        self.in_proj = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.norm = RMSNorm(hidden_size, eps=norm_eps)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.reset_parameters()

    @classmethod
    def shared(cls, hidden_size: int, layers: int, **options: object) -> nn.Module | None:
        wanted = layers > 1 and options.get("lower_bounds", True)
        return LowerBounds(layers, hidden_size) if wanted else None

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        shared: nn.Module | None = None,
    ) -> tuple[Tensor, State]:
        past = self.check_inputs(x, state, cu_seqlens)
        q, f, v = project(self.in_proj, x).chunk(3, dim=-1)
        log_f = F.logsigmoid(at_least_float32(f))
        if shared is not None and self.depth.index > 0:
            bound = shared(self.depth.index)
            log_f = torch.logaddexp(bound.log(), torch.log1p(-bound) + log_f)
        k = (1 - log_f.exp()).to(x.dtype)
        heads = (self.num_heads, self.head_dim)
        o, recurrent = linear_recurrence(
            F.silu(q).unflatten(-1, heads),  # [B,T,H,K]
            k.unflatten(-1, heads),  # [B,T,H,K]
            v.unflatten(-1, heads),  # [B,T,H,V]
            log_decay=log_f.unflatten(-1, heads),  # [B,T,H,K]
            state=past.get("recurrent"),
            cu_seqlens=cu_seqlens,
        )
        return project(self.o_proj, self.norm(o.flatten(-2))), {"recurrent": recurrent}
