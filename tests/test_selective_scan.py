"""selective_scan: every form and implementation against the float64 loop over tokens."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from subquad.engines import watch
from subquad.engines.selective.api import selective_scan
from subquad.engines.selective.operator import _scan, _scan_backward

NAMES = ("x", "dt", "A", "B", "C", "D", "state")
BOUNDS = [0, 1, 3, 35, 67, 131]
ENGINES = [("torch", torch.float64, 1e-10), ("torch", torch.float32, 1e-5)]
ENGINES += [("numba", torch.float32, 1e-5), ("reference", torch.float32, 1e-5)]


def inputs(rows, T, D=19, N=5, sequences=None, hard=False):
    """float64 leaves; `hard` mixes steps of dt A = 0, -0.001 and -50 in one chunk."""
    torch.manual_seed(1000 * rows + T)
    A = -torch.rand(D, N, dtype=torch.float64) - 0.1
    dt = F.softplus(torch.randn(rows, T, D, dtype=torch.float64) - 1)
    if hard:
        A[0], A[1] = 0.0, -1.0
        dt = torch.tensor([1e-9, 1e-3, 1.0, 50.0], dtype=torch.float64)[
            torch.randint(0, 4, (rows, T, D))
        ]
    shapes = [(rows, T, N), (rows, T, N), (D,), (sequences or rows, D, N)]
    B, C, skip, state = (torch.randn(s, dtype=torch.float64) for s in shapes)
    tensors = (torch.randn(rows, T, D, dtype=torch.float64), dt, A, B, C, skip, state)
    return {n: t.requires_grad_() for n, t in zip(NAMES, tensors)}


def results(arguments, dtype, **options):
    """Outputs, last state and the gradient of everything, for inputs rounded to float32 first."""
    cast = {n: t.detach().float().to(dtype).requires_grad_() for n, t in arguments.items()}
    y, last_state = selective_scan(**cast, **options)
    torch.manual_seed(5)
    weights = [torch.randn(t.shape, dtype=torch.float64).to(dtype) for t in (y, last_state)]
    loss = (y * weights[0]).sum() + (last_state * weights[1]).sum()
    gradients = torch.autograd.grad(loss, list(cast.values()))
    return dict(zip(("y", "last_state", *NAMES), (y, last_state, *gradients)))


def assert_close(got, want, tolerance):
    for name in want:
        assert torch.isfinite(got[name]).all(), name
        error = (got[name].double() - want[name]).abs().max()
        assert error <= tolerance * want[name].abs().max().clamp(min=1.0), f"{name}: {error}"


@pytest.mark.parametrize("impl, dtype, tolerance", ENGINES)
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("rows, T", [(2, 1), (1, 2), (2, 63), (1, 64), (2, 65), (1, 1000)])
def test_equals_the_reference(rows, T, hard, impl, dtype, tolerance):
    arguments = inputs(rows, T, hard=hard)
    want = results(arguments, torch.float64, impl="reference")
    assert_close(results(arguments, dtype, impl=impl), want, tolerance)


@pytest.mark.parametrize("impl, dtype, tolerance", ENGINES)
@pytest.mark.parametrize("bounds", [BOUNDS, [0, 131], list(range(132))])
def test_packed_equals_each_alone(bounds, impl, dtype, tolerance):
    arguments = inputs(1, 131, sequences=len(bounds) - 1)
    got = results(arguments, dtype, impl=impl, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    x, dt, A, B, C, D, state = (arguments[n].detach().float().double() for n in NAMES)
    alone = [
        selective_scan(x[:, i:j], dt[:, i:j], A, B[:, i:j], C[:, i:j], D, state[s : s + 1])
        for s, (i, j) in enumerate(pairwise(bounds))
    ]
    want = {
        "y": torch.cat([y for y, _ in alone], 1),
        "last_state": torch.cat([h for _, h in alone]),
    }
    assert_close(got, want, tolerance)
    cu_seqlens = torch.tensor(bounds)
    want = results(arguments, torch.float64, impl="reference", cu_seqlens=cu_seqlens)
    assert_close(got, want, tolerance)


def test_channels_split_over_threads():
    arguments = inputs(2, 70, D=300, N=16)  # two blocks of channels, and enough work for two slices
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        got = results(arguments, torch.float32, impl="numba")
    finally:
        torch.set_num_threads(before)
    assert_close(got, results(arguments, torch.float64, impl="reference"), 1e-5)


@torch.no_grad()
def test_decoding_a_large_batch_splits_over_threads_too():
    x, dt, A, B, C, D, state = (t.detach().float() for t in inputs(40, 1, D=300, N=16).values())
    got = selective_scan(x, dt, A, B, C, D, state)
    torch.testing.assert_close(got, selective_scan(x, dt, A, B, C, D, state, impl="reference"))


@torch.no_grad()
@pytest.mark.parametrize("pieces", [1, 1500])
def test_silence_leaves_no_denormal_numbers(pieces):
    """A state that decays in silence would run a hundred times slower below 1e-38."""
    T, D, N = 1500, 64, 4
    x, state = torch.zeros(1, T, D), torch.ones(1, D, N)
    dt, ones = torch.full((1, T, D), 0.1), torch.ones(1, T, N)
    A = -torch.linspace(0.5, 1.0, D)[:, None].expand(D, N)
    for tokens in zip(*(t.chunk(pieces, 1) for t in (x, dt, ones))):
        x_t, dt_t, ones_t = tokens
        _, state = selective_scan(x_t, dt_t, A, ones_t, ones_t, None, state, impl="numba")
    smallest = torch.finfo(torch.float32).smallest_normal
    assert ((state == 0) | (state >= smallest)).all() and (state == 0).any()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_works_in_a_forked_child():
    """A child inherits the thread pool's object without its threads; it must make its own."""
    arguments = [t.detach().float() for t in inputs(2, 70, D=300, N=16).values()]
    want, _ = selective_scan(*arguments)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as children:
        got, _ = children.submit(selective_scan, *arguments).result(timeout=60)
        threads = children.submit(torch.get_num_threads).result(timeout=60)
    assert torch.equal(got, want)
    assert threads == 1  # for torch's own team, too, has no threads in a child


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_any_cut_gives_the_same(data):
    T = data.draw(st.integers(2, 90))
    cuts = sorted({0, T, *data.draw(st.lists(st.integers(1, T - 1), max_size=6))})
    x, dt, A, B, C, D, state = (inputs(2, T)[n].detach().float() for n in NAMES)
    whole, last = selective_scan(x, dt, A, B, C, D, state)
    pieces = []
    for i, j in pairwise(cuts):
        y, state = selective_scan(x[:, i:j], dt[:, i:j], A, B[:, i:j], C[:, i:j], D, state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["torch", "numba"])
def test_memory_never_holds_every_state(impl):
    """A [Bt,T,D,N] tensor would be 256 MiB here, forward or backward; saved tensors stay small."""
    T, D, N = 4096, 128, 128
    leaves = [torch.randn(1, T, D), torch.rand(1, T, D), -torch.rand(D, N)]
    leaves += [torch.randn(1, T, N), torch.randn(1, T, N)]
    saved = []

    def note(t):
        saved.append(t.nbytes)
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y, _ = selective_scan(*(t.requires_grad_() for t in leaves), impl=impl)
    assert max(saved) <= (T // 32 + 1) * D * N * 4
    y.sum().backward()


def test_nan_is_not_hidden():
    x, dt, A, B, C, D, state = (inputs(1, 9)[n].detach().float() for n in NAMES)
    x[0, 4, 3] = torch.nan
    y, last_state = selective_scan(x, dt, A, B, C, D, state, impl="numba")
    assert y[0, 4:, 3].isnan().all() and last_state[0, 3].isnan().all()
    assert not y[0, :, :3].isnan().any() and not y[0, :4].isnan().any()


@pytest.mark.parametrize("impl, dtype", [("numba", torch.float32), ("torch", torch.float64)])
@pytest.mark.parametrize("bounds", [None, [0, 7, 40]])
def test_custom_op(impl, dtype, bounds):
    arguments = inputs(1, 40, sequences=2 if bounds else 1)
    tensors = [arguments[n].detach().to(dtype).requires_grad_() for n in NAMES]
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    torch.library.opcheck(_scan.op, (*tensors, cu_seqlens, impl, True))


@pytest.mark.parametrize("T", [1, 40])
def test_compile(T):
    arguments = inputs(2, T)

    def run(function):
        cast = [t.detach().float().requires_grad_() for t in arguments.values()]
        y, last_state = function(*cast)
        return y, last_state, *torch.autograd.grad(y.sum() + last_state.square().sum(), cast)

    got = run(torch.compile(selective_scan, fullgraph=True))
    torch.testing.assert_close(got, run(selective_scan), rtol=1e-5, atol=1e-5)


def test_autocast_and_half_inputs_keep_a_float32_state():
    *arguments, state = (t.detach().bfloat16() for t in inputs(2, 40).values())
    with pytest.raises(ValueError, match=r"^state: got torch.bfloat16; expected torch.float32: it"):
        selective_scan(*arguments, state)
    arguments.append(state.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, last_state = selective_scan(*arguments)
        y_1, _ = selective_scan(
            *(t[:, :1] if t.ndim == 3 and t.shape[1] == 40 else t for t in arguments)
        )
    want_y, want_state = selective_scan(*(t.float() for t in arguments))
    assert y.dtype == torch.bfloat16 and last_state.dtype == torch.float32
    assert torch.equal(last_state, want_state) and torch.equal(y, want_y.bfloat16())
    torch.testing.assert_close(y_1, y[:, :1])


GOOD = {n: t.detach().float() for n, t in inputs(2, 6, D=4, N=3).items()}


@pytest.mark.parametrize(
    "change, named",
    [
        ({"x": GOOD["x"][0]}, "x"),
        ({"x": GOOD["x"][:, :0]}, "x"),
        ({"x": GOOD["x"].int()}, "x"),
        ({"dt": GOOD["dt"][:, :5]}, "dt"),
        ({"dt": GOOD["dt"].to("meta")}, "dt"),
        ({"A": GOOD["A"][:3]}, "A"),
        ({"A": GOOD["A"][:, :0]}, "A"),
        ({"B": GOOD["B"][:, :, :2]}, "B"),
        ({"C": GOOD["C"][:1]}, "C"),
        ({"D": GOOD["D"][:3]}, "D"),
        ({"state": GOOD["state"][:1]}, "state"),
        ({"cu_seqlens": torch.tensor([0, 6])}, "cu_seqlens"),
        ({"form": "chunked"}, "form"),
        ({"impl": "triton"}, "impl"),
        ({"form": "scan", "impl": "numba"}, "impl"),
        ({"x": GOOD["x"].double(), "state": None, "impl": "numba"}, "impl"),
        ({"x": GOOD["x"].double()}, "state"),
    ],
)
def test_bad_input_is_named(change, named):
    with pytest.raises(ValueError, match=f"^{named}: .*expected"):
        selective_scan(**{**GOOD, **change})


@pytest.mark.parametrize("form", ["recurrent", "scan"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_form_alone_can_be_asked_for(form, dtype):
    arguments = {n: t.to(dtype) for n, t in GOOD.items()}
    want, _ = selective_scan(**arguments, impl="reference")
    torch.testing.assert_close(selective_scan(**arguments, form=form)[0], want)


@pytest.mark.parametrize("impl", ["numba", "torch"])
def test_a_backward_pass_for_which_nothing_was_kept(impl):
    """As of a program that was exported with inputs that require no gradient."""
    leaves = [t.detach().float().requires_grad_() for t in inputs(1, 70).values()]
    found = []
    for save in (True, False):
        y, last, _ = _scan(*leaves, None, impl, save)
        found.append(torch.autograd.grad(y.sum() + last.sum(), leaves))
    assert all(map(torch.equal, *found))
    none = _scan(*leaves, None, impl, False)[2]
    with pytest.raises(RuntimeError, match=r"^checkpoints: got none"):  # rather than read them
        _scan_backward(y, last, *leaves, None, none, impl)


def test_what_one_token_runs_is_told():
    leaves = {n: t.detach().float().requires_grad_() for n, t in inputs(2, 1).items()}
    with watch() as calls:
        selective_scan(**{n: t.detach() for n, t in leaves.items()})
        selective_scan(**leaves)
    assert [(call.form, call.impl) for call in calls] == [
        ("recurrent", "numba"),
        ("recurrent", "torch"),
    ]
    assert "one step" in calls[1].why
