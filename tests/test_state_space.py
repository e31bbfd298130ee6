"""State spaces: against scipy, and every representation against every other."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import scipy.signal
import torch
from torch.testing import assert_close

from subquad.engines import diagonal_ssm
from subquad.ssm.continuous import StateSpace
from subquad.ssm.discrete import DiscreteStateSpace
from subquad.ssm.discretize import METHODS, exponential, phi1, zero_order_hold
from subquad.ssm.initial import poles
from subquad.ssm.matrix import DPLR, Dense, Diagonal

SHAPES = ("dense", "diagonal", "dplr")
SCIPY = {"zoh": "zoh", "bilinear": "bilinear", "euler": "euler", "backward_euler": "backward_diff"}
f64, c128 = torch.float64, torch.complex128


def randn(*shape, dtype=f64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def state_matrix(shape, N=6, batch=(), dtype=f64, seed=0):
    """A stable one: the real parts of its eigenvalues are below zero."""
    if shape == "dense":
        A = randn(*batch, N, N, dtype=dtype, seed=seed)
        return A - 2 * math.sqrt(N) * torch.eye(N, dtype=dtype)
    lam = -0.2 - randn(*batch, N, seed=seed).abs()
    if dtype.is_complex:
        lam = torch.complex(lam, randn(*batch, N, seed=seed + 1) * 3)
    if shape == "diagonal":
        return Diagonal(lam)
    p = randn(*batch, N, 2, dtype=dtype, seed=seed + 2)
    return DPLR(lam, p, p)  # lam - p p^* : its symmetric part stays negative


def system(shape, batch=(), I=2, O=3, N=6, dtype=f64):
    A = state_matrix(shape, N, batch, dtype)
    B, C, D = (randn(*s, dtype=dtype, seed=7 + i) for i, s in enumerate([(N, I), (O, N), (O, I)]))
    return StateSpace(A, B, C, D)


def dense(s):
    """The same system, its A written out."""
    return StateSpace(s.matrix.dense(), s.B, s.C, s.D)


def arrays(s):
    return [x.numpy() for x in (s.matrix.dense(), s.B, s.C, s.D)]


# ---- discretisation


@pytest.mark.parametrize("dtype", [f64, c128])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dt", [0.01, 0.3, 2.0])
def test_equals_scipys_cont2discrete(method, shape, dtype, dt):
    s = system(shape, dtype=dtype)
    ours = s.discretize(dt, method)
    *theirs, step = scipy.signal.cont2discrete(arrays(s), dt, SCIPY[method])
    for name, mine, want in zip("ABCD", arrays(ours), theirs):
        np.testing.assert_allclose(mine, want, rtol=1e-10, atol=1e-10, err_msg=name)
    assert ours.dt == step


@pytest.mark.parametrize("dtype", [f64, c128])
def test_the_exponential_of_a_lone_matrix_is_exact(dtype):
    """PyTorch's own differs from scipy's by up to 1e-10 where most steps lie."""
    M = torch.randn(400, 2, 2, dtype=dtype)
    M *= (torch.logspace(-4, 0, 400) / M.abs().sum(-2).amax(-1))[:, None, None]
    want = torch.stack([torch.from_numpy(scipy.linalg.expm(m.numpy())) for m in M])
    assert_close(torch.stack([exponential(m) for m in M]), want, rtol=0, atol=4e-15)
    assert_close(exponential(M), want, rtol=0, atol=4e-15)
    alone = M[240:250, None].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda m: torch.stack([exponential(one) for one in m]), alone)


def test_a_million_small_steps_end_where_the_solution_does():
    s = StateSpace([[0.0, 1.0], [-1.0, 0.0]], [[0.0], [1.0]], [[1.0, 0.0]])
    turned = s.discretize(0.04).A
    for _ in range(20):  # 2^20 steps around the circle
        turned = turned @ turned
    angle = 0.04 * 2**20
    want = torch.tensor([math.cos(angle), math.sin(angle)], dtype=f64)
    assert_close(turned[0], want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_structure_is_kept_where_it_can_be(method):
    assert isinstance(system("diagonal").discretize(0.1, method).A, Diagonal)
    kept = system("dplr").discretize(0.1, method).A
    assert isinstance(kept, torch.Tensor if method == "zoh" else DPLR)


def test_singular_A_is_held_exactly():
    """A double integrator, which has no inverse, and a pole at 0."""
    s = StateSpace([[0.0, 1.0], [0.0, 0.0]], [[0.0], [1.0]], [[1.0, 0.0]]).discretize(0.5)
    assert_close(s.A, torch.tensor([[1.0, 0.5], [0.0, 1.0]], dtype=f64))
    assert_close(s.B, torch.tensor([[0.125], [0.5]], dtype=f64))
    lam = torch.tensor([0.0, -1e-9, -2.0], dtype=f64)
    d = StateSpace(Diagonal(lam), torch.ones(3, 1).double(), torch.ones(1, 3).double())
    want = torch.tensor([0.5, 0.5 - 0.125e-9, (1 - math.exp(-1.0)) / 2], dtype=f64)
    assert_close(d.discretize(0.5).B[:, 0], want, rtol=1e-15, atol=0)


@pytest.mark.parametrize("dtype", [f64, c128])
def test_phi1_and_its_gradient_around_zero(dtype):
    z = torch.tensor([0.0, 1e-12, -1e-4, 9.9e-3, 1.01e-2, -0.5, 3.0], dtype=dtype)
    if dtype == c128:
        z = z * (0.6 + 0.8j)
    z.requires_grad_()
    terms = torch.stack([z.detach() ** n / float(math.factorial(n + 1)) for n in range(30)])
    assert_close(phi1(z), terms.sum(0), rtol=1e-13, atol=0)
    assert torch.autograd.gradcheck(phi1, z)


def test_zero_order_hold_of_many_channels():
    dt, A = torch.tensor([0.1, 0.2], dtype=f64), poles("lin", 8).expand(2, -1)
    log_A_bar, B_bar = zero_order_hold(dt, A)
    for d in range(2):
        s = StateSpace(Diagonal(A[d]), torch.ones(4, 1), torch.ones(1, 4)).discretize(float(dt[d]))
        assert_close(log_A_bar[d].exp(), s.A.lam)
        assert_close(B_bar[d], s.B[:, 0])


# ---- the representations


@pytest.mark.parametrize("dtype", [f64, c128])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [(), (4,)])
def test_solution_recurrence_and_convolution_are_equal(shape, dtype, batch):
    s, T, dt = system(shape, batch, dtype=dtype), 50, 0.1
    u, x0 = randn(5, *[1] * len(batch), T, 2), randn(6)
    digital = s.discretize(dt)
    recurrent, last = digital.simulate(u, x0)
    assert recurrent.shape == (5, *batch, T, 3) and last.shape == (5, *batch, 6)
    assert_close(digital.convolve(u, x0), recurrent, rtol=1e-10, atol=1e-10)
    continuous, at_last = s.solve(u, torch.arange(T, dtype=f64) * dt, x0)
    assert_close(continuous, recurrent, rtol=1e-10, atol=1e-10)
    _, before_last = digital.simulate(u[..., :-1, :], x0)
    assert_close(at_last, before_last, rtol=1e-10, atol=1e-10)
    other, _ = dense(s).discretize(dt).simulate(u, x0)
    assert_close(other, recurrent, rtol=1e-10, atol=1e-10)


def test_the_solution_is_that_of_the_differential_equation():
    """By a Runge-Kutta method of scipy, with uneven gaps."""
    s, times = system("dense"), torch.tensor([0.0, 0.1, 0.15, 0.9, 1.0, 2.5], dtype=f64)
    u, x0 = randn(6, 2), randn(6)
    A, B, C, D = arrays(s)

    def slope(t, x):
        k = np.searchsorted(times.numpy(), t, side="right") - 1
        return A @ x + B @ u.numpy()[min(k, 5)]

    x, want = x0.numpy(), [x0.numpy()]
    for start, end in zip(times[:-1].tolist(), times[1:].tolist()):
        inside = (start, end - 1e-12)
        x = scipy.integrate.solve_ivp(slope, inside, x, rtol=1e-11, atol=1e-12).y[:, -1]
        want.append(x)
    want = np.stack(want) @ C.T + u.numpy() @ D.T
    y, last = s.solve(u, times, x0)
    np.testing.assert_allclose(y.numpy(), want, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(last.numpy(), x, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_simulation_and_responses_equal_scipys(shape):
    s, u, dt, w = system(shape), randn(40, 2), 0.2, torch.linspace(0, 12, 30, dtype=f64)
    d = s.discretize(dt)
    _, want, states = scipy.signal.dlsim((*arrays(d), dt), u.numpy(), x0=np.ones(6))
    y, last = d.simulate(u, torch.ones(6))
    np.testing.assert_allclose(y.numpy(), want, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(
        last.numpy(), arrays(d)[0] @ states[-1] + arrays(d)[1] @ u[-1].numpy(), rtol=1e-10
    )
    _, impulses = scipy.signal.dimpulse((*arrays(d), dt), n=25)
    kernel = d.kernel(25)
    for i in range(2):
        np.testing.assert_allclose(kernel[:, :, i].numpy(), impulses[i], rtol=1e-9, atol=1e-10)
    for o in range(3):
        for i in range(2):
            A, B, C, D = arrays(s)
            one = (A, B[:, i : i + 1], C[o : o + 1], D[o : o + 1, i : i + 1])
            _, want = scipy.signal.freqresp(one, w.numpy())
            np.testing.assert_allclose(s.frequency_response(w)[:, o, i].numpy(), want, rtol=1e-8)
            A, B, C, D = arrays(d)
            one = (A, B[:, i : i + 1], C[o : o + 1], D[o : o + 1, i : i + 1], dt)
            _, want = scipy.signal.dfreqresp(one, w.numpy() * dt)
            np.testing.assert_allclose(d.frequency_response(w)[:, o, i].numpy(), want, rtol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("L", [1, 2, 3, 64, 65, 500])
def test_kernel_is_the_response_to_an_impulse(shape, L):
    d = system(shape, (2,)).discretize(0.1, "bilinear")
    want = []
    for i in range(2):
        impulse = torch.zeros(L, 2, dtype=f64)
        impulse[0, i] = 1
        want.append(d.simulate(impulse)[0])
    assert_close(d.kernel(L), torch.stack(want, -1), rtol=1e-10, atol=1e-12)


def test_impulse_response_is_the_kernel_in_the_limit():
    for shape in SHAPES:
        s = system(shape)
        dt = 1e-6
        times = torch.tensor([0.0, 0.3, 1.0], dtype=f64)
        sampled = s.discretize(dt, "bilinear", read="after")
        sampled = DiscreteStateSpace(sampled.A, sampled.B, s.C)
        powers = [torch.matrix_power(sampled.matrix.dense(), round(t / dt)) for t in times.tolist()]
        want = torch.stack([s.C @ P @ sampled.B / dt for P in powers])
        assert_close(s.impulse_response(times), want, rtol=1e-4, atol=1e-4)


def test_convolution_does_not_wrap_around():
    d = DiscreteStateSpace([[0.999]], [[1.0]], [[1.0]])
    u = torch.zeros(100, 1, dtype=f64)
    u[-1] = 1e6  # whatever wrapped would be seen at the beginning
    assert d.convolve(u).abs().max() < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_reading_after_the_write_is_the_convention_of_s4d(method):
    T, D, N, dt = 40, 3, 8, torch.tensor([0.001, 0.005, 0.01], dtype=f64)
    lam, C = poles("lin", N).expand(D, -1), randn(D, 1, N // 2, dtype=c128)
    s = StateSpace(Diagonal(lam), torch.ones(D, N // 2, 1, dtype=c128), C)
    u = randn(2, T, D)
    d = s.discretize(dt, method, read="after")
    y = 2 * d.convolve(u.mT[..., None])[..., 0].real.mT
    want, _ = diagonal_ssm(u, d.A.lam.log(), d.B[..., 0], C[:, 0])
    assert_close(y, want, rtol=1e-9, atol=1e-9)


# ---- long kernels


@pytest.mark.parametrize("shape", SHAPES)
def test_a_million_lags(shape):
    """Against powers taken one by one in closed form; the rows are far apart on purpose."""
    N, L = 16, 1_000_000
    lam = torch.complex(-torch.logspace(-6, 0, N, dtype=f64), 3 * randn(N))
    A = {
        "dense": torch.diag(lam),
        "diagonal": Diagonal(lam),
        "dplr": DPLR(lam, torch.zeros(N, 1), torch.zeros(N, 1)),
    }[shape]
    d = StateSpace(A, torch.ones(N, 1), randn(1, N, dtype=c128)).discretize(0.5)
    kernel = d.kernel(L)
    l = torch.tensor([1, 2, 1000, 1023, 1024, 77_777, 999_999])
    want = (d.C[0] * d.B[:, 0] * (0.5 * lam * (l[:, None] - 1)).exp()).sum(-1)
    assert_close(kernel[l, 0, 0], want, rtol=1e-9, atol=1e-9)


def test_a_million_lags_in_bounded_memory():
    """In a process of its own, whose peak is not another test's. [N,L] alone would be 1 GiB."""
    unit = 1024 if sys.platform == "linux" else 2**20  # what ru_maxrss counts in, as MiB
    program = f"""
import resource, torch
from test_state_space import SHAPES, system

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // {unit}

for shape in SHAPES:
    d = system(shape, I=1, O=1, N=64, dtype=torch.complex128).discretize(1e-3)
    d.kernel(1000)
    before = peak()
    assert d.kernel(1_000_000).shape == (1_000_000, 1, 1)
    print(peak() - before)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert sum(map(int, result.stdout.split())) < 150  # MiB; each kernel itself is 15


def test_float32_keeps_its_digits_over_a_long_kernel():
    s = system("diagonal", I=1, O=1).to(torch.float32).discretize(1e-3)
    assert s.dtype == torch.float32
    want = s.to(f64).kernel(100_000)
    assert_close(s.kernel(100_000).double(), want, rtol=0, atol=1e-5 * want.abs().max().item())


# ---- gradients


@pytest.mark.parametrize("dtype", [f64, c128])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(shape, method, dtype):
    A0 = state_matrix(shape, 3, dtype=dtype)
    parts = (A0,) if shape == "dense" else A0.tensors
    B, C = randn(3, 1, dtype=dtype, seed=3), randn(1, 3, dtype=dtype, seed=4)
    u, dt = randn(5, 1), torch.tensor(0.2, dtype=f64)
    kind = {"dense": lambda A: A, "diagonal": Diagonal, "dplr": DPLR}[shape]

    def run(u, dt, B, C, *parts):
        d = StateSpace(kind(*parts), B, C).discretize(dt, method)
        return d.convolve(u), d.simulate(u)[0]

    inputs = [x.detach().clone().requires_grad_() for x in (u, dt, B, C, *parts)]
    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("shape", SHAPES)
def test_compiles_into_one_graph(shape):
    s, u = system(shape), randn(40, 2)
    parts = (s.A,) if shape == "dense" else s.A.tensors
    kind = {"dense": lambda A: A, "diagonal": Diagonal, "dplr": DPLR}[shape]

    def run(B, C, u, *parts):
        return StateSpace(kind(*parts), B, C).discretize(0.1, "bilinear").convolve(u)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert_close(compiled(s.B, s.C, u, *parts), run(s.B, s.C, u, *parts))


# ---- to and from scipy, and other conveniences


def test_to_and_from_scipy():
    s = StateSpace.from_scipy(scipy.signal.TransferFunction([1.0], [1.0, 2.0, 5.0]))
    assert_close(s.dc_gain(), torch.tensor([[0.2]], dtype=f64))
    theirs = s.to_scipy()
    assert theirs.dt is None
    np.testing.assert_array_equal(theirs.A, s.A.numpy())
    d = s.discretize(0.1)
    back = DiscreteStateSpace.from_scipy(d.to_scipy())
    assert back.dt == 0.1
    for a, b in zip(arrays(back), arrays(d)):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match=r"^system: .*DiscreteStateSpace\.from_scipy"):
        StateSpace.from_scipy(d.to_scipy())
    with pytest.raises(ValueError, match=r"^system: .* StateSpace\.from_scipy"):
        DiscreteStateSpace.from_scipy(theirs)
    with pytest.raises(ValueError, match=r"^batch: "):
        system("dense", (2,)).to_scipy()


def test_lists_arrays_and_mixed_dtypes():
    s = StateSpace([[0, 1], [-1, 0]], np.array([[0], [1]]), [[1, 0]])
    assert s.dtype == f64 and s.D.shape == (1, 1) and s.D.item() == 0
    s = StateSpace(torch.eye(2), [[1], [1]], [[1j, 0]])
    assert s.A.dtype == s.B.dtype == s.C.dtype == torch.complex64
    assert s.to(c128).A.dtype == c128
    s = StateSpace(Diagonal(torch.ones(2)), torch.ones(2, 1).double(), torch.ones(1, 2))
    assert s.A.lam.dtype == f64


def test_dc_gain_is_where_a_step_settles():
    for shape in SHAPES:
        s = system(shape)
        d = s.discretize(0.5)
        y, _ = d.simulate(torch.ones(200, 2))
        assert_close(y[-1], d.dc_gain().sum(-1))
        assert_close(s.dc_gain(), d.dc_gain())
        assert s.is_stable() and d.is_stable()


@pytest.mark.parametrize("shape", SHAPES)
def test_matrix_operations_are_those_of_the_dense_matrix(shape):
    A = state_matrix(shape, dtype=c128)
    A = A if shape != "dense" else Dense(A)
    full, x, a = A.dense(), randn(6, 2, dtype=c128), torch.tensor(0.7)
    eye = torch.eye(6, dtype=c128)
    assert_close(A @ x, full @ x)
    assert_close(A.mT.dense(), full.mT)
    assert_close(A.affine(a, 2.0).dense(), 0.7 * full + 2 * eye)
    assert_close(A.inverse().dense() @ full, eye)
    assert_close(full @ A.solve(x), x)
    ours, want = (
        torch.view_as_real(e).norm() for e in (A.eigenvalues(), torch.linalg.eigvals(full))
    )
    assert_close(ours, want)


def test_a_dplr_is_solved_also_where_its_diagonal_has_no_inverse():
    """Woodbury's formula divides by lam, of which one is at the frequency asked for."""
    lam = torch.tensor([2j, -2j, -1.0], dtype=c128)
    s = StateSpace(DPLR(lam, *[torch.ones(3, 1)] * 2), torch.ones(3, 1), torch.ones(1, 3))
    w = torch.tensor([0.5, 2.0], dtype=f64)
    assert_close(s.frequency_response(w), dense(s).frequency_response(w))


# ---- what is refused

GOOD = {"A": torch.eye(2), "B": torch.ones(2, 1), "C": torch.ones(1, 2), "D": torch.ones(1, 1)}
STABLE = StateSpace([[-1.0]], [[1.0]], [[1.0]])
GROWING = DiscreteStateSpace([[1.1]], [[1.0]], [[1.0]])
U = torch.ones(8, 1)


@pytest.mark.parametrize(
    "build, named",
    [
        (lambda: StateSpace(**GOOD | {"A": torch.ones(2, 3)}), "A"),
        (lambda: StateSpace(**GOOD | {"A": torch.ones(2)}), "A"),
        (lambda: StateSpace(**GOOD | {"A": "legs"}), "A"),
        (lambda: StateSpace(**GOOD | {"A": torch.eye(2).long()}), "A"),
        (lambda: StateSpace(**GOOD | {"A": torch.eye(2).half()}), "A"),
        (lambda: StateSpace(**GOOD | {"A": torch.eye(2) * math.inf}), "A"),
        (lambda: StateSpace(**GOOD | {"A": Diagonal(torch.tensor([math.nan, 0]))}), "A"),
        (lambda: StateSpace(**GOOD | {"B": torch.ones(3, 1)}), "B"),
        (lambda: StateSpace(**GOOD | {"B": torch.ones(2)}), "B"),
        (lambda: StateSpace(**GOOD | {"B": Diagonal(torch.ones(2))}), "B"),
        (lambda: StateSpace(**GOOD | {"C": torch.ones(2, 1)}), "C"),
        (lambda: StateSpace(**GOOD | {"C": torch.ones(1, 2) * math.nan}), "C"),
        (lambda: StateSpace(**GOOD | {"D": torch.ones(2, 1)}), "D"),
        (lambda: StateSpace(**GOOD | {"A": torch.ones(3, 2, 2), "B": torch.ones(4, 2, 1)}), "A, B"),
        (lambda: StateSpace(**GOOD | {"A": DPLR(*[torch.ones(2)] * 3)}), "A.p"),
        (
            lambda: StateSpace(
                **GOOD | {"A": DPLR(torch.ones(2), torch.ones(2, 1), torch.ones(2, 2))}
            ),
            "A.q",
        ),
        (lambda: StateSpace(**GOOD | {"A": Diagonal([1.0])}), "A.lam"),
        (lambda: STABLE.impulse_response(torch.tensor([-1.0])), "times"),
        (lambda: STABLE.impulse_response(1.0), "times"),
        (lambda: StateSpace.from_scipy([1, 2]), "system"),
        (lambda: system("dense", dtype=c128).to(torch.float32), "dtype"),
        (lambda: STABLE.discretize(0.0), "dt"),
        (lambda: STABLE.discretize(math.nan), "dt"),
        (lambda: STABLE.discretize("fast"), "dt"),
        (lambda: system("dense", (2,)).discretize(torch.ones(3)), "dt"),
        (lambda: STABLE.discretize(0.1, "tustin"), "method"),
        (lambda: STABLE.discretize(0.1, read="during"), "read"),
        (lambda: StateSpace([[4.0]], [[1.0]], [[1.0]]).discretize(0.5, "bilinear"), "dt"),
        (lambda: StateSpace([[2.0]], [[1.0]], [[1.0]]).discretize(0.5, "backward_euler"), "dt"),
        (lambda: StateSpace([[3.0]], [[1.0]], [[1.0]]).discretize(2 / 3.0, "bilinear"), "dt"),
        (
            lambda: StateSpace(
                Diagonal(torch.tensor([4.0, 1.0])), torch.ones(2, 1), torch.ones(1, 2)
            ).discretize(0.5, "bilinear"),
            "dt",
        ),
        (
            lambda: StateSpace(
                DPLR(torch.tensor([3.0, 5.0], dtype=f64), torch.ones(2, 1), torch.ones(2, 1)),
                torch.ones(2, 1),
                torch.ones(1, 2),
            ).discretize(2 / (3 + 2**0.5), "bilinear"),  # an eigenvalue is 3 + sqrt 2
            "dt",
        ),
        (lambda: STABLE.discretize(0.1).simulate(torch.ones(8, 2)), "u"),
        (lambda: STABLE.discretize(0.1).simulate(torch.ones(8)), "u"),
        (lambda: STABLE.discretize(0.1).simulate(torch.ones(0, 1)), "u"),
        (lambda: STABLE.discretize(0.1).convolve(U * math.nan), "u"),
        (lambda: STABLE.discretize(0.1).convolve(U.half()), "u"),
        (lambda: system("dense", (3,)).discretize(0.1).simulate(torch.ones(2, 8, 2)), "u"),
        (lambda: STABLE.discretize(0.1).simulate(U, torch.ones(2)), "x0"),
        (lambda: STABLE.discretize(0.1).simulate(U.expand(2, 8, 1), torch.ones(3, 1)), "x0"),
        (lambda: STABLE.discretize(0.1).step(torch.ones(1), torch.ones(1) * math.inf), "x"),
        (lambda: STABLE.discretize(0.1).kernel(0), "L"),
        (lambda: STABLE.discretize(0.1).kernel(10.0), "L"),
        (lambda: STABLE.frequency_response(3.0), "w"),
        (lambda: STABLE.frequency_response(torch.tensor([math.nan])), "w"),
        (lambda: STABLE.solve(U, torch.arange(7)), "times"),
        (lambda: STABLE.solve(U, torch.zeros(8)), "times"),
        # Asked to converge, or to stay finite, where it does not:
        (lambda: GROWING.kernel(10_000), "A"),
        (lambda: GROWING.convolve(torch.ones(100, 1)), "A"),
        (lambda: GROWING.dc_gain(), "A"),
        (lambda: DiscreteStateSpace([[1.0]], [[1.0]], [[1.0]]).dc_gain(), "A"),
        (lambda: StateSpace([[0.0]], [[1.0]], [[1.0]]).dc_gain(), "A"),
        (lambda: STABLE.discretize(3.0, "euler").dc_gain(), "A"),
        (lambda: StateSpace([[0.0]], [[1.0]], [[1.0]]).frequency_response(torch.zeros(1)), "w"),
    ],
)
def test_bad_input_is_named(build, named):
    with pytest.raises(ValueError, match=f"^{named}.*: got .*; expected .*. Fix: "):
        build()


def test_no_steps_at_all_are_told_from_a_wrong_layout():
    with pytest.raises(
        ValueError, match=r"^u: got shape \(0, 1\); expected \[...,T,I\], no size 0"
    ):
        STABLE.discretize(0.1).simulate(torch.ones(0, 1))


def test_integrators_may_be_convolved_and_growing_systems_simulated():
    integrator = StateSpace([[0.0, 1.0], [0.0, 0.0]], [[0.0], [1.0]], [[1.0, 0.0]]).discretize(0.1)
    u = randn(300, 1)
    assert_close(integrator.convolve(u), integrator.simulate(u)[0], rtol=1e-9, atol=1e-9)
    y, _ = GROWING.simulate(torch.ones(100, 1))
    assert y[-1].item() == pytest.approx((1.1**99 - 1) / 0.1)


@pytest.mark.parametrize("wrong", [True, 2.0, 0])
def test_a_number_of_steps_is_a_whole_one(wrong):
    system = StateSpace(-torch.eye(2), torch.ones(2, 1), torch.ones(1, 2), torch.zeros(1, 1))
    with pytest.raises(ValueError, match=r"^L: got .*; expected a number of steps, at least 1"):
        system.discretize(0.1, "bilinear").kernel(wrong)
    with pytest.raises(ValueError, match=r"^N: got"):
        poles("lin", wrong)
