"""The compiled chunks of the CPU, and the small products that they are made of."""

from __future__ import annotations

import itertools
import threading
import time

import numpy as np
import pytest
import torch

from subquad.engines import Delta, LowRank, explain, linear_recurrence
from test_recurrence import DECAYS, assert_equal, leaves, make, run

CASES = list(itertools.product(DECAYS, (None, "delta")))
KINDS = pytest.mark.parametrize(
    ("decay", "erase"), list(itertools.product(("BTH", "BTHK"), (None, "delta")))
)


def single(arguments):
    """The same call in float32."""
    call = arguments | {n: x.float() for n, x in leaves(arguments).items() if n in arguments}
    if arguments["erase"] is not None:
        call["erase"] = Delta(arguments["erase"].beta.float())
    return call


def assert_as_the_loop(arguments, label):
    """To 1e-5 of the float64 loop; where float32 itself is further off, to twice the loop's own."""
    want = run(arguments, torch.float64, impl="reference")
    loop = run(arguments, torch.float32, form="recurrent", impl="torch")
    got = run(arguments, torch.float32, form="chunked", impl="numba")
    for name, w in want.items():
        norm = w.norm().clamp(min=1e-3)
        own = ((loop[name].double() - w).norm() / norm).item()
        assert_equal({name: got[name]}, {name: w}, max(1e-5, 2 * own), label)


@pytest.mark.parametrize("hard", [False, True], ids=["easy", "hard"])
@pytest.mark.parametrize(("decay", "erase"), CASES)
def test_equals_the_loop(decay, erase, hard):
    """Any T against the chunk and its halves, any K and V against what products are padded to."""
    for T, K, V in (
        (1, 1, 1),
        (2, 6, 5),
        (17, 17, 15),
        (31, 32, 8),
        (63, 6, 33),
        (64, 7, 64),
        (65, 40, 3),
    ):
        arguments = make(decay, erase, T=T, K=K, V=V, hard=hard, seed=T)
        assert_as_the_loop(arguments, f"{T} tokens")
    arguments = make(decay, erase, B=1, T=1000, Hk=1, hard=hard)
    assert_as_the_loop(arguments, "1000 tokens")


@pytest.mark.parametrize(("decay", "erase"), CASES)
def test_packed_sequences_never_meet(decay, erase):
    packed = [0, 1, 2, 40, 104, 105, 233, 300]
    assert_as_the_loop(make(decay, erase, B=1, T=300, hard=True, packed=packed), "packed")


@pytest.mark.parametrize("hard", [False, True], ids=["easy", "hard"])
@pytest.mark.parametrize("decay", DECAYS)
def test_a_bonus_equals_the_loop(decay, hard):
    """Chunks that read after a write, asked by each token's follower."""
    for T in (1, 2, 63, 64, 65, 130):
        arguments = make(decay, None, bonus=True, T=T, hard=hard, seed=T)
        assert_as_the_loop(arguments, f"{T} tokens")
    packed = [0, 1, 2, 40, 104, 105, 233, 300]
    arguments = make(decay, None, bonus=True, B=1, T=300, hard=hard, packed=packed)
    assert_as_the_loop(arguments, "packed")


@KINDS
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("B, Hk, G", [(1, 1, 5), (3, 1, 2), (1, 2, 3), (2, 4, 1)])
def test_any_split_over_threads(B, Hk, G, threads, decay, erase, monkeypatch):
    """Heads that share a key may meet on several threads: their gradients of it are summed."""
    from subquad.backend.cpu import compile as cpu

    monkeypatch.setattr(cpu, "SMALL", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert_as_the_loop(make(decay, erase, B=B, T=100, Hk=Hk, G=G), f"{threads} threads")


@KINDS
def test_gates_that_forget_all(decay, erase):
    """A log decay of -inf is a fresh start, and has no gradient."""
    arguments = make(decay, erase, T=100)
    arguments["log_decay"][:, 70] = -torch.inf
    arguments["log_decay"][:, 20:23, ..., ::2] = -torch.inf  # of some heads, or some channels
    got = run(arguments, torch.float32, form="chunked", impl="numba")
    want = run(arguments, torch.float64, impl="reference")
    assert_equal(got, want, 1e-5, "forgotten")


@KINDS
def test_views_and_what_is_not_asked_for(decay, erase):
    """Halves of a wider projection, a permuted gradient; only the output or the state is used."""
    call = single(make(decay, erase, T=70, K=8, V=8, Hk=4, G=1))
    wide = (0.2 * torch.randn(2, 70, 3, 4, 8)).requires_grad_()
    halves = dict(zip("qkv", wide.unbind(2)))
    want, final = linear_recurrence(**(call | halves), impl="torch")
    o, state = linear_recurrence(**(call | halves))
    weight = torch.randn(4, 8, 2, 70).permute(2, 3, 0, 1)
    for mine, other in (((o * weight).sum(), (want * weight).sum()), (state.sum(), final.sum())):
        got, expected = (torch.autograd.grad(x, wide, retain_graph=True)[0] for x in (mine, other))
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_runs_where_it_can():
    from subquad.engines.matrix.cpu import chunked as compiled
    from subquad.engines.matrix.cpu import walk as chunked_cpu

    assert compiled.CHUNK == chunked_cpu.CHUNK  # which is compiled in, and costs numba to look up
    bonus = [(decay, None, True) for decay in DECAYS]
    for kind in (*((*case, False) for case in CASES), *bonus):
        page = explain(**single(make(*kind, T=100)))
        assert (page.form, page.impl, page.chunk) == ("chunked", "numba", 64)
    call = single(make("BTH", "delta", T=100))
    others = [make("BTH", None, T=100), make("BTH", "delta", T=100)]
    others += [call | {"form": "recurrent"}, call | {"form": "parallel"}]
    others += [
        single(make("BTHK", None, T=100)) | {"erase": LowRank(*torch.zeros(2, 2, 100, 4, 6))}
    ]
    for other in others:
        assert explain(**other).impl == "torch"
        with pytest.raises(ValueError, match=r"^impl: .*numba"):
            explain(**other, impl="numba")


@pytest.mark.parametrize("own", [False, True], ids=["openmp", "pool"])
def test_threads(own, monkeypatch):
    """All slices run, on torch's team as on our own; errors come through; the caller's treatment
    of denormal numbers stays as it was."""
    from subquad.backend.cpu import compile as cpu

    if own:
        monkeypatch.setattr(cpu, "_parallel", None)
    elif cpu._parallel is None:
        pytest.skip("torch runs on another kind of threads")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    seen = []

    def kernel(offset, first, last):
        seen.append((first, last, bool(cpu.SMALLEST * np.float32(0.5) == 0)))
        return offset + first

    assert cpu.over_channels(kernel, 40, cpu.SMALL, 1000) == [1000, 1016, 1032]
    assert sorted(seen) == [(0, 16, True), (16, 32, True), (32, 40, True)]
    assert cpu.SMALLEST * np.float32(0.5) > 0

    def broken(first, last):
        raise KeyError(first)

    with pytest.raises(KeyError):
        cpu.over_channels(broken, 40, cpu.SMALL)


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (48, 80)])
def test_transpose(shape):
    from subquad.backend.cpu.vectors import transpose

    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    out = np.empty(shape[::-1], np.float32)
    transpose(x, out)
    np.testing.assert_array_equal(out, x.T)


@pytest.mark.parametrize("L", [8, 24, 64])
def test_products(L):
    from subquad.backend.cpu import product

    r = np.random.default_rng(0)
    square = L == 64
    for M, N in ((64, 64), (32, 96), (8, 32), (16, 16), (24, 48)):
        a, b = (r.standard_normal(s).astype(np.float32) for s in ((M, L), (L, N)))
        for left in (a, np.asfortranarray(a)):
            c = np.ones((M, N), np.float32)
            product.add_product(left, b, c, product.WHOLE)
            np.testing.assert_allclose(c, 1 + a @ b, rtol=1e-4, atol=1e-4)
        if square and M == L:
            for kind, part in ((product.LOWER, np.tril), (product.UPPER, np.triu)):
                c = np.zeros((M, N), np.float32)
                product.add_product(part(a), b, c, kind)
                np.testing.assert_allclose(c, part(a) @ b, rtol=1e-4, atol=1e-4)
            c = np.empty((M, M), np.float32)
            product.lower_product(a, b, c)
            np.testing.assert_allclose(np.tril(c), np.tril(a @ b), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("broken", ["q", "k", "v"])
@pytest.mark.parametrize("kind", [(None,), ("delta",), (None, True)], ids=str)
@pytest.mark.parametrize("decay", ["BTH", "BTHK"])
def test_a_broken_sequence_breaks_no_other(decay, kind, broken, bad):
    """NaN and infinities spread into what matrices are padded with, but not to who comes next; nor,
    where outputs are asked for by the next token's query (a bonus), to who came before."""
    bounds = [0, 40, 104, 200]
    call = single(make(decay, *kind, B=1, T=200, Hk=1, packed=bounds))

    def of_others(n, x):
        inputs = {
            n: call[n].clone().requires_grad_() for n in ("q", "k", "v", "log_decay", "state")
        }
        inputs[broken] = x.clone().requires_grad_()
        o, final = linear_recurrence(**(call | inputs), impl="numba")
        dq, dk, dv, dg, dstate = torch.autograd.grad(o.sum() + final.sum(), list(inputs.values()))
        rows = torch.arange(3) != n
        tokens = rows.repeat_interleave(torch.tensor(bounds).diff())
        return *(y[:, tokens] for y in (o, dq, dk, dv, dg)), final[rows], dstate[rows]

    for n in (0, 1):
        sick = call[broken].clone()
        sick[:, bounds[n] : bounds[n] + 10] = bad
        for got, want in zip(of_others(n, sick), of_others(n, call[broken])):
            assert torch.equal(got, want)


@pytest.mark.parametrize(("decay", "erase"), list(itertools.product(("H", "HK"), (None, "delta"))))
def test_one_tensor_for_several(decay, erase):
    """Queries that are the keys, values that every head shares, only the state's gradient asked."""
    call = single(make(decay, erase, T=70, K=5, V=7))
    keys, values = call["k"].requires_grad_(), call["v"][:, :, :1].clone().requires_grad_()
    state = call["state"].requires_grad_()

    def gradients(asked, **how):
        shared = call | {"q": keys, "v": values.expand_as(call["v"])}
        o, final = linear_recurrence(**shared, **how)
        return torch.autograd.grad(o.square().sum() + final.sum(), asked)

    for asked in ((keys, values, state), (state,)):
        for got, want in zip(gradients(asked), gradients(asked, impl="torch")):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_is_not_lost(monkeypatch):
    """It comes in the caller's lines; ctypes swallows it, and others may have done all the work."""
    from subquad.backend.cpu import compile as cpu

    if cpu._parallel is None:
        pytest.skip("torch runs on another kind of threads")
    caller, flushing, seen = threading.get_ident(), cpu._flushing, []

    def interrupted(share):
        if threading.get_ident() != caller:
            return flushing(share)
        deadline = time.monotonic() + 1  # OpenMP may have given us this thread alone
        while len(seen) < 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        raise KeyboardInterrupt

    monkeypatch.setattr(cpu, "_flushing", interrupted)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    with pytest.raises(KeyboardInterrupt):
        cpu.over_channels(lambda first, last: seen.append(first), 40, cpu.SMALL)
