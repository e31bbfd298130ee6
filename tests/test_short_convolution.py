"""short_convolution: its plain and its compiled form against a loop over tokens, and every cut."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subquad.engines.convolution.api import _convolve_cpu, _next_state, short_convolution

SHAPES = [
    (1, 1, 5, 4),
    (2, 2, 16, 4),
    (3, 7, 17, 3),
    (1, 300, 40, 4),
    (2, 5, 8, 1),
    (1, 1000, 33, 2),
]


def loop(x, weight, bias, activation, state, bounds):
    """One token at a time, one sequence at a time: the definition."""
    outputs, states = [], []
    for i, (low, high) in enumerate(pairwise(bounds)):
        window = state[i]
        for t in range(low, high):
            window = torch.cat([window, x[t : t + 1]])
            z = (window * weight.T).sum(0) + (0 if bias is None else bias)
            outputs.append(z * torch.sigmoid(z) if activation else z)
            window = window[1:]
        states.append(window)
    return torch.stack(outputs), torch.stack(states)


def inputs(B, T, D, W, dtype, sequences=None):
    torch.manual_seed(B * 1000 + T)
    shapes = [(B, T, D), (D, W), (D,), (sequences or B, W - 1, D)]
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]


def gradients(outputs, tensors):
    torch.manual_seed(7)
    loss = sum((o * torch.randn(o.shape).to(o)).sum() for o in outputs)
    return torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("B, T, D, W", SHAPES)
def test_equals_the_loop(B, T, D, W, activation, dtype, tolerance):
    tensors = inputs(B, T, D, W, dtype)
    x, weight, bias, state = tensors
    exact = [t.detach().double().requires_grad_() for t in tensors]
    bounds = list(range(0, B * T + 1, T))
    want_y, want_state = loop(exact[0].flatten(0, 1), *exact[1:3], activation, exact[3], bounds)
    got = short_convolution(x, weight, bias, activation, state)
    want = (want_y.view(B, T, D), want_state)
    results = zip((*got, *gradients(got, tensors)), (*want, *gradients(want, exact)))
    for got_one, want_one in results:
        scale = want_one.abs().amax().item() if want_one.numel() else 0.0
        torch.testing.assert_close(
            got_one.double(), want_one, rtol=tolerance, atol=tolerance * scale
        )


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("W", [1, 2, 4])
def test_packed_equals_the_loop(W, dtype, tolerance):
    bounds = [0, 1, 3, 6, 10, 60]
    tensors = inputs(1, 60, 24, W, dtype, sequences=5)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    want_y, want_state = loop(exact[0][0], *exact[1:3], "silu", exact[3], bounds)
    x, weight, bias, state = tensors
    got = short_convolution(x, weight, bias, "silu", state, torch.tensor(bounds, dtype=torch.int32))
    want = (want_y[None], want_state)
    results = zip((*got, *gradients(got, tensors)), (*want, *gradients(want, exact)))
    for got_one, want_one in results:
        torch.testing.assert_close(got_one.double(), want_one, rtol=tolerance, atol=10 * tolerance)


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_any_cut_gives_the_same(data):
    T, W = data.draw(st.integers(2, 40)), data.draw(st.integers(1, 5))
    cuts = sorted({0, T, *data.draw(st.lists(st.integers(1, T - 1), max_size=6))})
    x, weight, bias, _ = (t.detach() for t in inputs(2, T, 19, W, torch.float32))
    whole, last = short_convolution(x, weight, bias, "silu")
    state, pieces = None, []
    for low, high in pairwise(cuts):
        y, state = short_convolution(x[:, low:high], weight, bias, "silu", state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-5)
    assert torch.equal(state, last)


def test_bounds_that_nobody_reads_lead_the_next_state_nowhere():
    """As on a GPU, where a wrong index ends the process. An empty sequence keeps its state."""
    x, state = torch.randn(1, 6, 4), torch.randn(3, 2, 4)
    for ends in ([0, 5, 6, 6], [0, 6, 6, 6], [0, 0, 1, 6]):
        new = _next_state(x, state, torch.tensor(ends))
        for s, (begin, end) in enumerate(pairwise(ends)):
            assert torch.equal(new[s], torch.cat([state[s], x[0, begin:end]])[-2:])
    for ends in ([4, -9, 90, 2], [-5, 0, 0, 50]):
        assert _next_state(x, state, torch.tensor(ends)).shape == state.shape


def test_half_of_a_wider_projection_needs_no_copy():
    both = torch.randn(2, 50, 64)
    x, weight = both[..., 32:], torch.randn(32, 4)
    y, _ = short_convolution(x, weight)
    assert torch.equal(y, short_convolution(x.contiguous(), weight)[0])


@pytest.mark.parametrize("T", [1, 20])
def test_half_precision_keeps_its_dtype_and_float32_sums(T):
    x, weight, bias, state = (t.detach() for t in inputs(2, T, 16, 4, torch.float32))
    x, state = x.bfloat16(), state.bfloat16()
    y, last = short_convolution(x, weight, bias, "silu", state)
    exact, _ = short_convolution(x.double(), weight.double(), bias.double(), "silu", state.double())
    assert y.dtype == last.dtype == torch.bfloat16
    assert torch.equal(y, exact.bfloat16()) or (y - exact).abs().max() < 2**-7 * exact.abs().max()


def test_custom_op_and_compile():
    x, weight, bias, state = inputs(1, 30, 16, 4, torch.float32, sequences=2)
    bounds = torch.tensor([0, 9, 30])
    for args in [(x, weight, bias, state, bounds, True), (x, weight, None, state[:1], None, False)]:
        torch.library.opcheck(_convolve_cpu.op, args)
    compiled = torch.compile(short_convolution, fullgraph=True)
    y, last = compiled(x, weight, bias, "silu", state, bounds)
    want, want_last = short_convolution(x, weight, bias, "silu", state, bounds)
    torch.testing.assert_close((y, last), (want, want_last))
    got_gradients = gradients((y, last), (x, weight, bias, state))
    torch.testing.assert_close(
        got_gradients, gradients((want, want_last), (x, weight, bias, state)), rtol=1e-5, atol=1e-5
    )


X, WEIGHT = torch.randn(2, 6, 8), torch.randn(8, 4)


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"x": X[0]}, "x"),
        ({"x": X.long()}, "x"),
        ({"x": X[:, :0]}, "x"),
        ({"weight": WEIGHT[:4]}, "weight"),
        ({"weight": WEIGHT[:, :0]}, "weight"),
        ({"weight": WEIGHT.to("meta")}, "weight"),
        ({"bias": torch.randn(7)}, "bias"),
        ({"activation": "gelu"}, "activation"),
        ({"state": torch.randn(2, 4, 8)}, "state"),
        ({"state": torch.randn(1, 3, 8)}, "state"),
        ({"cu_seqlens": torch.tensor([0, 6])}, "cu_seqlens"),
        ({"x": X[:1], "cu_seqlens": torch.tensor([0, 3, 3, 6])}, "cu_seqlens"),
        ({"x": X[:1], "cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens"),
    ],
)
def test_bad_input_is_named(arguments, named):
    with pytest.raises(ValueError, match=f"^{named}: .*expected"):
        short_convolution(**{"x": X, "weight": WEIGHT, **arguments})
