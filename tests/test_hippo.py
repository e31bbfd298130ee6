"""HiPPO against what it claims: an orthogonal projection, computed here by quadrature."""

import math

import numpy as np
import pytest
import torch
from numpy.polynomial import legendre as numpy_legendre
from torch.testing import assert_close

from subquad.ssm.discretize import METHODS
from subquad.ssm.hippo import CHUNK, MEASURES, HiPPO
from subquad.ssm.legendre import legs, legt, lmu

NODES, WEIGHTS = (torch.as_tensor(x) for x in np.polynomial.legendre.leggauss(40))
INSIDE, WEIGHTS = (NODES + 1) / 2, WEIGHTS / 2  # on [0, 1]


def signal(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def waves(T):
    """Ten sinusoids below 15 periods, mean 0 and variance 1."""
    generator = torch.Generator().manual_seed(1)
    t = torch.arange(T, dtype=torch.float64) / T
    amplitude, frequency, phase = torch.rand(3, 10, 1, generator=generator, dtype=torch.float64)
    f = (amplitude * torch.sin(2 * math.pi * (15 * frequency * t + phase))).sum(0)
    return (f - f.mean()) / f.std()


def memory(measure, N, window=20):
    return HiPPO(measure, N, None if measure == "legs" else window)


# ---- the matrices, entry by entry as published


@pytest.mark.parametrize("n, k", [(0, 0), (0, 1), (0, 3), (2, 1), (3, 3), (4, 1), (1, 4)])
def test_matrices_are_the_published_ones(n, k):
    root = math.sqrt((2 * n + 1) * (2 * k + 1))
    assert legs(5)[0][n, k] == pytest.approx(-root if n > k else -(n + 1) if n == k else 0)
    assert legt(5)[0][n, k] == pytest.approx(-root * (1 if k <= n else (-1) ** (n - k)))
    voelker = -1 if n < k else (-1) ** (n - k + 1)
    assert lmu(5)[0][n, k] == pytest.approx((2 * n + 1) * voelker)
    assert legs(5)[1][n, 0] == legt(5)[1][n, 0] == pytest.approx(math.sqrt(2 * n + 1))
    assert lmu(5)[1][n, 0] == pytest.approx((2 * n + 1) * (-1) ** n)


@pytest.mark.parametrize("measure", MEASURES)
def test_basis_is_numpys_legendre_and_orthogonal(measure):
    N = 12
    values = memory(measure, N).basis(INSIDE)
    n = torch.arange(N, dtype=torch.float64)
    scale = (-1) ** n if measure == "lmu" else (2 * n + 1).sqrt()
    want = numpy_legendre.legvander((2 * INSIDE - 1).numpy(), N - 1) * scale.numpy()
    assert_close(values, torch.as_tensor(want), rtol=1e-12, atol=1e-12)
    gram = (values.mT * WEIGHTS) @ values
    norm = 1 / (2 * n + 1) if measure == "lmu" else torch.ones_like(n)
    assert_close(gram, torch.diag(norm), rtol=0, atol=1e-13)


# ---- what the state is


@pytest.mark.parametrize("N", [1, 2, 16])
def test_legs_is_the_projection_of_all_the_past(N):
    f, m = signal(CHUNK + 30), HiPPO("legs", N)
    c = m.project(f)
    for t in (1, 2, 17, len(f)):
        position = (torch.arange(t)[:, None] + INSIDE) / t
        want = (f[:t, None, None] * m.basis(position) * WEIGHTS[:, None]).sum((0, 1)) / t
        assert_close(c[t - 1], want, rtol=0, atol=1e-12)


def test_decay_is_the_projection_weighted_by_age():
    f, m = signal(60), HiPPO("decay", 8, window=20)
    age = (60 - torch.arange(60)[:, None] - INSIDE) / 20
    weight = torch.exp(-age) / 20
    want = ((f[:, None] * weight * WEIGHTS)[..., None] * m.basis(torch.exp(-age))).sum((0, 1))
    assert_close(m.project(f)[-1], want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("measure", ["legt", "lmu"])
def test_legt_holds_a_polynomial_of_its_degree_exactly(measure):
    """Of other signals LegT's projection is approximate: it forgets what it believes is leaving."""
    m, w = HiPPO(measure, 6, window=40), 40
    A, B = m.matrices
    weights = torch.linspace(1, -0.5, 6, dtype=torch.float64)

    def f(time):  # degree 5 in time
        return (weights * (time / 100)[..., None] ** torch.arange(6)).sum(-1)

    def coefficients(t):
        values = f(t - w + w * INSIDE)
        dual = HiPPO("legt", 6, window=40).basis(INSIDE)
        scale = B[:, 0] * w / dual.new_tensor([math.sqrt(2 * n + 1) for n in range(6)])
        return (values * WEIGHTS) @ dual * scale

    time = torch.tensor(130.0, dtype=torch.float64)
    rate = (coefficients(time + 1e-3) - coefficients(time - 1e-3)) / 2e-3
    assert_close(rate, A @ coefficients(time) + B[:, 0] * f(time), rtol=1e-6, atol=1e-9)
    rebuilt = m.reconstruct(coefficients(time), 130)
    assert_close(rebuilt, f(torch.arange(90.5, 130, dtype=torch.float64)), rtol=1e-10, atol=1e-10)


def test_lmu_is_legt_in_another_scaling():
    f = signal(3, 90)
    legt_memory, lmu_memory = HiPPO("legt", 10, 30), HiPPO("lmu", 10, 30)
    for method in ("zoh", "bilinear", "backward_euler"):  # forward Euler is unstable here
        a, b = legt_memory.project(f, method), lmu_memory.project(f, method)
        a, b = legt_memory.reconstruct(a[:, -1], 90), lmu_memory.reconstruct(b[:, -1], 90)
        assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_exact_legs_step_is_the_matrix_exponential():
    A, B = legs(16)
    A_bar, B_bar = HiPPO("legs", 16).transitions(torch.tensor([1, 7, 500]))
    for i, ratio in enumerate((2 / 1, 8 / 7, 501 / 500)):
        want = torch.linalg.matrix_exp(A * math.log(ratio))
        assert_close(A_bar[i], want, rtol=0, atol=1e-12)
        held = torch.linalg.solve(A, (want - torch.eye(16)) @ B)[:, 0]
        assert_close(B_bar[i], held, rtol=0, atol=1e-12)


def test_legs_has_no_scale_of_time():
    f, m = signal(40), HiPPO("legs", 12)
    slow = f.repeat_interleave(3)
    assert_close(m.project(slow)[2::3], m.project(f), rtol=0, atol=1e-12)


# ---- reconstruction


@pytest.mark.parametrize("measure", MEASURES)
def test_reconstructs_by_each_method_and_the_exact_one_best(measure):
    T, f = 1000, waves(1000)
    m, errors = memory(measure, 64, window=300), {}
    for method in METHODS:
        if method == "euler" and measure in ("legt", "lmu"):
            continue  # unstable here, and refused
        c = m.project(f, method, at=[T])[0]
        recent = m.samples(T)[-300:]
        errors[method] = (m.reconstruct(c, T, recent) - f[recent]).square().mean().item()
    assert errors["zoh"] < 1e-3 and errors["bilinear"] < 1e-2  # of a variance of 1
    assert errors["backward_euler"] < 0.2
    assert errors["backward_euler"] > 10 * errors["bilinear"]
    assert errors.get("euler", 1.0) > 10 * errors["bilinear"]


def test_at_any_time_and_anywhere():
    f, m = waves(400), HiPPO("legs", 48)
    c = m.project(f)
    for t in (100, 251, 400):
        assert_close(m.reconstruct(c[t - 1], t), f[:t], rtol=0, atol=0.02)
    between = m.reconstruct(c[-1], 400, torch.tensor([199.5]))
    assert between.item() == pytest.approx((f[199] + f[200]).item() / 2, abs=0.02)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("method", METHODS)
def test_streaming_and_kept_times_equal_the_whole(measure, method):
    f, m = signal(2, CHUNK + 9), memory(measure, 6, window=40)
    whole = m.project(f, method)
    c = torch.zeros(2, 6, dtype=torch.float64)
    for k in range(f.shape[-1]):
        c = m.step(c, f[:, k], k, method)
        assert_close(c, whole[:, k], rtol=1e-10, atol=1e-10)
    kept = m.project(f, method, at=[1, CHUNK, CHUNK + 1])
    assert_close(kept, whole[:, [0, CHUNK - 1, CHUNK]])


def test_gradients_reach_the_signal():
    f = signal(12).requires_grad_()
    for measure in MEASURES:
        m = memory(measure, 4)
        assert torch.autograd.gradcheck(lambda f, m=m: m.project(f, at=[5, 12]), f)


def test_float32_signals_are_remembered_in_float64():
    f, m = waves(300), HiPPO("legs", 32)
    assert_close(m.project(f.float()), m.project(f.float().double()).float())


# ---- what is refused


@pytest.mark.parametrize(
    "build, named",
    [
        (lambda: HiPPO("lagt", 8), "measure"),
        (lambda: HiPPO("legs", 0), "N"),
        (lambda: HiPPO("legs", 8.0), "N"),
        (lambda: HiPPO("legs", 8, window=10), "window"),
        (lambda: HiPPO("legt", 8), "window"),
        (lambda: HiPPO("legt", 8, window=-1), "window"),
        (lambda: HiPPO("legt", 8, window=math.nan), "window"),
        (lambda: HiPPO("legs", 8).project(torch.ones(5), "rk4"), "method"),
        (lambda: HiPPO("legs", 8).project([1.0, 2.0]), "f"),
        (lambda: HiPPO("legs", 8).project(torch.ones(5, dtype=torch.int64)), "f"),
        (lambda: HiPPO("legs", 8).project(torch.ones(3, 0)), "f"),
        (lambda: HiPPO("legs", 8).project(torch.tensor([1.0, math.nan])), "f"),
        (lambda: HiPPO("legs", 8).project(torch.ones(5), at=[0]), "at"),
        (lambda: HiPPO("legs", 8).project(torch.ones(5), at=[3, 3]), "at"),
        (lambda: HiPPO("legs", 8).project(torch.ones(5), at=[6]), "at"),
        (lambda: HiPPO("legt", 8, window=0.5), "window"),
        (lambda: HiPPO("legt", 8, window="long"), "window"),
        (lambda: HiPPO("legs", 8).step(torch.ones(7), torch.ones(()), 0), "c"),
        (lambda: HiPPO("legs", 8).reconstruct([1.0], 5), "c"),
        (lambda: HiPPO("legs", 8).reconstruct(torch.ones(7), 5), "c"),
        (lambda: HiPPO("legs", 8).reconstruct(torch.ones(8), 0), "t"),
        # Unstable: what it returned would be noise.
        (lambda: HiPPO("legt", 64, window=50).project(torch.ones(5), "euler"), "method"),
        (lambda: HiPPO("decay", 64, window=5).project(torch.ones(5), "euler"), "method"),
        (lambda: HiPPO("legs", 256).project(torch.ones(400), "euler"), "method"),
    ],
)
def test_bad_input_is_named(build, named):
    with pytest.raises(ValueError, match=f"^{named}: .*expected"):
        build()
