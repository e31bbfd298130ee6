"""What PyTorch makes by default, in which dtype and where, is nobody's business here."""

import pytest
import torch

from subquad.engines import linear_recurrence, selective_scan, short_convolution
from test_compiled import single
from test_recurrence import make


@pytest.mark.parametrize("surroundings", ["float64", "bfloat16", "meta"])
def test_results_are_those_of_the_inputs_whatever_new_tensors_are_elsewhere(surroundings):
    """By default new tensors are of another dtype, or made on another device."""
    torch.manual_seed(0)
    call = single(make("BTH", "delta", T=70))
    x, dt, A = torch.randn(2, 70, 4), torch.rand(2, 70, 4), -torch.rand(4, 3)
    B, C, D = torch.randn(2, 70, 3), torch.randn(2, 70, 3), torch.randn(4)
    weight, past = torch.randn(4, 3), torch.randn(2, 2, 4)
    state = torch.randn(2, 4, 3)

    def results() -> list[torch.Tensor]:
        q = call["q"].clone().requires_grad_()
        leaves = [q] + [t.clone().requires_grad_() for t in (x, weight, past, dt, A, state)]
        _, x_, weight_, past_, dt_, A_, state_ = leaves
        outputs = [
            *linear_recurrence(**(call | {"q": q})),
            *short_convolution(x_, weight_, None, "silu", past_),
            *selective_scan(x_, dt_, A_, B, C, D, state_),
        ]
        total = sum(y.double().sum().cpu() for y in outputs)
        return [*outputs, *torch.autograd.grad(total, leaves)]

    want = results()
    if surroundings == "meta":
        with torch.device("meta"):
            found = results()
    else:
        try:
            torch.set_default_dtype(getattr(torch, surroundings))
            found = results()
        finally:
            torch.set_default_dtype(torch.float32)
    for a, b in zip(found, want, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
