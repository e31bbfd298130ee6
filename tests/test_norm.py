"""The norms: compiled and in PyTorch operations against their formulas, in every layout."""

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from subquad.engines.norm.api import gated_rms_norm, l2_norm, rms_norm, skipped_gated_rms_norm
from subquad.engines.runtime.eager import can_call_compiled_code

EPS = 1e-5
# (leading axes, D, size of a group): one token, several, odd sizes, and enough for the threads.
SHAPES = [
    ((1, 1), 64, 64),
    ((2, 1), 96, 24),
    ((1, 7), 15, 5),
    ((3, 2), 17, 17),
    ((2, 1500), 96, 32),
]


def formula(x: Tensor, size: int, weight: Tensor | None) -> Tensor:
    """In float64, weight [D]."""
    groups = x.double().unflatten(-1, (-1, size))
    y = (groups / (groups.square().mean(-1, keepdim=True) + EPS).sqrt()).flatten(-2)
    return y if weight is None else y * weight.double()


def silu(x: Tensor) -> Tensor:
    return x.double() * x.double().sigmoid()


def draw(lead: tuple[int, ...], D: int, layout: str) -> Tensor:
    """[*lead, D] as a projection's output, as a part of a wider one, or transposed."""
    if layout == "part":
        return torch.randn(*lead, D + 8)[..., 3 : 3 + D]
    if layout == "transposed":
        return torch.randn(D, *lead).movedim(0, -1)
    return torch.randn(*lead, D)


@pytest.mark.parametrize("recorded", [False, True], ids=["compiled", "torch"])
@pytest.mark.parametrize("layout", ["whole", "part", "transposed"])
@pytest.mark.parametrize("lead, D, size", SHAPES)
def test_norms_are_their_formulas(lead, D, size, layout, recorded):
    torch.manual_seed(0)
    x, gate = (draw(lead, D, layout) for _ in range(2))
    with torch.set_grad_enabled(recorded):
        x = x.requires_grad_(recorded)
        assert can_call_compiled_code((x, gate)) is not recorded
        for weight in (None, torch.randn(size), torch.randn(D)):
            full = weight if weight is None else weight.repeat(D // weight.shape[0])
            first = gated_rms_norm(x, gate, size, weight, EPS, gate_first=True)
            last = gated_rms_norm(x, gate, size, weight, EPS, gate_first=False)
            for got, want in (
                (rms_norm(x, size, weight, EPS), formula(x, size, full)),
                (first, formula(x.double() * silu(gate), size, full)),
                (last, formula(x, size, full) * silu(gate)),
            ):
                assert got.shape == x.shape and got.requires_grad is recorded
                assert (got - want).norm() < 1e-6 * want.norm()
        squares = x.double().unflatten(-1, (-1, size)).square().sum(-1, keepdim=True)
        want = x.double() / (squares + 1e-6).sqrt().expand(*squares.shape[:-1], size).flatten(-2)
        assert (l2_norm(x, size) - want).norm() < 1e-6 * want.norm()


def test_zeros_and_nan_pass():
    x = torch.stack([torch.zeros(16), torch.full((16,), torch.nan), torch.ones(16)])
    with torch.no_grad():
        zero, nan, one = rms_norm(x, 16, None, EPS)
        assert torch.equal(l2_norm(x, 16)[0], zero)
    assert torch.equal(zero, torch.zeros(16))
    assert nan.isnan().all() and one.isfinite().all()


def test_transforms_see_every_operation():
    """Forward derivatives, vmap and tracing cannot look into compiled code, so they get none."""
    x, tangent = torch.randn(3, 8), torch.randn(3, 8)
    with torch.no_grad():
        _, got = torch.func.jvp(lambda x: rms_norm(x, 8, None, EPS), (x,), (tangent,))
        mapped = torch.func.vmap(lambda x: rms_norm(x, 8, None, EPS))(x)
        traced = torch.jit.trace(lambda x: rms_norm(x, 8, None, EPS), x)
    wide = x.double().requires_grad_()
    want = torch.autograd.functional.jvp(lambda x: formula(x, 8, None), wide, tangent.double())[1]
    assert (got - want).norm() < 1e-5 * want.norm()
    torch.testing.assert_close(mapped, rms_norm(x, 8, None, EPS))
    torch.testing.assert_close(traced(tangent), rms_norm(tangent, 8, None, EPS))


def test_shapes_that_do_not_fit_are_not_read_past_their_end():
    torch.manual_seed(0)
    x, gate = torch.randn(2, 3, 8), torch.randn(2, 3, 1)
    first = gated_rms_norm(x, gate, 8, None, EPS, gate_first=True)
    whole = gated_rms_norm(x, gate.repeat(1, 1, 8), 8, None, EPS, gate_first=True)
    torch.testing.assert_close(first, whole)


@pytest.mark.parametrize("recorded", [False, True], ids=["compiled", "torch"])
def test_what_does_not_fit_is_named(recorded):
    x, gate = torch.randn(2, 3, 8, requires_grad=recorded), torch.randn(2, 3, 8)
    empty = x[..., :0]
    y, skip = x.unflatten(-1, (2, 4)), torch.ones(2)
    for size in (0, -4, 5, 16):
        for function in (
            lambda n: rms_norm(x, n, None, EPS),
            lambda n: gated_rms_norm(x, gate, n, None, EPS, gate_first=True),
            lambda n: gated_rms_norm(x, gate, n, None, EPS, gate_first=False),
            lambda n: skipped_gated_rms_norm(y, y, skip, gate, n, None, EPS),
            lambda n: l2_norm(x, n),
        ):
            with pytest.raises(ValueError, match=rf"^size: got {size}; .*last axis, 8\. Fix: "):
                function(size)
    with pytest.raises(ValueError, match=r"^size: got 0; .*last axis, 0\. Fix: "):
        rms_norm(empty, 0, None, EPS)
    for weight in (torch.ones(7), torch.ones(8, 1), torch.ones(1)):
        with pytest.raises(ValueError, match=r"^weight: got shape .*; expected \[4\] or \[8\]"):
            rms_norm(x, 4, weight, EPS)


def test_leaving_mamba2s_recurrence_is_one_call_to_who_watches():
    seen = []

    class Watcher(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    y, x, gate = (torch.randn(2, 5, 3, 4) for _ in range(3))
    given = (y, x, torch.randn(3), gate.flatten(-2), 6, torch.randn(12), EPS)
    with Watcher():
        got = skipped_gated_rms_norm(*given)
    assert seen == [skipped_gated_rms_norm]
    assert torch.equal(got, skipped_gated_rms_norm(*given))
