"""HiPPO's normal plus low-rank form, and S4's kernel from it."""

import math

import pytest
import torch
from torch.testing import assert_close

from subquad.ssm.cauchy import CHUNK, s4_kernel
from subquad.ssm.continuous import StateSpace
from subquad.ssm.legendre import legs, legt
from subquad.ssm.matrix import DPLR, adjoint
from subquad.ssm.nplr import nplr

HIPPO = {"legs": legs, "legt": legt}


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("N", [1, 2, 7, 64, 256])
@pytest.mark.parametrize("measure", HIPPO)
def test_the_identity(measure, N):
    """A = V (diag(lam) - p p^*) V^*, with V unitary, to rounding of the largest entry of A."""
    form, (A, B) = nplr(measure, N), HIPPO[measure](N)
    eye = torch.eye(N, dtype=torch.complex128)
    assert_close(adjoint(form.V) @ form.V, eye, rtol=0, atol=1e-12)
    largest = A.abs().max().item()
    rebuilt = form.V @ form.A.dense() @ adjoint(form.V)
    assert_close(rebuilt, A.to(rebuilt.dtype), rtol=0, atol=1e-13 * largest)
    assert_close(form.V @ form.B, B.to(rebuilt.dtype), rtol=0, atol=1e-12)
    assert form.p.shape == (N, 1 if measure == "legs" else 2)
    assert_close(form.lam.real, torch.full((N,), -0.5 if measure == "legs" else 0.0).double())
    assert_close(form.lam, form.lam.flip(0).conj(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("measure", HIPPO)
def test_the_system_in_those_coordinates_is_the_same(measure):
    C, u = randn(2, 32), randn(80, 1)
    structured = nplr(measure, 32).system(C).discretize(0.02, "bilinear")
    assert isinstance(structured.A, DPLR)
    want, _ = StateSpace(*HIPPO[measure](32), C).discretize(0.02, "bilinear").simulate(u)
    y, _ = structured.simulate(u)
    assert_close(y.real, want, rtol=1e-9, atol=1e-9)
    assert y.imag.abs().max() < 1e-9


@pytest.mark.parametrize("measure", HIPPO)
@pytest.mark.parametrize("N, L", [(4, 1), (4, 2), (16, 64), (64, 1000), (64, CHUNK + 3)])
def test_s4s_kernel_is_the_dense_one(measure, N, L):
    """Even lengths have the root z = -1, where S4's formula as it is printed divides by zero."""
    C, dt = randn(1, N), 1 / max(L, 16)
    dense = StateSpace(*HIPPO[measure](N), C).discretize(dt, "bilinear", read="after")
    want = dense.kernel(L)
    kernel = s4_kernel(nplr(measure, N).system(C), dt, L)
    assert kernel.dtype == torch.complex128
    assert_close(kernel.real, want, rtol=0, atol=1e-11 * want.abs().max().item())
    assert kernel.imag.abs().max() < 1e-11 * want.abs().max()


def test_a_batch_of_any_dplr_systems_with_many_inputs_and_outputs():
    lam = torch.complex(-randn(3, 6).abs() - 0.1, 4 * randn(3, 6))
    p, q = randn(3, 6, 2, dtype=torch.complex128), randn(6, 2, dtype=torch.complex128) / 9
    s = StateSpace(DPLR(lam, p, q), randn(6, 2), randn(3, 4, 6))
    want = s.discretize(0.1, "bilinear", read="after").kernel(50)
    assert_close(s4_kernel(s, 0.1, 50), want, rtol=1e-9, atol=1e-9)
    single = s4_kernel(s.to(torch.complex64), 0.1, 50)
    assert single.dtype == torch.complex64
    assert_close(single, want.to(torch.complex64), rtol=1e-4, atol=1e-4)


def test_gradients_of_s4s_kernel():
    lam, dt = torch.complex(-randn(3).abs() - 0.5, 2 * randn(3)), 0.3
    inputs = [lam, *(randn(3, 1, dtype=torch.complex128) for _ in "pqB")]
    inputs = [x.clone().requires_grad_() for x in (*inputs, randn(1, 3, dtype=torch.complex128))]

    def run(lam, p, q, B, C):
        return s4_kernel(StateSpace(DPLR(lam, p, q), B, C), dt, 6)

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize(
    "build, named",
    [
        (lambda s: s4_kernel(StateSpace(*legs(4), torch.ones(1, 4)), 0.1, 8), "system.A"),
        (lambda s: s4_kernel(s, 0.1, 0), "L"),
        (lambda s: s4_kernel(s, -0.1, 8), "dt"),
        (lambda s: s4_kernel(s, math.inf, 8), "dt"),
        (lambda s: s4_kernel(growing(), 1.0, 10_000), "system.A"),
        (lambda s: nplr("lmu", 4), "measure"),
        (lambda s: nplr("legs", 0), "N"),
    ],
)
def test_bad_input_is_named(build, named):
    with pytest.raises(ValueError, match=f"^{named}: .*expected"):
        build(nplr("legs", 4).system(torch.ones(1, 4)))


def growing():
    lam, p = torch.tensor([0.5, 1.0]).double(), torch.zeros(2, 1).double()
    return StateSpace(DPLR(lam, p, p), torch.ones(2, 1), torch.ones(1, 2))
