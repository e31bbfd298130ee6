"""S4D against its own dense kernel in float64, its initialisations, and every cut of a sequence."""

import math

import pytest
import torch
import torch.nn.functional as F

from subquad.mixers.s4d import S4D
from subquad.ssm.discretize import expm1, zero_order_hold
from subquad.ssm.initial import poles
from subquad.ssm.legendre import legs

INITS = ("legs", "inv", "lin", "real")


def build(init, hidden=12, state_size=16):
    torch.manual_seed(0)
    return S4D(hidden, state_size=state_size, init=init)


def dense(layer, u):
    """The layer from its definition, in float64: the kernel at all lags, a Toeplitz matrix."""
    T = u.shape[1]
    log_dt, log_A_real, A_imag, C, D = (
        p.double() for p in (layer.log_dt, layer.log_A_real, layer.A_imag, layer.C, layer.D)
    )
    A, dt = torch.complex(-log_A_real.exp(), A_imag), log_dt.exp()[:, None]
    lag = torch.arange(T, dtype=torch.float64)
    K = (torch.view_as_complex(C) * ((dt * A).exp() - 1) / A)[..., None] * (dt * A)[..., None].mul(
        lag
    ).exp()
    K = 2 * K.sum(1).real  # [D,T]
    distance = torch.arange(T)[:, None] - torch.arange(T)
    toeplitz = torch.where(distance >= 0, K[:, distance.clamp(min=0)], 0.0)  # [D,T,T]
    y = torch.einsum("dts,bsd->btd", toeplitz, u.double()) + D * u.double()
    weight, bias = layer.out_proj.weight.double(), layer.out_proj.bias.double()
    return F.glu(F.gelu(y) @ weight.T + bias, dim=-1)


@pytest.mark.parametrize("init", INITS)
@torch.no_grad()
def test_equals_its_dense_kernel(init):
    layer, u = build(init), torch.randn(2, 150, 12)
    y, _ = layer(u)
    torch.testing.assert_close(y.double(), dense(layer, u), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", INITS)
@torch.no_grad()
def test_any_cut_gives_the_same(init):
    layer, u = build(init), torch.randn(2, 60, 12)
    whole, last = layer(u)
    state, pieces = None, []
    for piece in u.split([37, 1, 1, 1, 13, 7], 1):
        y, state = layer(piece, state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-4)
    packed = u.reshape(1, 120, 12)
    y, state = layer(packed, cu_seqlens=torch.tensor([0, 60, 120]))
    torch.testing.assert_close(y.view(whole.shape), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-4)


def test_every_parameter_learns_and_decays_are_marked():
    layer = build("lin")
    y, state = layer(torch.randn(2, 20, 12))
    (y.square().sum() + state["recurrent"].square().sum()).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    marked = {n for n, p in layer.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked >= {"log_dt", "log_A_real", "A_imag"}


def test_legs_poles_are_the_eigenvalues_of_hippos_normal_part():
    A, n = legs(8)[0], torch.arange(8, dtype=torch.float64)
    eigenvalues = torch.linalg.eigvals(A + ((n + 0.5)[:, None] * (n + 0.5)).sqrt())
    want = eigenvalues[eigenvalues.imag > 0]
    torch.testing.assert_close(poles("legs", 8), want[want.imag.argsort()])


def test_poles_come_in_pairs():
    with pytest.raises(ValueError, match=r"^N: got 7; expected an even number"):
        poles("lin", 7)


def test_closed_forms_of_the_poles():
    pi = math.pi
    torch.testing.assert_close(
        poles("lin", 4), torch.tensor([-0.5, -0.5 + 1j * pi]).to(torch.complex128)
    )
    inv = [-0.5 + 1j * 4 / pi * 3, -0.5 + 1j * 4 / pi * (4 / 3 - 1)]
    torch.testing.assert_close(poles("inv", 4), torch.tensor(inv, dtype=torch.complex128))
    torch.testing.assert_close(poles("real", 4), torch.tensor([-1.0, -2.0]).to(torch.complex128))


def test_inv_approaches_legs_as_the_state_grows():
    def error(N):
        return (poles("legs", N).imag[-1] / poles("inv", N).imag.max() - 1).abs().item()

    assert error(256) < error(64) < error(16) < 0.1


def test_expm1_keeps_small_numbers_and_zero_order_hold_solves_the_equation():
    z = torch.tensor([1e-9 + 1e-9j, -1e-3 + 3j, -50 + 0.1j], dtype=torch.complex128)
    series = z[0] + z[0] ** 2 / 2
    torch.testing.assert_close(expm1(z)[0], series, rtol=1e-14, atol=0.0)
    torch.testing.assert_close(expm1(z)[1:], z[1:].exp() - 1, rtol=1e-14, atol=0.0)
    # Under a constant input the state of x' = A x + u moves to (e^{dt A} - 1) / A; many small Euler
    # steps agree.
    A, dt = torch.tensor([[-1.0 + 5j]], dtype=torch.complex128), torch.tensor([0.3]).double()
    log_A_bar, B_bar = zero_order_hold(dt, A)
    h = torch.zeros_like(A)
    for _ in range(100_000):
        h = h + dt / 100_000 * (A * h + 1)
    torch.testing.assert_close(B_bar, h, rtol=1e-4, atol=0.0)
    torch.testing.assert_close(log_A_bar, dt * A)


@pytest.mark.parametrize(
    "options, named",
    [
        ({"init": "hippo"}, "init"),
        ({"state_size": 7}, "state_size"),
        ({"state_size": 0}, "state_size"),
        ({"dt_min": 0.0}, "dt_min"),
        ({"dt_min": 1.0, "dt_max": 0.1}, "dt_min"),
    ],
)
def test_bad_options_are_named(options, named):
    with pytest.raises(ValueError, match=f"^{named}: .*expected"):
        S4D(12, **options)
