"""diagonal_ssm: convolution against recurrence, packed rows, states, memory, and bad input."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subquad.engines.invariant.api import diagonal_ssm

NAMES = ("u", "log_A_bar", "B_bar", "C", "D", "state")


def inputs(rows, T, D=7, N=5, sequences=None, decay=0.1):
    """complex128 leaves: poles that forget slowly and fast, all oscillating differently."""
    torch.manual_seed(1000 * rows + T)
    real = -decay * torch.rand(D, N, dtype=torch.float64) ** 3
    log_A = torch.complex(real, 3 * torch.randn(D, N, dtype=torch.float64))
    B, C, state = (
        torch.randn(s, dtype=torch.complex128) for s in [(D, N), (D, N), (sequences or rows, D, N)]
    )
    u, skip = (torch.randn(s, dtype=torch.float64) for s in [(rows, T, D), (D,)])
    return dict(zip(NAMES, (t.requires_grad_() for t in (u, log_A, B, C, skip, state))))


def results(arguments, **options):
    """y, the last state, and the gradient of everything."""
    y, last_state = diagonal_ssm(**arguments, **options)
    torch.manual_seed(3)
    weight_y, weight_h = (torch.randn(s) for s in (y.shape, (*last_state.shape, 2)))
    loss = (y * weight_y).sum() + (torch.view_as_real(last_state) * weight_h).sum()
    gradients = torch.autograd.grad(loss, list(arguments.values()))
    return dict(zip(("y", "last_state", *NAMES), (y, last_state, *gradients)))


def assert_close(got, want, tolerance=1e-10):
    for name in want:
        error = (got[name] - want[name]).abs().max()
        assert error <= tolerance * want[name].abs().max().clamp(min=1.0), f"{name}: {error}"


@pytest.mark.parametrize("decay", [0.1, 50.0])
@pytest.mark.parametrize("rows, T", [(2, 1), (1, 2), (2, 63), (1, 64), (3, 65), (1, 1000)])
def test_convolution_equals_recurrence(rows, T, decay):
    arguments = inputs(rows, T, decay=decay)
    want = results(arguments, form="recurrent")
    assert_close(results(arguments, form="convolution"), want)


def test_recurrence_is_the_definition():
    arguments = {n: t.detach() for n, t in inputs(1, 12, D=2, N=3).items()}
    u, log_A, B, C, D, h = arguments.values()
    for t in range(12):
        h = log_A.exp() * h + B * u[:, t, :, None]
        want = torch.einsum("dn,bdn->bd", C, h) + torch.einsum("dn,bdn->bd", C.conj(), h.conj())
        y, state = diagonal_ssm(**{**arguments, "u": u[:, : t + 1]}, form="recurrent")
        torch.testing.assert_close(y[:, t], want.real + D * u[:, t])
    torch.testing.assert_close(state, h)


@pytest.mark.parametrize("form", ["recurrent", "convolution"])
@pytest.mark.parametrize("bounds", [[0, 1, 3, 40, 90], list(range(13))])
def test_packed_equals_each_alone(bounds, form):
    arguments = inputs(1, bounds[-1], sequences=len(bounds) - 1)
    got = results(arguments, form=form, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    u, *poles, state = arguments.values()
    alone = [
        diagonal_ssm(u[:, i:j], *poles, state[s : s + 1], form="recurrent")
        for s, (i, j) in enumerate(pairwise(bounds))
    ]
    y, last_state = torch.cat([y for y, _ in alone], 1), torch.cat([h for _, h in alone])
    assert_close(got, {"y": y, "last_state": last_state})


@given(st.data())
@settings(max_examples=20, deadline=None)
def test_any_cut_gives_the_same(data):
    T = data.draw(st.integers(2, 80))
    cuts = sorted({0, T, *data.draw(st.lists(st.integers(1, T - 1), max_size=6))})
    u, *poles, state = (t.detach() for t in inputs(2, T).values())
    whole, last = diagonal_ssm(u, *poles, state)
    pieces = []
    for i, j in pairwise(cuts):
        y, state = diagonal_ssm(u[:, i:j], *poles, state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, last, rtol=1e-10, atol=1e-10)


def test_nothing_wraps_around():
    """A pole that hardly forgets and a pulse at the end: a circular convolution would leak it."""
    u = torch.zeros(1, 100, 1, dtype=torch.float64)
    u[0, -1] = 1e6
    one = torch.ones(1, 1, dtype=torch.complex128)
    y, _ = diagonal_ssm(u, -1e-6 * one, one, one, form="convolution")
    assert y[0, :-1].abs().max() < 1e-8 and y[0, -1] > 1e6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_keeps_a_float32_state(dtype):
    exact = {n: t.detach() for n, t in inputs(2, 200).items()}
    exact["u"] = exact["u"].to(dtype).double()
    low = {n: t.to(torch.complex64) if t.is_complex() else t.to(dtype) for n, t in exact.items()}
    low["D"] = exact["D"].float()
    want, want_state = diagonal_ssm(**exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = diagonal_ssm(**low)
    assert y.dtype == dtype and state.dtype == torch.complex64
    error = (y.double() - want).abs().max() / want.abs().max()
    assert error < (1e-5 if dtype == torch.float32 else 2**-8)
    assert (state - want_state).abs().max() < 1e-5 * want_state.abs().max()


def test_nothing_of_every_token_and_pole_is_ever_made():
    """[D,N,T] complex64 would be 256 MiB here; the largest thing made is a spectrum of u."""
    T, D, N = 1 << 14, 32, 64
    u = torch.randn(1, T, D, requires_grad=True)
    log_A = torch.complex(-torch.rand(D, N) * 0.01, torch.randn(D, N)).requires_grad_()
    C = torch.randn(D, N, dtype=torch.complex64, requires_grad=True)
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            made.extend(t.untyped_storage().nbytes() for t in [out] if torch.is_tensor(t))
            return out

    with Watch():
        y, state = diagonal_ssm(u, log_A, C, C)
        (y.sum() + state.abs().sum()).backward()
    assert max(made) <= 4 * T * D * 8


@pytest.mark.parametrize("T", [1, 40])
def test_compile(T):
    arguments = inputs(2, T)

    def run(function):
        y, state = function(*arguments.values())
        loss = y.sum() + torch.view_as_real(state).square().sum()
        return y, state, *torch.autograd.grad(loss, list(arguments.values()))

    # One graph with its backward pass; generating C++ from it takes a minute and is torch's part.
    compiled = torch.compile(diagonal_ssm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled), run(diagonal_ssm))


GOOD = {n: t.detach() for n, t in inputs(2, 6, D=4, N=3).items()}


@pytest.mark.parametrize(
    "change, named",
    [
        ({"u": GOOD["u"][0]}, "u"),
        ({"u": GOOD["u"][:, :0]}, "u"),
        ({"u": GOOD["u"].to(torch.complex64)}, "u"),
        ({"log_A_bar": GOOD["log_A_bar"].real}, "log_A_bar"),
        ({"log_A_bar": GOOD["log_A_bar"][:3]}, "log_A_bar"),
        ({"B_bar": GOOD["B_bar"][:, :2]}, "B_bar"),
        ({"B_bar": GOOD["B_bar"][0]}, "B_bar"),
        ({"C": GOOD["C"].to("meta")}, "C"),
        ({"D": GOOD["D"][:3]}, "D"),
        ({"state": GOOD["state"][:1]}, "state"),
        ({"state": GOOD["state"].real}, "state"),
        ({"cu_seqlens": torch.tensor([0, 6])}, "cu_seqlens"),
        ({"form": "scan"}, "form"),
    ],
)
def test_bad_input_is_named(change, named):
    with pytest.raises(ValueError, match=f"^{named}: .*expected"):
        diagonal_ssm(**{**GOOD, **change})
