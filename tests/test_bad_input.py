"""Bad input gets a ValueError naming the argument, what came, what was expected and the fix.

Hypothesis draws valid arguments, spoils exactly one of them, and the complaint must be about it.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subquad.engines import Delta, LowRank, explain, linear_recurrence

sizes = st.integers(1, 5)


@st.composite
def valid(draw):
    B, T, Hk, G, K, V = (draw(sizes) for _ in range(6))
    H = Hk * G
    decay = draw(st.sampled_from([None, (H,), (H, K), (B, T, H), (B, T, H, K)]))
    erase = draw(st.sampled_from(["none", "delta", "low_rank"]))
    return {
        "q": torch.randn(B, T, Hk, K),
        "k": torch.randn(B, T, Hk, K),
        "v": torch.randn(B, T, H, V),
        "log_decay": None if decay is None else -torch.rand(decay),
        "erase": {
            "none": None,
            "delta": Delta(torch.rand(B, T, H)),
            "low_rank": LowRank(torch.randn(B, T, H, K) / K, torch.randn(B, T, H, K) / K),
        }[erase],
        "bonus": torch.randn(H, K) if erase == "none" and draw(st.booleans()) else None,
        "state": torch.randn(B, H, K, V) if draw(st.booleans()) else None,
    }


def complaint(match, **arguments):
    """Both the call and `explain` refuse, in the house's form."""
    for call in (linear_recurrence, explain):
        with pytest.raises(ValueError, match=match) as caught:
            call(**arguments)
        text = str(caught.value)
        assert "got " in text and "expected " in text and "Fix: " in text, text


@settings(max_examples=60, deadline=None)
@given(valid())
def test_valid_arguments_are_taken(arguments):
    o, state = linear_recurrence(**arguments)
    assert o.shape == arguments["v"].shape
    assert torch.isfinite(o).all() and torch.isfinite(state).all()
    assert explain(**arguments).state_shape == tuple(state.shape)


@settings(max_examples=150, deadline=None)
@given(valid(), st.data())
def test_a_wrong_shape_is_named(arguments, data):
    tensors = {n: x for n, x in arguments.items() if isinstance(x, torch.Tensor)}
    name = data.draw(st.sampled_from(sorted(tensors)))
    x = tensors[name]
    how = data.draw(st.sampled_from(["longer", "deeper", "flatter"]))
    if how == "longer":
        dim = data.draw(st.integers(0, x.ndim - 1))
        if name in ("q", "v") and dim in (2, 3):  # another valid number of heads, K or V for others
            return
        x = torch.cat([x, x], dim)
    elif how == "deeper":
        x = x[None, None]
    else:
        x = x.flatten()
    (B, T, _, K), H = arguments["q"].shape, arguments["v"].shape[2]
    if name == "log_decay" and x.shape in ((H,), (H, K), (B, T, H), (B, T, H, K)):
        return  # a decay after all
    # Whoever is compared with whom, the complaint is about the one changed or one compared with it.
    partners = {"q": "q|k", "k": "k", "v": "v|log_decay", "log_decay": "log_decay"}
    complaint(rf"^({partners.get(name, name)}): ", **(arguments | {name: x}))


@pytest.mark.parametrize("name", ["q", "k", "v", "log_decay", "bonus", "state"])
@pytest.mark.parametrize(
    "value", ["a string", 3, None, "integers", "complex", "elsewhere", "sparse"]
)
def test_a_wrong_kind_is_named(name, value):
    arguments = {
        "q": torch.randn(2, 3, 2, 4),
        "k": torch.randn(2, 3, 2, 4),
        "v": torch.randn(2, 3, 2, 5),
        "log_decay": -torch.rand(2, 3, 2),
        "bonus": torch.randn(2, 4),
        "state": torch.zeros(2, 2, 4, 5),
    }
    x = arguments[name]
    spoiled = {
        "integers": x.long(),
        "complex": x.to(torch.complex64),
        "elsewhere": x.to("meta"),
        "sparse": x.to_sparse(),
    }.get(value, value)
    if value is None and name in ("log_decay", "bonus", "state"):
        linear_recurrence(**(arguments | {name: None}))
    elif name == "q" and value == "elsewhere":  # then everything else is elsewhere
        complaint("^k: ", **(arguments | {name: spoiled}))
    else:
        complaint(rf"^{name}: ", **(arguments | {name: spoiled}))


def test_nested_tensors_are_told_of_packing():
    rows = [torch.randn(n, 2, 4) for n in (3, 5)]
    for layout in (torch.strided, torch.jagged):
        x = torch.nested.nested_tensor(rows, layout=layout)
        complaint(r"^q: got a nested tensor; .*cu_seqlens\.$", q=x, k=x, v=x)


def arguments(B=1, T=10, H=2, K=4, V=3):
    return {
        "q": torch.randn(B, T, H, K),
        "k": torch.randn(B, T, H, K),
        "v": torch.randn(B, T, H, V),
    }


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-3, 14), min_size=0, max_size=6), st.booleans())
def test_boundaries(ends, wide):
    """Exactly the strictly increasing lists from 0 to T are taken."""
    T = 10
    cu = torch.tensor(ends, dtype=torch.int64 if wide else torch.int32)
    good = len(ends) > 1 and ends[0] == 0 and ends[-1] == T and ends == sorted(set(ends))
    if good:
        linear_recurrence(**arguments(), cu_seqlens=cu)
    else:
        complaint("^cu_seqlens: ", **arguments(), cu_seqlens=cu)


def test_boundaries_of_the_wrong_kind():
    complaint("^cu_seqlens: .*list", **arguments(), cu_seqlens=[0, 10])
    complaint("^cu_seqlens: .*float32", **arguments(), cu_seqlens=torch.tensor([0.0, 10.0]))
    complaint("^cu_seqlens: .*batch 2", **arguments(B=2), cu_seqlens=torch.tensor([0, 10]))
    complaint("^cu_seqlens: .*shape", **arguments(), cu_seqlens=torch.tensor([[0, 10]]))
    complaint("^cu_seqlens: .*meta", **arguments(), cu_seqlens=torch.tensor([0, 10]).to("meta"))
    cu = torch.tensor([0, 4, 10])
    complaint("^state: .*N,H,K,V", **arguments(), cu_seqlens=cu, state=torch.zeros(1, 2, 4, 3))


def test_forms_and_implementations():
    a = arguments()
    complaint("^form: got 'fast'", **a, form="fast")
    complaint("^impl: got 'cuda'", **a, impl="cuda")
    complaint(
        "^form: .*packed|^form: .*cu_seqlens",
        **a,
        form="parallel",
        cu_seqlens=torch.tensor([0, 10]),
    )
    complaint("^form: .*reference", **a, form="chunked", impl="reference")
    complaint("^impl: got 'triton'", **a, impl="triton")
    complaint("^impl: got 'numba'", **a, form="recurrent", impl="numba")


@pytest.mark.parametrize("scale", ["a", float("nan"), float("inf"), [1.0]])
def test_scale(scale):
    complaint("^scale: ", **arguments(), scale=scale)


def test_combinations():
    a = arguments()
    complaint("^bonus: ", **a, erase=Delta(torch.rand(1, 10, 2)), bonus=torch.randn(2, 4))
    complaint("^erase: got Tensor", **a, erase=torch.rand(1, 10, 2))
    complaint("^erase.beta: ", **a, erase=Delta(torch.rand(1, 10, 3)))
    complaint("^erase.b: ", **a, erase=LowRank(torch.randn(1, 10, 2, 4), torch.randn(1, 10, 2, 5)))
    complaint("^v: got 3 heads", **(a | {"v": torch.randn(1, 10, 3, 3)}))
    complaint("^q, k, v: .*float64", **(a | {"v": a["v"].double()}))
    complaint("^state: .*bfloat16", **a, state=torch.zeros(1, 2, 4, 3, dtype=torch.bfloat16))
    complaint("^q: .*empty", **{n: x[:, :0] for n, x in a.items()})
