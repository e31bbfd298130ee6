"""What both kernel tests (the interpreter's and the device's) share: inputs, oracle, yardstick."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from subquad.engines.matrix import forms, reference
from subquad.engines.matrix.gpu import scan as matrix

NAMES = ("q", "k", "v", "log_decay", "bonus", "state")


@dataclass(frozen=True)
class Case:
    gate: str = "none"  # none | [H] | [H,K] | [B,T,H] | [B,T,H,K]
    T: int = 70
    B: int = 1
    H: int = 2
    Hk: int = 1
    K: int = 16
    V: int = 16
    lowest: float = -1.0  # log decays lie between 0 and this, most of them near 0
    bonus: bool = False
    state: bool = True
    cu_seqlens: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float32
    gate_dtype: torch.dtype = torch.float32

    def inputs(self, device: str, seed: int = 0) -> dict[str, Tensor | None]:
        torch.manual_seed(seed)
        B, T, H, K = self.B, self.T, self.H, self.K
        gates = {"none": None, "[H]": (H,), "[H,K]": (H, K), "[B,T,H]": (B, T, H)}
        shape = {**gates, "[B,T,H,K]": (B, T, H, K)}[self.gate]
        rows = B if self.cu_seqlens is None else len(self.cu_seqlens) - 1
        inputs = {
            "q": torch.randn(B, T, self.Hk, K).to(self.dtype),
            "k": torch.randn(B, T, self.Hk, K).to(self.dtype),
            "v": torch.randn(B, T, H, self.V).to(self.dtype),
            "log_decay": None if shape is None else self.lowest * torch.rand(shape) ** 4,
            "bonus": torch.randn(H, K) if self.bonus else None,
            "state": torch.randn(rows, H, K, self.V) if self.state else None,
        }
        if shape is not None:
            inputs["log_decay"] = inputs["log_decay"].to(self.gate_dtype)
        return {name: x if x is None else x.to(device) for name, x in inputs.items()}

    def offsets(self, device: str) -> Tensor | None:
        if self.cu_seqlens is None:
            return None
        return torch.tensor(self.cu_seqlens, dtype=torch.int32, device=device)


Run = Callable[..., tuple[Tensor, Tensor]]


def kernels(q, k, v, log_decay, bonus, state, cu_seqlens):
    scale = q.shape[3] ** -0.5
    return matrix.linear_recurrence(q, k, v, log_decay, bonus, scale, state, cu_seqlens)


def _torch_form(form, q, k, v, log_decay, bonus, state, cu_seqlens, *options):
    if state is None:
        rows = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        state = q.new_zeros(rows, v.shape[2], q.shape[3], v.shape[3])
    q = q * q.shape[3] ** -0.5
    if cu_seqlens is None:
        return form(q, k, v, log_decay, None, bonus, state, None, *options)
    full = cu_seqlens.diff() > 0  # the state of an empty sequence stays as it is
    ends = cu_seqlens.unique()
    o, final = form(q, k, v, log_decay, None, bonus, state[full], ends, *options)
    return o, state.masked_scatter(full[:, None, None, None], final)


def oracle(*arguments):
    """The reference: the recurrence's loop. Give it float64."""
    return _torch_form(reference.loop, *arguments)


def chunked_torch(*arguments):
    """The chunked torch form, 64 tokens a chunk; under autocast, its products are 16 bit."""
    return _torch_form(forms.chunked, *arguments, 64)


def results(
    run: Run, case: Case, device: str, dtype: torch.dtype | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """Outputs and every gradient of `run` on the inputs (cast to dtype, if one is given)."""
    inputs = case.inputs(device, seed)
    leaves = {
        name: None if x is None else x.to(dtype or x.dtype).detach().requires_grad_()
        for name, x in inputs.items()
    }
    o, final = run(*leaves.values(), case.offsets(device))
    torch.manual_seed(1)
    do = torch.randn(o.shape).to(case.dtype).to(device, o.dtype)
    dfinal = torch.randn(final.shape).to(device, final.dtype)
    torch.autograd.backward([o, final], [do, dfinal])
    found = {"o": o, "final": final}
    found |= {f"d{name}": x.grad for name, x in leaves.items() if x is not None}
    return {name: x.detach() for name, x in found.items()}


def draws(run: Run, case: Case, device: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """`results` of several draws of inputs, end to end, where a result has but few numbers.

    A fixed gate's gradient has one a head, each the sum over all tokens of terms of either sign:
    of one draw, the relative error says as much about the draw as about the arithmetic.
    """
    found = [
        results(run, case, device, dtype, seed) for seed in range(8 if case.gate == "[H]" else 1)
    ]
    return {name: torch.cat([one[name].flatten() for one in found]) for name in found[0]}


def errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of each result, |found - truth| / |truth|; NaN stays NaN."""
    return {
        name: ((x.double() - truth[name]).norm() / truth[name].norm()).item()
        for name, x in found.items()
    }


def shows_nan(gate: str, device: str) -> bool:
    """Whether one head's outputs and state are NaN from where its gate is, and nothing else is."""
    inputs, first = Case(gate, T=70).inputs(device), 40
    if gate in ("[H]", "[H,K]"):
        inputs["log_decay"][0], first = torch.nan, 0
    else:
        inputs["log_decay"][:, first, 0] = torch.nan
    o, final = kernels(*inputs.values(), None)
    shown = o[:, first:, 0].isnan().all() and final[:, 0].isnan().all()
    chunk = first // 32 * 32  # of whose earlier tokens nothing is promised
    return bool(shown and o[:, :chunk].isfinite().all() and o[:, :, 1].isfinite().all())
