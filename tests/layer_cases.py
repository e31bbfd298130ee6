"""Work for the GPU kernels beside the scan, shared by the interpreter's tests and the device's.

One decoded token of the matrix recurrence, the short convolution, gated norms, gates, losses:
inputs, what the kernels make of them, and what PyTorch does (in float64 that is the truth).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.engines.convolution import gpu as short_convolution
from subquad.engines.convolution.api import _convolve
from subquad.engines.cross_entropy import gpu as loss
from subquad.engines.gates import gpu as activation
from subquad.engines.matrix import reference
from subquad.engines.matrix.gpu import step as matrix_step
from subquad.engines.norm import gpu as norm
from subquad.engines.norm.api import _plain
from subquad.engines.step_size import gpu as timestep

Run = Callable[..., tuple[Tensor, ...]]


@dataclass
class Work:
    ours: Run
    torch_form: Run  # in the precision of what it gets, but float32 sums where the library promises
    inputs: dict[str, Tensor | None]
    keep: tuple[str, ...] = field(default=())  # inputs that are float32 whatever the others are

    def results(self, run: Run, device: str, dtype: torch.dtype, wide: bool = False) -> dict:
        """Outputs and gradients of `run` on inputs rounded to dtype; wide: computed in float64."""
        leaves: dict[str, Tensor | None] = {}
        for name, x in self.inputs.items():
            if x is not None:
                x = (x if name in self.keep else x.to(dtype)).to(device)
                x = (x.double() if wide else x).requires_grad_()
            leaves[name] = x
        outputs = run(**leaves)
        found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
        if outputs[0].requires_grad:
            torch.manual_seed(1)
            dys = [torch.randn(y.shape).to(dtype).to(y) for y in outputs]
            given = {name: x for name, x in leaves.items() if x is not None}
            grads = torch.autograd.grad(outputs, list(given.values()), dys)
            found |= {f"d{name}": g for name, g in zip(given, grads)}
        return found


def errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of each result; NaN stays NaN."""
    return {
        name: ((x.double() - truth[name]).norm() / truth[name].norm()).item()
        for name, x in found.items()
    }


def _strided(*shape: int) -> Tensor:
    """Random numbers whose rows lie apart, as the parts of a projection do."""
    return torch.randn(*shape[:-1], shape[-1] + 16)[..., : shape[-1]]


# ---- one decoded token

GATES = ("none", "[H]", "[H,K]", "[B,T,H]", "[B,T,H,K]")
EXTRAS = ("none", "delta", "low rank", "bonus")


def token(
    gate: str = "none", extra: str = "none", B: int = 2, H: int = 4, Hk: int = 2, K: int = 20,
    V: int = 40, state: bool = True, in_place: bool = False,
) -> Work:  # fmt: skip
    torch.manual_seed(0)
    shapes = {"[H]": (H,), "[H,K]": (H, K), "[B,T,H]": (B, 1, H), "[B,T,H,K]": (B, 1, H, K)}
    a, b = torch.randn(2, B, 1, H, K).unbind(0)
    inputs = {
        "q": _strided(B, 1, Hk, K), "k": _strided(B, 1, Hk, K), "v": _strided(B, 1, H, V),
        "log_decay": None if gate == "none" else -3 * torch.rand(shapes[gate]) ** 2,
        "beta": torch.rand(B, 1, H) if extra == "delta" else None,
        "a": a / K if extra == "low rank" else None, "b": b if extra == "low rank" else None,
        "bonus": torch.randn(H, K) if extra == "bonus" else None,
        "state": torch.randn(B, H, K, V) if state else None,
    }  # fmt: skip

    def ours(state, **given):
        with torch.no_grad():
            if in_place:
                new = state.clone()
                return matrix_step.step_(*given.values(), 0.3, new), new
            return matrix_step.step(*given.values(), 0.3, state)

    @torch.no_grad()
    def torch_form(q, k, v, log_decay, beta, a, b, bonus, state):
        kept = torch.float64 if v.dtype == torch.float64 else torch.float32
        given = [None if x is None else x.to(kept) for x in (q, k, v, log_decay, bonus, state)]
        erase = None if beta is None else reference.Delta(beta.to(kept))
        if a is not None:
            erase = reference.LowRank(a.to(kept), b.to(kept))
        if state is None:
            given[5] = v.new_zeros(B, H, K, V, dtype=kept)
        o, final = reference.loop(given[0] * 0.3, *given[1:4], erase, *given[4:], None)
        return o.to(v.dtype), final

    return Work(ours, torch_form, inputs, keep=("log_decay", "beta", "bonus", "state"))


# ---- the short convolution


def convolution(
    B: int = 2, T: int = 70, D: int = 20, W: int = 4, silu: bool = True, bias: bool = True,
    state: bool = True, cu_seqlens: tuple[int, ...] | None = None,
) -> Work:  # fmt: skip
    torch.manual_seed(0)
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    inputs = {
        "x": _strided(B, T, D), "weight": torch.randn(D, W),
        "bias": torch.randn(D) if bias else None,
        "state": torch.randn(N, W - 1, D) if state and W > 1 else None,
    }  # fmt: skip

    def bounds(x):
        if cu_seqlens is None:
            return None
        return torch.tensor(cu_seqlens, dtype=torch.int32, device=x.device)

    def ours(x, weight, bias, state):
        return (short_convolution.convolve(x, weight, bias, state, bounds(x), silu),)

    def torch_form(x, weight, bias, state):
        kept = torch.float64 if x.dtype == torch.float64 else torch.float32
        wide = [None if t is None else t.to(kept) for t in (x, weight, bias, state)]
        if state is None:
            wide[3] = x.new_zeros(N, W - 1, D, dtype=kept)
        return (_convolve(*wide, bounds(x), silu).to(x.dtype),)

    return Work(ours, torch_form, inputs)


def convolved_token(
    N: int = 3, D: int = 300, W: int = 4, packed: bool = False, state: bool = True,
    in_place: bool = False,
) -> Work:  # fmt: skip
    torch.manual_seed(0)
    x = _strided(*((1, N) if packed else (N, 1)), D)
    inputs = {
        "x": x, "weight": torch.randn(D, W), "bias": torch.randn(D),
        "state": torch.randn(N, W - 1, D) if state else None,
    }  # fmt: skip

    @torch.no_grad()
    def ours(x, weight, bias, state):
        if in_place:
            new = state.clone()
            return short_convolution.one_token_(x, weight, bias, new, True), new
        return short_convolution.one_token(x, weight, bias, state, True)

    @torch.no_grad()
    def torch_form(x, weight, bias, state):
        if state is None:
            state = x.new_zeros(N, W - 1, D)
        kept = torch.float64 if x.dtype == torch.float64 else torch.float32
        rows = x.view(N, 1, D)
        y = _convolve(*(t.to(kept) for t in (rows, weight, bias, state)), None, True)
        return y.to(x.dtype).view_as(x), torch.cat([state, rows], 1)[:, 1:]

    return Work(ours, torch_form, inputs)


# ---- norms


def gated_norm(
    shape: tuple[int, ...] = (2, 9, 40), size: int = 20, weight: str | None = "shared",
    order: str | None = "norm first", heads: int = 0, dtype: torch.dtype | None = None,
    eps: float = 1e-5,
) -> Work:  # fmt: skip
    """heads: how many of them have a skip (0: none); dtype: of the result, if not x's."""
    torch.manual_seed(0)
    width = {None: 0, "shared": size, "own": shape[-1]}[weight]

    def in_heads(x):
        return x.unflatten(-1, (heads, -1)) if heads else x

    inputs = {
        "x": in_heads(_strided(*shape)), "gate": _strided(*shape) if order else None,
        "weight": torch.randn(width) if weight else None,
        "values": in_heads(_strided(*shape)) if heads else None,
        "skip": torch.randn(heads) if heads else None,
    }  # fmt: skip

    def ours(*given):
        return (norm.norm(*given, size, order == "gate first", eps, 0.7, dtype),)

    def torch_form(x, gate, weight, values, skip):
        result = x.dtype if dtype is None or x.dtype == torch.float64 else dtype
        if values is not None:
            x = (x + values * skip.to(x.dtype)[:, None]).flatten(-2)
        if order == "gate first":
            return (_plain(x * F.silu(gate), size, weight, eps) * 0.7,)
        y = _plain(x, size, None if weight is None else weight.to(x.dtype), eps) * 0.7
        return ((y if gate is None else y * F.silu(gate)).to(result),)

    keep = ("skip",) if dtype is None else ("skip", "x")
    return Work(lambda x, **others: ours(x, *others.values()), torch_form, inputs, keep=keep)


# ---- selective step sizes


def steps(
    B: int = 2, T: int = 70, H: int = 3, P: int = 20, values: bool = True, lowest: float = -8.0
) -> Work:
    torch.manual_seed(0)
    inputs = {
        "x": _strided(B, T, H * P).unflatten(-1, (H, P)) if values else None,
        "dt": lowest * torch.rand(B, T, H + 5)[..., :H] + 3, "dt_bias": torch.randn(H),
        "A_log": torch.randn(H),
    }  # fmt: skip

    def ours(x, dt, dt_bias, A_log):
        v, log_decay = timestep.discretise(x, dt, dt_bias, A_log)
        return (v, log_decay) if values else (log_decay,)

    def torch_form(x, dt, dt_bias, A_log):
        kept = torch.float64 if dt.dtype == torch.float64 else torch.float32
        step = F.softplus(dt.to(kept) + dt_bias.to(kept))
        log_decay = -step * A_log.to(kept).exp()
        return ((x * step[..., None]).to(x.dtype), log_decay) if values else (log_decay,)

    return Work(ours, torch_form, inputs, keep=("dt_bias", "A_log"))


# ---- gates


def product(shape: tuple[int, ...] = (2, 9, 40), parts: bool = True) -> Work:
    """parts: gate and up are made as the two parts of a projection."""
    torch.manual_seed(0)
    if parts:
        gate, up = (3 * torch.randn(*shape[:-1], 2 * shape[-1])).chunk(2, -1)
    else:
        gate, up = 3 * torch.randn(shape), torch.randn(shape[::-1]).permute(2, 1, 0)
    return Work(
        lambda gate, up: (activation.silu_product(gate, up),),
        lambda gate, up: (F.silu(gate) * up,),
        {"gate": gate, "up": up},
    )


def gates(shape: tuple[int, ...] = (2, 9, 40), lowest: float = -8.0, scale: float = 1 / 16) -> Work:
    torch.manual_seed(0)

    def torch_form(x):
        kept = torch.float64 if x.dtype == torch.float64 else torch.float32
        return (F.logsigmoid(x.to(kept)) * scale,)

    inputs = {"x": lowest * torch.rand(*shape[:-1], shape[-1] + 16)[..., : shape[-1]] + 3}
    return Work(lambda x: (activation.log_sigmoid(x, scale),), torch_form, inputs)


def check_odd_gates(device: str) -> None:
    """Raise where gates that are no common ones become something else than in PyTorch."""
    inf, nan = torch.inf, torch.nan
    x = torch.tensor([-inf, inf, nan, -1e30, 1e30, -200.0, 200.0, -0.0, 5e-8], device=device)
    up = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, inf, 8.0, 9.0], device=device)
    forms = {
        lambda x, up: activation.silu_product(x, up): lambda x, up: F.silu(x) * up,
        lambda x, up: activation.silu_product(up, x): lambda x, up: F.silu(up) * x,
        lambda x, _: activation.log_sigmoid(x, 0.25): lambda x, _: F.logsigmoid(x) / 4,
    }
    for ours, theirs in forms.items():
        results = []
        for form in (ours, theirs):
            leaves = x.clone().requires_grad_(), up.clone().requires_grad_()
            y = form(*leaves)
            results.append((y, *torch.autograd.grad(y.sum(), leaves, allow_unused=True)))
        for found, want in zip(*results):
            torch.testing.assert_close(found, want, equal_nan=True)
    low = torch.tensor([-1e4, -3e38], device=device, dtype=torch.bfloat16)
    assert torch.equal(activation.log_sigmoid(low, 0.25), low.float() / 4)


# ---- losses


def losses(
    shape: tuple[int, ...] = (2, 9, 50), labels: torch.dtype = torch.int64, offset: float = 0.0
) -> Work:
    """shape: of the logits; some labels are -100. offset: added to all logits."""
    torch.manual_seed(0)
    inputs = {"logits": 4 * _strided(*shape) + offset}
    due = torch.randint(0, shape[-1], shape[:-1], dtype=labels)
    due[..., ::4] = -100
    due[..., -1] = shape[-1] - 1

    def ours(logits):
        return (loss.cross_entropy(logits, due.to(logits.device))[0],)

    def torch_form(logits):
        kept = torch.float64 if logits.dtype == torch.float64 else torch.float32
        flat = logits.to(kept).flatten(0, -2), due.to(logits.device).long().flatten()
        return (F.cross_entropy(*flat, reduction="none").view(due.shape),)

    return Work(ours, torch_form, inputs)


def check_odd_losses(device: str) -> None:
    """Raise where rows that are no common ones have not the losses and gradients of PyTorch's."""
    V = 5000  # more than one block
    logits = torch.randn(9, V, device=device)
    logits[1, :4500] = -torch.inf  # all of the first block
    logits[2, 7] = -torch.inf
    logits[3] = -torch.inf
    logits[4, 4800] = torch.inf
    logits[5, 5] = torch.nan
    logits[6] = torch.nan
    logits[7] *= 1e30
    labels = torch.full((9,), 4700, device=device)
    labels[2], labels[8] = 7, -100
    one = torch.randn(3, 1, device=device), labels.new_zeros(3)  # token in the vocabulary
    for x, due in ((logits, labels), one, (logits[:0], labels[:0])):
        leaves = x.clone().requires_grad_(), x.clone().requires_grad_()
        ours = loss.cross_entropy(leaves[0], due)[0]
        theirs = F.cross_entropy(leaves[1], due, reduction="none")
        torch.testing.assert_close(ours, theirs, equal_nan=True)
        mine, grad = (torch.autograd.grad(y.sum(), x)[0] for y, x in zip((ours, theirs), leaves))
        torch.testing.assert_close(mine, grad, equal_nan=True)
    # Where PyTorch reads outside of the logits or, on a GPU, ends the process.
    wrong = torch.tensor([V, -1, 2**40, -(2**40), 4700], device=device)
    leaf = logits[:1].repeat(5, 1).requires_grad_()
    found = loss.cross_entropy(leaf, wrong)[0]
    (grad,) = torch.autograd.grad(found.sum(), leaf)
    assert found.isnan().tolist() == grad.isnan().all(1).tolist() == [True] * 4 + [False]
    # Rows that count for nothing are not looked at, whatever is in them.
    leaf = logits.clone().requires_grad_()
    found = loss.cross_entropy(leaf, torch.full_like(labels, -100))[0]
    assert not found.any() and not torch.autograd.grad(found.sum(), leaf)[0].any()
