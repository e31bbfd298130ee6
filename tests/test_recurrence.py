"""Every form of the matrix recurrence equals the loop over the one step, forward and backward.

The oracle is `reference.loop` in float64. Float64 forms must agree to 1e-10, float32 ones to 1e-5
of the oracle's norm, for every decay, erase and bonus, on easy and on hard inputs.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from subquad.engines import Delta, LowRank, explain, linear_recurrence, watch
from subquad.engines.matrix import reference
from subquad.table import Recurrence

DECAYS = ("none", "H", "HK", "BTH", "BTHK")
ERASES = (None, "delta", "low_rank")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def make(
    decay, erase, bonus=False, *, B=2, T=65, Hk=2, G=2, K=6, V=5, hard=False, packed=None, seed=0
):
    """Arguments in float64. Hard: log decays from 0 to -50 mixed at random, beta in {0, 1, 2}."""
    r = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=r, dtype=torch.float64)

    def rand(*shape):
        return torch.rand(*shape, generator=r, dtype=torch.float64)

    H = Hk * G
    shapes = {"none": None, "H": (H,), "HK": (H, K), "BTH": (B, T, H), "BTHK": (B, T, H, K)}
    g = None
    if shapes[decay] is not None:
        g = -0.2 * rand(*shapes[decay])
        if hard:
            g = torch.where(rand(*g.shape) < 0.2, -50 * rand(*g.shape), g)
            g = torch.where(rand(*g.shape) < 0.2, 0.0, g)
    e = None
    if erase == "delta":
        beta = 2 * rand(B, T, H)
        e = Delta(beta.round() if hard else beta)
    elif erase == "low_rank":
        a = F.normalize(randn(B, T, H, K), dim=-1)
        e = LowRank(-a, a * rand(B, T, H, 1))
    return {
        "q": randn(B, T, Hk, K),
        "k": F.normalize(randn(B, T, Hk, K), dim=-1),
        "v": randn(B, T, H, V),
        "log_decay": g,
        "erase": e,
        "bonus": randn(H, K) if bonus else None,
        "state": randn(B if packed is None else len(packed) - 1, H, K, V),
        "cu_seqlens": None if packed is None else torch.tensor(packed, dtype=torch.int32),
    }


def leaves(arguments):
    """The float tensors among the arguments, by name."""
    found = {
        n: x for n, x in arguments.items() if isinstance(x, torch.Tensor) and x.is_floating_point()
    }
    e = arguments["erase"]
    if e is not None:
        found |= {n: getattr(e, n) for n in ("beta", "a", "b") if hasattr(e, n)}
    return found


def run(arguments, dtype, **how):
    """Output, final state and the gradients of a random weighted sum of both."""
    xs = {n: x.to(dtype).detach().requires_grad_() for n, x in leaves(arguments).items()}
    call = {n: xs.get(n, x) for n, x in arguments.items()}
    if isinstance(call["erase"], Delta):
        call["erase"] = Delta(xs["beta"])
    elif isinstance(call["erase"], LowRank):
        call["erase"] = LowRank(xs["a"], xs["b"])
    o, state = linear_recurrence(**call, **how)
    r = torch.Generator().manual_seed(1)
    wo = torch.randn(o.shape, generator=r, dtype=torch.float64).to(dtype)
    ws = torch.randn(state.shape, generator=r, dtype=torch.float64).to(dtype)
    grads = torch.autograd.grad((o * wo).sum() + (state * ws).sum(), list(xs.values()))
    return {"o": o, "state": state} | {f"d{n}": g for n, g in zip(xs, grads)}


def assert_equal(got, want, tolerance, label):
    for name, w in want.items():
        g = got[name]
        assert torch.isfinite(g).all(), f"{label}: {name} is not finite"
        error = (g.double() - w).norm() / w.norm().clamp(min=1e-3)
        assert error < tolerance, f"{label}: {name} is off by {error:.2e}, allowed {tolerance}"


CASES = [
    pytest.param(decay, erase, bonus, id=f"{decay}-{erase or 'write'}{'-bonus' if bonus else ''}")
    for decay, erase, bonus in itertools.product(DECAYS, ERASES, (False, True))
    if not (bonus and erase)
]


@pytest.mark.parametrize("hard", [False, True], ids=["easy", "hard"])
@pytest.mark.parametrize(("decay", "erase", "bonus"), CASES)
def test_forms_are_equal(decay, erase, bonus, hard):
    for T in (1, 2, 63, 64, 65):
        arguments = make(decay, erase, bonus, T=T, hard=hard, seed=T)
        want = run(arguments, torch.float64, impl="reference")
        for form, dtype in itertools.product(("recurrent", "chunked", "parallel"), TOLERANCE):
            got = run(arguments, dtype, form=form, impl="torch")
            assert_equal(got, want, TOLERANCE[dtype], f"T={T} {form} {dtype}")


@pytest.mark.parametrize(("decay", "erase", "bonus"), CASES)
def test_a_thousand_tokens(decay, erase, bonus):
    arguments = make(decay, erase, bonus, B=1, T=1000, Hk=1, hard=True)
    want = run(arguments, torch.float64, impl="reference")
    for form, dtype in itertools.product(("chunked", "parallel"), TOLERANCE):
        got = run(arguments, dtype, form=form)
        assert_equal(got, want, TOLERANCE[dtype], f"{form} {dtype}")


def test_many_draws_err_no_more_than_the_loop():
    """Where a sum over all tokens cancels (the gradient of a fixed decay), float32 itself is off by
    more than 1e-5: then the loop's own float32 error, doubled, is what a form may show."""
    for seed in range(3):
        for case in CASES:
            arguments = make(*case.values, B=1, T=400, Hk=1, hard=True, seed=seed)
            want = run(arguments, torch.float64, impl="reference")
            loop = run(arguments, torch.float32, form="recurrent")
            for form in ("chunked", "parallel"):
                got = run(arguments, torch.float32, form=form)
                for name, w in want.items():
                    norm = w.norm().clamp(min=1e-3)
                    own = ((loop[name].double() - w).norm() / norm).item()
                    error = ((got[name].double() - w).norm() / norm).item()
                    assert error < max(1e-5, 2 * own), f"{case.id} {seed} {form} {name}: {error}"


@pytest.mark.parametrize(("decay", "erase", "bonus"), CASES)
def test_packed_sequences_never_meet(decay, erase, bonus):
    packed = [0, 1, 2, 40, 104, 105, 130]
    arguments = make(decay, erase, bonus, B=1, T=130, hard=True, packed=packed)
    want = run(arguments, torch.float64, impl="reference")
    for form, dtype in itertools.product(("recurrent", "chunked"), TOLERANCE):
        got = run(arguments, dtype, form=form)
        assert_equal(got, want, TOLERANCE[dtype], f"{form} {dtype}")
    # And the reference is each sequence run alone.
    cuts = list(itertools.pairwise(packed))
    for n, (i, j) in enumerate(cuts):
        alone = {k: x for k, x in arguments.items() if k != "cu_seqlens"}
        for name in ("q", "k", "v"):
            alone[name] = arguments[name][:, i:j]
        if arguments["log_decay"] is not None and arguments["log_decay"].ndim > 2:
            alone["log_decay"] = arguments["log_decay"][:, i:j]
        e = arguments["erase"]
        if isinstance(e, Delta):
            alone["erase"] = Delta(e.beta[:, i:j])
        elif isinstance(e, LowRank):
            alone["erase"] = LowRank(e.a[:, i:j], e.b[:, i:j])
        alone["state"] = arguments["state"][n : n + 1]
        o, state = linear_recurrence(**alone, form="chunked")
        torch.testing.assert_close(o, want["o"][:, i:j], rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(state[0], want["state"][n], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("erase", ERASES)
@pytest.mark.parametrize("decay", DECAYS)
def test_shared_keys_are_expanded_keys(decay, erase):
    arguments = make(decay, erase, Hk=2, G=3)
    wide = arguments | {n: arguments[n].repeat_interleave(3, dim=2) for n in ("q", "k")}
    for form in ("recurrent", "chunked", "parallel"):
        o, state = linear_recurrence(**arguments, form=form)
        assert state.is_contiguous()  # whoever saves it need not know how it was computed
        o2, state2 = linear_recurrence(**wide, form=form)
        torch.testing.assert_close(o, o2)
        torch.testing.assert_close(state, state2)


def test_shared_keys_stay_shared_in_memory():
    """One key head, 64 heads: expanding q or k would show as a tensor of T*H*K numbers."""
    T, H, K, V = 256, 64, 256, 2
    q, k, v = torch.randn(1, T, 1, K), torch.randn(1, T, 1, K), torch.randn(1, T, H, V)
    g = -torch.rand(1, T, H)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(out):
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.untyped_storage().nbytes() // x.element_size())
            return out

    with Watch():
        linear_recurrence(q, k, v, log_decay=g, form="chunked")
    expected = T * H * 64  # the decay weights [C,C] of every chunk and head, C = 64
    assert largest <= expected < T * H * K // 2
    with Watch():
        largest = 0
        linear_recurrence(q, k, v, form="chunked")
    assert largest < T * H * K // 8


@pytest.mark.parametrize("form", ["recurrent", "chunked", "parallel"])
@pytest.mark.parametrize("erase", ERASES)
def test_total_forgetting(form, erase):
    """log_decay = -inf empties the state and spoils nothing, not even gradients."""
    for decay in ("BTH", "BTHK"):
        arguments = make(decay, erase)
        arguments["log_decay"][:, 20] = float("-inf")
        got = run(arguments, torch.float64, form=form)
        if erase != "low_rank":  # whose b a^T S is not decayed
            fresh = {k: x for k, x in arguments.items() if k != "state"}
            o, _ = linear_recurrence(**fresh, form=form)
            torch.testing.assert_close(got["o"][:, 20:], o[:, 20:])
        for name, x in got.items():
            assert torch.isfinite(x).all(), name


@pytest.mark.parametrize("erase", ERASES)
@pytest.mark.parametrize("decay", ["H", "HK", "BTH", "BTHK"])
def test_total_forgetting_where_chunks_are_ragged(decay, erase):
    """Places without a token must not meet an infinite gate: packed, and a ragged last chunk."""
    for packed in (None, [0, 3, 10, 75]):
        arguments = make(decay, erase, B=1, T=75, packed=packed)
        g = arguments["log_decay"]
        g[..., 0] = float("-inf")  # a whole head, or a whole key channel, also at token 0
        want = run(arguments, torch.float64, form="recurrent")
        got = run(arguments, torch.float64, form="chunked")
        for name, w in want.items():
            if name == "dlog_decay":  # the loop's own gradient of -inf is 0 * inf in places
                assert torch.isfinite(got[name]).all()
            else:
                torch.testing.assert_close(got[name], w, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("erase", ERASES)
def test_a_spoilt_sequence_spoils_no_other(erase):
    """NaN in one packed sequence stays there; padded batches are packed, so this matters."""
    packed = [0, 1, 64, 66, 130]
    arguments = make("BTH", erase, B=1, T=130, packed=packed)
    clean, _ = linear_recurrence(**arguments, form="chunked")
    arguments["v"][0, 0] = float("nan")
    o, state = linear_recurrence(**arguments, form="chunked")
    assert o[:, 0].isnan().any() and state[0].isnan().any()
    torch.testing.assert_close(o[:, 1:], clean[:, 1:])
    assert torch.isfinite(state[1:]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype):
    """Inputs are rounded to the half type, nothing else is: the state stays float32."""
    arguments = make("BTH", "delta", T=200)
    half = {n: arguments[n].to(dtype) for n in ("q", "k", "v")}
    g, beta = arguments["log_decay"].float(), arguments["erase"].beta.float()
    o, state = linear_recurrence(**half, log_decay=g, erase=Delta(beta))
    exact = {n: x.double() for n, x in half.items()}
    want, final = linear_recurrence(**exact, log_decay=g.double(), erase=Delta(beta.double()))
    assert o.dtype == dtype and state.dtype == torch.float32
    assert (o.double() - want).norm() / want.norm() < torch.finfo(dtype).eps
    assert (state.double() - final).norm() / final.norm() < 1e-5


def test_autocast_does_not_reach_the_state():
    arguments = make("BTH", "delta", T=100)
    q, k, v, beta, g = (
        x.float()
        for x in (*(arguments[n] for n in "qkv"), arguments["erase"].beta, arguments["log_decay"])
    )
    want = linear_recurrence(q, k, v, g, Delta(beta))
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_recurrence(q, k, v, g, Delta(beta))
    assert torch.equal(want[0], got[0]) and torch.equal(want[1], got[1])
    with torch.autocast("cpu", torch.bfloat16):  # projections come out in bfloat16, gates do not
        o, state = linear_recurrence(q.bfloat16(), k.bfloat16(), v, g, Delta(beta))
    assert o.dtype == torch.float32 and state.dtype == torch.float32


@pytest.mark.parametrize(("decay", "erase", "bonus"), CASES)
def test_continuing_is_one_pass(decay, erase, bonus):
    """Any cut, with the state carried over, gives the whole."""
    arguments = make(decay, erase, bonus, T=150)
    whole, final = linear_recurrence(**arguments)
    state, outputs = arguments["state"], []
    for i, j in ((0, 1), (1, 70), (70, 71), (71, 73), (73, 150)):
        part = arguments | {n: arguments[n][:, i:j] for n in ("q", "k", "v")} | {"state": state}
        if arguments["log_decay"] is not None and arguments["log_decay"].ndim > 2:
            part["log_decay"] = arguments["log_decay"][:, i:j]
        e = arguments["erase"]
        if isinstance(e, Delta):
            part["erase"] = Delta(e.beta[:, i:j])
        elif isinstance(e, LowRank):
            part["erase"] = LowRank(e.a[:, i:j], e.b[:, i:j])
        o, state = linear_recurrence(**part)
        outputs.append(o)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(state, final, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("hard", [False, True], ids=["easy", "hard"])
@pytest.mark.parametrize(("decay", "erase", "bonus"), CASES)
def test_compiled_decoding(decay, erase, bonus, hard):
    """One token of many sequences in compiled code: small (one thread) and large (several)."""
    for B, K, V in ((1, 1, 1), (3, 6, 5), (4, 64, 160)):
        arguments = make(decay, erase, bonus, B=B, T=1, K=K, V=V, hard=hard)
        want = linear_recurrence(**arguments, impl="reference")
        single = {n: x.float() for n, x in leaves(arguments).items()}
        call = {n: single.get(n, x) for n, x in arguments.items()}
        if erase == "delta":
            call["erase"] = Delta(single["beta"])
        elif erase == "low_rank":
            call["erase"] = LowRank(single["a"], single["b"])
        before = call["state"].clone()
        with torch.no_grad():
            assert explain(**call).impl == "numba"
            got = linear_recurrence(**call)
        for g, w in zip(got, want):
            assert ((g.double() - w).norm() / w.norm()).item() < 1e-5
        assert torch.equal(call["state"], before)  # an old state stays valid
        call["q"].requires_grad_()
        assert explain(**call).impl == "torch"


@pytest.mark.parametrize("chunk", [1, 2, 16, 32, 128, 256])
def test_any_chunk_size(chunk, monkeypatch):
    from subquad.engines.matrix import plan

    for erase, decay in itertools.product(ERASES, ("none", "BTH", "BTHK")):
        arguments = make(decay, erase, T=100)
        want = run(arguments, torch.float64, impl="reference")
        monkeypatch.setattr(plan, "CHUNK", chunk)
        got = run(arguments, torch.float64, form="chunked")
        assert_equal(got, want, 1e-10, f"chunk {chunk} {decay} {erase}")


def test_long_sequences_go_in_pieces(monkeypatch):
    """More chunks than are worked on at once: the same numbers."""
    from subquad.engines.matrix import forms

    for erase, packed in itertools.product(ERASES, (None, [0, 10, 300, 301, 1000])):
        arguments = make("BTHK", erase, B=1, T=1000, packed=packed)
        want = run(arguments, torch.float64, form="chunked")
        with monkeypatch.context() as m:
            m.setattr(forms, "CHUNKS_AT_ONCE", 3)
            got = run(arguments, torch.float64, form="chunked")
        assert_equal(got, want, 1e-12, f"{erase} {packed}")


@pytest.mark.parametrize("erase", ERASES)
def test_compiles_into_one_graph(erase):
    torch._dynamo.reset()
    compiled = torch.compile(linear_recurrence, fullgraph=True, backend="aot_eager")
    for decay, packed in (("BTHK", None), ("BTH", [0, 7, 100])):
        B = 2 if packed is None else 1
        arguments = make(decay, erase, B=B, T=100, packed=packed)
        o, state = compiled(**arguments)
        want, final = linear_recurrence(**arguments)
        torch.testing.assert_close(o, want)
        torch.testing.assert_close(state, final)


@pytest.mark.slow
def test_compiles_with_inductor():
    torch._dynamo.reset()
    arguments = make("BTHK", "delta", T=100)
    o, _ = torch.compile(linear_recurrence, fullgraph=True)(**arguments)
    torch.testing.assert_close(o, linear_recurrence(**arguments)[0])


def test_second_derivatives():
    """Everything is made of differentiable operations, so gradients have gradients."""
    a = make("BTHK", "delta", B=1, T=5, K=3, V=2, Hk=1, G=1)

    def f(q, k, v, g, beta, state):
        return linear_recurrence(q, k, v, g, Delta(beta), state=state, form="chunked")

    inputs = [a["q"], a["k"], a["v"], a["log_decay"], a["erase"].beta, a["state"]]
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


def test_explain_says_what_runs():
    arguments = make("BTH", "delta", T=100)
    page = explain(**arguments)
    assert (page.form, page.impl, page.chunk) == ("chunked", "torch", 64)
    assert page.state_shape == (2, 4, 6, 5) and "I - β_t k_t k_tᵀ" in str(page)
    one = {n: (x[:, :1] if n in ("q", "k", "v", "log_decay") else x) for n, x in arguments.items()}
    one["erase"] = Delta(arguments["erase"].beta[:, :1])
    assert explain(**one).form == "recurrent"
    meta = {n: arguments[n].to("meta") for n in ("q", "k", "v")}
    assert explain(**meta).device == "meta"


def test_watching_what_runs():
    arguments = make("BTH", "delta", T=100)
    with watch() as calls:
        linear_recurrence(**arguments)
    linear_recurrence(**arguments)
    assert calls == [explain(**arguments)]


def test_specs_derive_and_refuse():
    assert Recurrence(decay="fixed_head").time_invariant
    assert not Recurrence(decay="token_key").time_invariant
    assert not Recurrence(erase="delta").time_invariant
    assert Recurrence(read_out="normalised").state_shape(4, 8, 16) == (4, 8, 16)
    assert Recurrence(engine="diagonal", decay="token_element").forms == ("recurrent", "scan")
    for wrong in (
        {"engine": "matrixx"},
        {"decay": "sometimes"},
        {"engine": "diagonal", "erase": "delta"},
        {"erase": "delta", "read_out": "bonus"},
        {"engine": "invariant", "decay": "token_head"},
    ):
        with pytest.raises(ValueError, match="expected"):
            Recurrence(**wrong)
    with pytest.raises(AttributeError):
        Recurrence().decay = "none"  # frozen


def test_the_reference_is_the_definition():
    """Three tokens by hand, with plain matrices."""
    q, k, v = torch.randn(3, 3, 4, dtype=torch.float64)
    g, beta = -torch.rand(3, 4, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    S = torch.zeros(4, 4, dtype=torch.float64)
    outputs = []
    for t in range(3):
        S = torch.diag(g[t].exp()) @ S
        S = S + beta[t] * torch.outer(k[t], v[t] - S.T @ k[t])
        outputs.append(0.5 * S.T @ q[t])
    o, state = linear_recurrence(
        q.view(1, 3, 1, 4), k.view(1, 3, 1, 4), v.view(1, 3, 1, 4),
        g.view(1, 3, 1, 4), Delta(beta.view(1, 3, 1)), impl="reference",
    )  # fmt: skip
    torch.testing.assert_close(o[0, :, 0], torch.stack(outputs))
    torch.testing.assert_close(state[0, 0], S)
    assert reference.decay_at(None, 0) is None
