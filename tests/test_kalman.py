"""Kalman filter and smoother: against statsmodels, the joint Gaussian, and form against form."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from statsmodels.tsa.statespace.kalman_smoother import KalmanSmoother
from torch.testing import assert_close

from subquad.ssm.continuous import StateSpace
from subquad.ssm.discrete import DiscreteStateSpace
from subquad.ssm.gaussian import GaussianStateSpace, noise_in_a_step, stationary_covariance
from subquad.ssm.matrix import Diagonal
from subquad.ssm.scan import associative_scan

FORMS = ("recurrent", "parallel")
f64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=f64, generator=generator(seed))


def covariance(N, seed=0, batch=()):
    L = randn(*batch, N, N, seed=seed)
    return L @ L.mT + 0.1 * torch.eye(N)


def random_model(N=4, I=2, O=3, batch=(), stationary=False):
    A = 0.9 * torch.linalg.qr(randn(*batch, N, N))[0]
    system = DiscreteStateSpace(A, randn(N, I, seed=1), randn(O, N, seed=2), randn(O, I, seed=3))
    prior = {} if stationary else {"mean": randn(N, seed=6), "cov": covariance(N, 7)}
    return GaussianStateSpace(system, covariance(N, 4), covariance(O, 5), **prior)


def gaps(y, share=0.2):
    """Some outputs missing, some steps without any."""
    y = y.clone()
    y[torch.rand(y.shape, generator=generator(9)) < share] = math.nan
    y[..., 3:5, :] = math.nan
    return y


def statsmodels_smooth(model, y, u):
    s = model.system
    theirs = KalmanSmoother(s.outputs, s.state_size, s.state_size)
    theirs["transition"], theirs["design"] = s.matrix.dense().numpy(), s.C.numpy()
    theirs["selection"] = np.eye(s.state_size)
    theirs["state_cov"], theirs["obs_cov"] = model.Q.numpy(), model.R.numpy()
    theirs.bind(np.ascontiguousarray(y.numpy()))
    theirs["obs_intercept"] = (s.D @ u.mT).numpy()
    theirs["state_intercept"] = (s.B @ u.mT).numpy()
    theirs.initialize_known(model.mean.numpy(), model.cov.numpy())
    return theirs.smooth()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("T", [1, 2, 7, 100])
def test_equals_statsmodels(form, missing, T):
    model, u = random_model(), randn(T, 2, seed=11)
    _, y = model.sample(T, u, generator())
    y = gaps(y) if missing else y
    want = statsmodels_smooth(model, y, u)
    ours = model.smooth(y, u, form)
    past = ours.filtered
    pairs = [
        (past.mean, want.filtered_state.T),
        (past.cov, want.filtered_state_cov.transpose(2, 0, 1)),
        (past.predicted_mean, want.predicted_state.T[:T]),
        (past.predicted_cov, want.predicted_state_cov.transpose(2, 0, 1)[:T]),
        (ours.mean, want.smoothed_state.T),
        (ours.cov, want.smoothed_state_cov.transpose(2, 0, 1)),
        (past.log_likelihoods, want.llf_obs),
    ]
    for mine, theirs in pairs:
        np.testing.assert_allclose(mine.numpy(), theirs, rtol=1e-8, atol=1e-9)
    assert past.log_likelihood.item() == pytest.approx(want.llf, rel=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_equals_the_joint_gaussian(form):
    """All states and observations are one Gaussian vector: its conditionals, written out."""
    model, T, N = random_model(O=1), 6, 4
    A, C, zero = model.system.A, model.system.C, torch.zeros(N, N).double()
    _, y = model.sample(T, generator=generator())
    blocks = [[zero] * T for _ in range(T)]
    means, cov = [model.mean], model.cov
    for i in range(T):
        if i:
            means.append(A @ means[-1])
            cov = A @ cov @ A.mT + model.Q
        for j in range(i, T):
            blocks[j][i] = torch.linalg.matrix_power(A, j - i) @ cov
            blocks[i][j] = blocks[j][i].mT
    joint = torch.cat([torch.cat(row, 1) for row in blocks])
    mean, big_C = torch.cat(means), torch.block_diag(*[C] * T)
    S = big_C @ joint @ big_C.mT + torch.block_diag(*[model.R] * T)
    want = mean + joint @ big_C.mT @ torch.linalg.solve(S, y[:, 0] - big_C @ mean)
    want_cov = joint - joint @ big_C.mT @ torch.linalg.solve(S, big_C @ joint)
    ours = model.smooth(y, form=form)
    assert_close(ours.mean.flatten(), want, rtol=1e-9, atol=1e-9)
    for k in range(T):
        block = want_cov[k * N : (k + 1) * N, k * N : (k + 1) * N]
        assert_close(ours.cov[k], block, rtol=1e-9, atol=1e-9)
    density = torch.distributions.MultivariateNormal(big_C @ mean, S)
    assert_close(ours.filtered.log_likelihood, density.log_prob(y[:, 0]))


@pytest.mark.parametrize("T", [1, 2, 3, 8, 65, 300])
def test_forms_are_equal(T):
    model, u = random_model(batch=(2,)), randn(3, 2, T, 2, seed=11)
    y = gaps(model.sample(T, u[0], generator())[1].expand(3, -1, -1, -1))
    a, b = (model.smooth(y, u, form) for form in FORMS)
    for one, other in [(a, b), (a.filtered, b.filtered)]:
        for name in vars(one).keys() - {"filtered"}:
            x, z = getattr(one, name), getattr(other, name)
            assert x.shape[:3] == (3, 2, T)
            assert_close(x, z, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_is_its_members(form):
    model, u = random_model(batch=(2,)), randn(2, 30, 2, seed=11)
    y = gaps(model.sample(30, u, generator())[1])
    together = model.smooth(y, u, form)
    for i in range(2):
        s = model.system
        single = GaussianStateSpace(
            DiscreteStateSpace(s.A[i], s.B, s.C, s.D), model.Q, model.R, model.mean, model.cov
        )
        alone = single.smooth(y[i], u[i], form)
        assert_close(together.mean[i], alone.mean)
        assert_close(together.cov[i], alone.cov)
        assert_close(together.filtered.log_likelihood[i], alone.filtered.log_likelihood)


@pytest.mark.parametrize("form", FORMS)
def test_an_output_that_is_never_seen_is_as_if_it_were_not(form):
    model = random_model(I=1)
    _, y = model.sample(20, generator=generator())
    y[:, 1] = math.nan
    s, keep = model.system, [0, 2]
    R = model.R[keep][:, keep]
    smaller = GaussianStateSpace(
        DiscreteStateSpace(s.A, s.B, s.C[keep], s.D[keep]), model.Q, R, model.mean, model.cov
    )
    a, b = model.smooth(y, form=form), smaller.smooth(y[:, keep], form=form)
    assert_close(a.mean, b.mean)
    assert_close(a.cov, b.cov)
    assert_close(a.filtered.log_likelihoods, b.filtered.log_likelihoods)


@pytest.mark.parametrize("form", FORMS)
def test_without_observations_it_forecasts(form):
    model = random_model()
    result = model.filter(torch.full((5, 3), math.nan), form=form)
    A, mean, cov = model.system.A, model.mean, model.cov
    for k in range(5):
        assert_close(result.mean[k], mean)
        assert_close(result.cov[k], cov)
        mean, cov = A @ mean, A @ cov @ A.mT + model.Q
    assert result.log_likelihood == 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("missing", [False, True])
def test_gradients(form, missing):
    y = randn(5, 1)
    if missing:
        y[2] = math.nan
    A = torch.tensor([[0.7, 0.2], [-0.1, 0.5]], dtype=f64)
    inputs = [A, randn(2, 1), randn(1, 2), torch.tensor([0.5, 0.3], dtype=f64).diag(), randn(1, 1)]
    inputs = [x.clone().requires_grad_() for x in inputs]

    def run(A, B, C, L, r):
        system = DiscreteStateSpace(A, B, C)
        model = GaussianStateSpace(system, L @ L.mT, 1 + r @ r.mT)  # its prior is stationary
        result = model.smooth(y, torch.ones(5, 1), form)
        return result.mean, result.cov, result.filtered.log_likelihood

    assert torch.autograd.gradcheck(run, inputs)
    values = torch.randn(5, 1, dtype=f64, requires_grad=True)
    model = random_model(I=1, O=1)
    assert torch.autograd.gradcheck(lambda y: model.smooth(y, form=form).mean, values)


# ---- float32


def tracking():
    """A target of nearly constant velocity, seen precisely; nothing was known of it before.

    Variances from 1e-4 to 1e6 meet in one sum, and float32 has seven digits.
    """
    plant = StateSpace([[0.0, 1.0], [0.0, 0.0]], [[0.0], [1.0]], [[1.0, 0.0]])
    Q, R, cov = [[0, 0], [0, 1e-4]], [[1e-4]], 1e6 * torch.eye(2)
    model = GaussianStateSpace.sampled(plant.to(torch.float32), 0.1, Q, R, cov=cov)
    assert model.Q.dtype == torch.float32
    known = GaussianStateSpace(model.system, model.Q, model.R, cov=torch.eye(2))
    return model, known.sample(3000, generator=generator())[1]


@pytest.mark.parametrize("form", FORMS)
def test_float32_is_stable(form):
    model, y = tracking()
    wide = GaussianStateSpace(
        model.system.to(f64), *(x.double() for x in (model.Q, model.R, model.mean, model.cov))
    )
    ours, exact = model.smooth(y, form=form), wide.smooth(y.double(), form="recurrent")
    for a, b in [(ours, exact), (ours.filtered, exact.filtered)]:
        assert a.mean.dtype == a.cov.dtype == torch.float32
        assert torch.linalg.eigvalsh(a.cov.double()).min() > 0
        spread = b.cov.diagonal(dim1=-2, dim2=-1).sqrt()
        assert ((a.cov - b.cov).abs() <= 1e-6 * spread[..., None] * spread[..., None, :]).all()
        rounding = 1e-3 * spread + 1e-7 * b.mean.abs()
        assert ((a.mean - b.mean).abs() <= rounding).all()
    got, want = ours.filtered.log_likelihood, exact.filtered.log_likelihood
    assert got.item() == pytest.approx(want.item(), rel=1e-5)


# ---- the parts


def test_stationary_covariance_solves_its_equation():
    A = torch.tensor([[0.999, 0.3], [0.0, 0.99]], dtype=f64)
    system, Q = DiscreteStateSpace(A, [[0.0], [0.0]], [[1.0, 0.0]]), covariance(2)
    P = stationary_covariance(system, Q)
    assert_close(A @ P @ A.mT + Q, P, rtol=1e-12, atol=0)
    model = GaussianStateSpace(system, Q, [[1.0]])
    assert_close(model.cov, P)


@pytest.mark.parametrize("dt", [1e-3, 0.5, 40.0])
def test_noise_in_a_step_is_the_integral(dt):
    """By quadrature; at the longest step the exponential by itself would overflow."""
    A = torch.tensor([[-0.1, 1.0], [-2.0, -25.0]], dtype=f64)
    s, density = StateSpace(A, [[0.0], [0.0]], [[1.0, 0.0]]), covariance(2)
    nodes, weights = np.polynomial.legendre.leggauss(12)
    want = torch.zeros(2, 2, dtype=f64)
    edges = torch.cat([torch.zeros(1), torch.logspace(-4, 0, 200)]).double() * dt
    for low, high in pairwise(edges):
        t = low + (high - low) * (torch.as_tensor(nodes) + 1) / 2
        F = torch.linalg.matrix_exp(t[:, None, None] * A)
        weight = torch.as_tensor(weights)[:, None, None] * (high - low) / 2
        want += (weight * (F @ density @ F.mT)).sum(0)
    assert_close(noise_in_a_step(s, density, dt), want, rtol=1e-6, atol=0)


def test_a_sampled_system_is_the_same_at_any_rate():
    """Twice as many steps, every second unobserved: the same knowledge at the same times."""
    plant = StateSpace(Diagonal(torch.tensor([-0.3, -1.0])), [[1.0], [2.0]], [[1.0, 1.0]])
    args = {"Q": 0.2 * torch.eye(2), "R": [[0.1]], "cov": torch.eye(2)}
    slow = GaussianStateSpace.sampled(plant.to(f64), 0.4, **args)
    fast = GaussianStateSpace.sampled(plant.to(f64), 0.2, **args)
    u, y = randn(20, 1), randn(20, 1, seed=1)
    dense_y = torch.full((40, 1), math.nan, dtype=f64)
    dense_y[::2] = y
    a, b = slow.smooth(y, u), fast.smooth(dense_y, u.repeat_interleave(2, 0))
    assert_close(b.mean[::2], a.mean, rtol=1e-8, atol=1e-10)
    assert_close(b.filtered.log_likelihood, a.filtered.log_likelihood)


def test_states_known_without_doubt_are_smoothed():
    """An autoregression seen without noise: its prediction's covariance has no inverse."""
    system = DiscreteStateSpace([[0.5, 0.3], [1.0, 0.0]], [[0.0], [0.0]], [[1.0, 0.0]])
    model = GaussianStateSpace(system, [[1.0, 0.0], [0.0, 0.0]], [[0.0]])
    _, y = model.sample(30, generator=generator())
    y[10:12] = math.nan
    for form in FORMS:
        ours = model.smooth(y, form=form)
        seen = ~y[:, 0].isnan()
        assert_close(ours.mean[seen, 0], y[seen, 0])
    want = statsmodels_smooth(model, y, torch.zeros(30, 1).double())
    np.testing.assert_allclose(ours.mean.numpy(), want.smoothed_state.T, rtol=1e-6, atol=1e-7)


def test_a_noiseless_view_of_a_quiet_state_takes_the_recurrent_form():
    """Only the slope is disturbed, only the level is seen: within one step there is no noise."""
    system = DiscreteStateSpace([[1.0, 1.0], [0.0, 0.9]], [[0.0], [0.0]], [[1.0, 0.0]])
    model = GaussianStateSpace(system, [[0.0, 0.0], [0.0, 1.0]], [[0.0]], cov=torch.eye(2))
    _, y = model.sample(20, generator=generator())
    want = statsmodels_smooth(model, y, torch.zeros(20, 1).double())
    np.testing.assert_allclose(model.smooth(y).mean.numpy(), want.smoothed_state.T, atol=1e-8)
    with pytest.raises(ValueError, match=r"^form: .*recurrent"):
        model.filter(y, form="parallel")


def test_samples_have_the_models_covariance():
    model = random_model(stationary=True, I=1)
    many = GaussianStateSpace(
        model.system, model.Q.expand(4000, 4, 4), model.R, model.mean, model.cov
    )
    x, y = many.sample(3, generator=generator())
    got = torch.cov(x[:, -1].mT)
    assert_close(got, model.cov, rtol=0, atol=0.1 * model.cov.abs().max().item())
    C = model.system.C
    want = C @ model.cov @ C.mT + model.R
    assert_close(torch.cov(y[:, 1].mT), want, rtol=0, atol=0.1 * want.abs().max().item())


@pytest.mark.parametrize("T", [1, 2, 3, 4, 5, 7, 8, 9, 31, 32, 33])
def test_scan_gives_every_prefix_in_order(T):
    """Of a product that does not commute."""
    x = randn(T, 2, 2)
    (prefixes,) = associative_scan(lambda a, b: (a[0] @ b[0],), (x,))
    want = torch.eye(2, dtype=f64)
    for t in range(T):
        want = want @ x[t]
        assert_close(prefixes[t], want)


# ---- what is refused

ONE = DiscreteStateSpace([[0.5]], [[1.0]], [[1.0]])
WALK = DiscreteStateSpace([[1.0]], [[1.0]], [[1.0]])
MODEL = GaussianStateSpace(ONE, [[1.0]], [[1.0]])


@pytest.mark.parametrize(
    "build, named",
    [
        (lambda: GaussianStateSpace(StateSpace([[-1]], [[1]], [[1]]), [[1]], [[1]]), "system"),
        (lambda: GaussianStateSpace.sampled(ONE, 0.1, [[1]], [[1]]), "system"),
        (
            lambda: GaussianStateSpace(
                DiscreteStateSpace([[0.5j]], [[1.0]], [[1.0]]), [[1.0]], [[1.0]]
            ),
            "system",
        ),
        (lambda: GaussianStateSpace(ONE, 1.0, [[1.0]]), "Q"),
        (lambda: GaussianStateSpace(ONE, torch.eye(2), [[1.0]]), "Q"),
        (lambda: GaussianStateSpace(ONE, [[-1.0]], [[1.0]]), "Q"),
        (lambda: GaussianStateSpace(ONE, [[math.nan]], [[1.0]]), "Q"),
        (lambda: GaussianStateSpace(ONE, "loud", [[1.0]]), "Q"),
        (lambda: GaussianStateSpace(ONE, [[1.0]], [1.0]), "R"),
        (lambda: GaussianStateSpace(ONE, [[1.0]], [[1.0]], mean=[1.0, 2.0]), "mean"),
        (lambda: GaussianStateSpace(ONE, [[1.0]], [[1.0]], cov=[[-2.0]]), "cov"),
        (lambda: GaussianStateSpace(WALK, [[1.0]], [[1.0]]), "cov"),  # no stationary state
        (lambda: random_model().__class__(random_model().system, randn(4, 4), torch.eye(3)), "Q"),
        (lambda: MODEL.filter(torch.ones(5)), "y"),
        (lambda: MODEL.filter(torch.ones(5, 2)), "y"),
        (lambda: MODEL.filter([[1.0]]), "y"),
        (lambda: random_model(batch=(2,)).filter(torch.ones(3, 5, 3)), "y"),
        (lambda: MODEL.filter(torch.ones(2, 5, 1), torch.ones(3, 5, 1)), "u"),
        (lambda: MODEL.filter(torch.full((5, 1), math.inf)), "y"),
        (lambda: MODEL.filter(torch.ones(5, 1), torch.ones(4, 1)), "u"),
        (lambda: MODEL.filter(torch.ones(5, 1), torch.ones(5, 1) * math.nan), "u"),
        (lambda: MODEL.filter(torch.ones(5, 1), form="chunked"), "form"),
        (lambda: MODEL.sample(0), "T"),
        (lambda: MODEL.sample(5, torch.ones(4, 1)), "u"),
        (
            lambda: GaussianStateSpace(ONE, [[0.0]], [[0.0]], cov=[[0.0]]).filter(torch.ones(5, 1)),
            "R",
        ),
    ],
)
def test_bad_input_is_named(build, named):
    with pytest.raises(ValueError, match=f"^{named}: got .*; expected .*. Fix: "):
        build()
