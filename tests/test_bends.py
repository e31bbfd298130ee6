"""What a few rows bend: decays along values, a normaliser, the running maximum, long filters."""

from __future__ import annotations

import pytest
import torch

import subquad

F64 = torch.float64


def draw(*shape: int, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


SHAPES = {"none": None, "[H]": "H", "[H,K]": "HK", "[B,T,H]": "BTH", "[B,T,H,K]": "BTHK"}


def gates(kind: str, sizes: dict[str, int], lowest: float = -20.0) -> torch.Tensor | None:
    """Most near 0, some far below."""
    axes = SHAPES.get(kind, kind.strip("[]").replace(",", ""))
    if axes is None:
        return None
    return lowest * torch.rand([sizes[axis] for axis in axes], dtype=F64) ** 4


@pytest.mark.parametrize("along_values", ["[H,V]", "[B,T,H,V]"])
@pytest.mark.parametrize("decay", SHAPES)
def test_a_decay_along_values_in_every_form(decay, along_values):
    sizes = {"B": 2, "T": 83, "H": 4, "K": 5, "V": 7}
    q, k = draw(2, 83, 2, 5), draw(2, 83, 2, 5)
    v, state = draw(2, 83, 4, 7), draw(2, 4, 5, 7)
    g, w = gates(decay, sizes), gates(along_values, sizes)
    leaves = [x.requires_grad_() for x in (q, k, v, g, w, state) if x is not None]
    found = {}
    for form, impl in [("auto", "reference"), ("chunked", "torch"), ("parallel", "torch")]:
        o, final = subquad.linear_recurrence(
            q, k, v, g, state=state, form=form, impl=impl, value_log_decay=w
        )
        loss = o.square().sum() + final.square().sum()
        found[form] = [o, final, *torch.autograd.grad(loss, leaves)]
    for form in ("chunked", "parallel"):
        for got, want in zip(found[form], found["auto"]):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_a_decay_along_values_of_packed_sequences_and_single_tokens():
    ends = torch.tensor([0, 5, 6, 40])
    q, k, v = (draw(1, 40, 2, n, dtype=torch.float32) for n in (4, 4, 6))
    w, state = -torch.rand(1, 40, 2, 6), draw(3, 2, 4, 6, dtype=torch.float32)
    given = {"state": state, "cu_seqlens": ends, "value_log_decay": w}
    o, final = subquad.linear_recurrence(q, k, v, **given)
    want, last = subquad.linear_recurrence(q, k, v, **given, impl="reference")
    torch.testing.assert_close((o, final), (want, last), rtol=1e-5, atol=1e-5)
    one = {"state": state[:1], "value_log_decay": w[:, :1]}
    got = subquad.linear_recurrence(q[:, :1], k[:, :1], v[:, :1], **one)
    want = subquad.linear_recurrence(q[:, :1], k[:, :1], v[:, :1], **one, impl="reference")
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    told = subquad.explain(q[:, :1], k[:, :1], v[:, :1], **one)
    assert (told.form, told.impl) == ("recurrent", "numba")
    assert told.recurrence == "S_t = S_{t-1} diag(β_t) + k_t v_tᵀ"


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"value_log_decay": torch.zeros(2, 5)}, r"value_log_decay: got shape \(2, 5\); expected"),
        ({"value_log_decay": torch.zeros(1, 3, 2)}, "value_log_decay: got shape"),
        (
            {
                "value_log_decay": torch.zeros(2, 6),
                "erase": subquad.Delta(torch.zeros(1, 3, 2)),
            },
            "value_log_decay: got a decay along values and an erase or a bonus",
        ),
    ],
)
def test_wrong_decays_along_values_are_named(wrong, error):
    q, v = torch.zeros(1, 3, 2, 4), torch.zeros(1, 3, 2, 6)
    with pytest.raises(ValueError, match=error):
        subquad.linear_recurrence(q, q, v, **wrong)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("T", [1, 70])
def test_the_normaliser_sums_the_keys(T, packed):
    """z is what a constant value would write: checked token by token in float64."""
    ends = torch.tensor([0, T // 3, T]) if packed and T > 1 else None
    N = 2 if ends is not None or T == 1 else 3
    B = 1 if ends is not None else N
    q, k = draw(B, T, 2, 4), draw(B, T, 2, 4)
    v, g = draw(B, T, 4, 3), -torch.rand(B, T, 4, dtype=F64)
    S, z = draw(N, 4, 4, 3), draw(N, 4, 4)
    o, n, final, total = subquad.normalised_recurrence(
        q, k, v, g, scale=0.5, state=S, normaliser=z, cu_seqlens=ends
    )
    plain, last = subquad.linear_recurrence(q, k, v, g, None, None, 0.5, S, ends, impl="reference")
    torch.testing.assert_close((o, final), (plain, last), rtol=1e-9, atol=1e-9)
    bounds = [0, T // 3, T] if ends is not None else None
    for s in range(N):
        b = 0 if bounds else s
        here = z[s].clone()
        for t in range(*(bounds[s : s + 2] if bounds else (0, T))):
            here = g[b, t].exp()[:, None] * here + k[b, t].repeat_interleave(2, 0)
            want = 0.5 * (here * q[b, t].repeat_interleave(2, 0)).sum(-1)
            torch.testing.assert_close(n[b, t], want, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(total[s], here, rtol=1e-9, atol=1e-9)


def test_the_normaliser_is_precise_in_half_precision():
    q = torch.rand(1, 4000, 1, 8, dtype=torch.bfloat16)
    v = torch.rand(1, 4000, 1, 8, dtype=torch.bfloat16)
    o, n, _, z = subquad.normalised_recurrence(q, q, v, scale=1.0)
    assert o.dtype == torch.bfloat16 and n.dtype == z.dtype == torch.float32
    want = (q.double().cumsum(1) * q.double()).sum(-1)
    torch.testing.assert_close(n.double(), want, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="normaliser: got a state without it; expected both"):
        subquad.normalised_recurrence(q, q, v, state=torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize("packed", [False, True])
def test_stabilised_gates_are_exact_and_never_exceed_one(packed):
    B, T, C = (1 if packed else 2), 50, 3
    ends = torch.tensor([0, 7, 8, 50]) if packed else None
    N = 3 if packed else B
    f, i = -3 * torch.rand(B, T, C, dtype=F64), 300 * draw(B, T, C)
    start = torch.full((N, C), -torch.inf, dtype=F64)
    start[0] = 5.0
    decay, written, m, last = subquad.stabilise(f, i, start, ends)
    assert (decay <= 1e-12).all() and (written <= 0).all()
    pieces = [(0, 0, 7), (0, 7, 8), (0, 8, 50)] if packed else [(0, 0, 50), (1, 0, 50)]
    for n, (b, begin, end) in enumerate(pieces):
        before = start[n]
        for t in range(begin, end):
            want = torch.maximum(f[b, t] + before, i[b, t])
            torch.testing.assert_close(m[b, t], want)
            torch.testing.assert_close(decay[b, t].exp(), (f[b, t] + before - want).exp())
            torch.testing.assert_close(written[b, t], i[b, t] - want)
            before = want
        torch.testing.assert_close(last[n], before)


def test_a_stabilised_average_has_the_gradients_of_the_plain_one():
    """m is a constant to autograd: ratios do not depend on it."""
    f, i, x = -torch.rand(1, 30, 2, dtype=F64), draw(1, 30, 2), draw(1, 30, 2)
    leaves = [t.requires_grad_() for t in (f, i, x)]

    def average(log_decay, log_input):
        given = (log_input.exp().unsqueeze(-1), x.unsqueeze(-1), log_decay)
        ones = torch.ones_like(given[0])
        o, n, *_ = subquad.normalised_recurrence(ones, *given, scale=1.0)
        return o.squeeze(-1) / n

    plain = average(f, i)
    start = torch.full((1, 2), -torch.inf, dtype=F64)
    stable = average(*subquad.stabilise(f, i, start)[:2])
    torch.testing.assert_close(stable, plain)
    weights = draw(1, 30, 2)
    for got, want in zip(
        torch.autograd.grad((stable * weights).sum(), leaves),
        torch.autograd.grad((plain * weights).sum(), leaves),
    ):
        torch.testing.assert_close(got, want)


def test_nothing_stays_nothing():
    """Gates of -inf from a state of -inf: no NaN."""
    never = torch.full((1, 4, 1), -torch.inf)
    decay, written, m, last = subquad.stabilise(never, never, never[:, 0])
    for x in (decay, written, m, last):
        assert not x.isnan().any()


@pytest.mark.parametrize("T", [1, 2, 37, 64])
def test_a_long_convolution_is_causal_and_exact(T):
    u, h = draw(2, T, 3), draw(T + 5, 3)
    want = torch.stack(
        [sum(h[lag] * u[:, t - lag] for lag in range(t + 1)) for t in range(T)], 1
    )  # fmt: skip
    torch.testing.assert_close(subquad.long_convolution(u, h), want, rtol=1e-10, atol=1e-10)
    for last in {1, min(5, T), T}:
        got = subquad.long_convolution(u, h, last)
        torch.testing.assert_close(got, want[:, T - last :], rtol=1e-10, atol=1e-10)
    changed = u.clone()
    changed[:, -1] += 100.0
    got = subquad.long_convolution(changed, h)[:, :-1]
    torch.testing.assert_close(got, want[:, :-1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("kernel", "last", "error"),
    [
        (torch.zeros(4, 3), None, r"kernel: got shape \(4, 3\); expected \[L,D\] with L >= T = 5"),
        (torch.zeros(5, 2), None, "kernel: got shape"),
        (torch.zeros(5, 3), 6, "last: got 6; expected 1 to T = 5"),
        (torch.zeros(5, 3), True, "last: got True"),
    ],
)
def test_wrong_filters_are_named(kernel, last, error):
    with pytest.raises(ValueError, match=error):
        subquad.long_convolution(torch.zeros(1, 5, 3), kernel, last)
