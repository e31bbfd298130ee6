"""A row of your own, on a recall task that it learns only with the short convolution.

python examples/own_row.py
"""

import torch
from torch import Tensor, nn

import subquad
from subquad.mixers import Mixer, RMSNorm, ShortConvolution, State, divide, l2_norm, register
from subquad.tasks import TaskModel, get, score

KIND = subquad.Recurrence(decay="token_key")  # what the table prints; it decides nothing


@register(subquad.Row("leaky_memory", KIND, paper="examples/own_row.py"))
class LeakyMemory(Mixer):
    """Linear attention whose key channels forget at a pace that the token decides."""

    state_names = ("conv", "recurrent")

    def __init__(self, hidden_size: int, *, num_heads: int = 4, conv_width: int = 4) -> None:
        super().__init__(hidden_size, num_heads=num_heads, conv_width=conv_width)
        self.heads = (num_heads, divide(hidden_size, num_heads, "hidden_size", "num_heads"))
        self.in_proj = nn.Linear(hidden_size, 4 * hidden_size, bias=False)
        self.conv = ShortConvolution(3 * hidden_size, conv_width)  # lets a key meet its value
        self.norm = RMSNorm(self.heads[1])
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.reset_parameters()

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        past = self.check_inputs(x, state, cu_seqlens)
        qkv, gate = self.in_proj(x).split((3 * self.hidden_size, self.hidden_size), dim=-1)
        qkv, conv = self.conv(qkv, past.get("conv"), cu_seqlens)
        q, k, v = (part.unflatten(-1, self.heads) for part in qkv.chunk(3, dim=-1))  # [B,T,H,K]
        log_decay = nn.functional.logsigmoid(gate.float() + 4)  # float32, near 0: forget slowly
        o, recurrent = subquad.linear_recurrence(
            q,
            l2_norm(k, self.heads[1]),
            v,
            log_decay=log_decay.unflatten(-1, self.heads),
            state=past.get("recurrent"),
            cu_seqlens=cu_seqlens,
        )
        return self.out_proj(self.norm(o).flatten(-2)), {"conv": conv, "recurrent": recurrent}


def main() -> None:
    task = get("associative_recall", keys=4, pairs=8)  # which value went with this key?
    found = {}
    for width in (4, 1):  # a convolution of one tap sees nothing but its own token
        torch.manual_seed(0)
        model = TaskModel(
            task,
            mixer="leaky_memory",
            mixer_options={"leaky_memory": {"conv_width": width}},
            hidden_size=32,
            num_hidden_layers=1,
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(150):
            batch = task.sample(32, seed=0, step=step)
            loss = model.loss(batch.inputs, *batch.answers())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found[width] = score(model, task, task.test_batches(256)).accuracy
        print(f"a convolution of {width} tap(s): {found[width]:.2f} of the answers right")
    assert found[4] > 0.9 > 0.7 > found[1]


if __name__ == "__main__":
    main()
