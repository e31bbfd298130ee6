"""The MLP beside a mixer, which mixes channels."""

from torch import Tensor, nn

from subquad.engines.gates.api import silu_product
from subquad.layers.projection import project
from subquad.layers.traceable import traceable


@traceable
class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): Shazeer 2020, "GLU Variants Improve Transformer", eq. 6."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return project(self.down, silu_product(project(self.gate, x), project(self.up, x)))
