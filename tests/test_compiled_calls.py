"""The compiled chunks as an operator: what compilation, transforms and autograd make of them."""

from __future__ import annotations

import pytest
import torch
import torch.utils.checkpoint

from subquad.engines import linear_recurrence
from test_compiled import KINDS, single
from test_recurrence import make


@pytest.mark.parametrize("packed", [None, [0, 7, 100]])
@KINDS
def test_operator_is_sound(decay, erase, packed):
    """Its shapes without computing, its gradients under compilation: torch's own checks."""
    from subquad.engines.matrix.cpu.chunked import _chunked, _most_chunks

    call = single(make(decay, erase, B=1, T=100, packed=packed))
    beta = None if erase is None else call["erase"].beta.requires_grad_()
    inputs = [call[n].requires_grad_() for n in ("q", "k", "v", "log_decay", "state")]
    q, k, v, g, state = inputs
    kept = _most_chunks(q, call["cu_seqlens"])
    arguments = (q, k, v, g, beta, 0.5, state, call["cu_seqlens"], kept)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(_chunked.op, arguments, test_utils=tests)

    def gradients(f):
        o, final = f(q, k, v, g, call["erase"], state=state, cu_seqlens=call["cu_seqlens"])
        return torch.autograd.grad(o.square().sum() + final.sum(), inputs)

    torch._dynamo.reset()
    compiled = torch.compile(linear_recurrence, fullgraph=True, backend="aot_eager")
    for got, want in zip(gradients(compiled), gradients(linear_recurrence)):
        torch.testing.assert_close(got, want)


def test_transforms_see_every_operation():
    """Forward derivatives and vmap cannot look into compiled code, so they get none."""
    call = single(make("BTH", "delta", T=20))
    f = lambda v: linear_recurrence(**(call | {"v": v}))[0]  # noqa: E731
    direction = torch.randn_like(call["v"])
    _, moved = torch.func.jvp(f, (call["v"],), (direction,))
    torch.testing.assert_close(moved, f(call["v"] + direction) - f(call["v"]), rtol=1e-3, atol=1e-4)
    several = torch.randn(3, *call["v"].shape)
    torch.testing.assert_close(torch.vmap(f)(several)[1], f(several[1]))


def test_boundaries_are_checked_where_compilation_cannot():
    """Compiled code would write wherever they say."""
    call = single(make("BTH", "delta", B=1, T=100, packed=[0, 40, 100]))
    compiled = torch.compile(linear_recurrence, fullgraph=True, backend="aot_eager")
    compiled(**call)
    for wrong in ([0, 40, 100_000_000], [0, -40, 100], [0, 100, 100], [20, 40, 100]):
        with pytest.raises(ValueError, match=r"cu_seqlens: got .*expected .*T = 100"):
            compiled(**(call | {"cu_seqlens": torch.tensor(wrong, dtype=torch.int32)}))


def test_compiled_once_for_every_length():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(linear_recurrence, fullgraph=True, backend=counter, dynamic=True)
    for T in (70, 100, 131, 200):
        compiled(**single(make("BTH", "delta", T=T)))
    assert counter.frame_count == 1


def test_transforms_within_compilation():
    """Those see every operation too: a forward derivative must not come out as zeros."""
    call = single(make("BTH", "delta", T=20))
    f = lambda v: linear_recurrence(**(call | {"v": v}))[0]  # noqa: E731
    v, direction = call["v"], torch.randn_like(call["v"])
    transformed = (
        lambda v: torch.func.jvp(f, (v,), (direction,))[1],
        torch.func.grad(lambda v: f(v).square().sum()),
        lambda v: torch.vmap(f)(torch.stack((v, direction)))[1],
    )
    for function in transformed:
        torch._dynamo.reset()
        want = function(v)
        assert want.abs().max() > 0.1
        torch.testing.assert_close(torch.compile(function, backend="aot_eager")(v), want)


def test_a_backward_pass_for_which_no_states_were_kept():
    """They are computed again; compiled code that is given none would read them all the same."""
    from subquad.engines.matrix.cpu.chunked import _chunked, _chunked_backward

    call = single(make("BTH", "delta", T=70))
    q = call["q"].requires_grad_()
    arguments = (call["k"], call["v"], call["log_decay"], None, 1.0, call["state"], None)
    found = []
    for kept in (4, 0):
        o, final, starts = _chunked(q, *arguments, kept)
        found.append(torch.autograd.grad(o.sum() + final.sum(), q)[0])
    assert torch.equal(*found) and len(starts) == 0
    with pytest.raises(RuntimeError, match=r"^starts: got 0; expected 4"):
        _chunked_backward(o, final, q, *arguments[:-2], starts, None)


@pytest.mark.parametrize("packed", [None, [0, 7, 100]])
def test_a_bonus_compiles_into_one_graph(packed):
    call = single(make("BTHK", None, bonus=True, B=1, T=100, packed=packed))
    inputs = [call[n].requires_grad_() for n in ("q", "k", "v", "log_decay", "bonus", "state")]

    def gradients(f):
        o, final = f(**call)
        return torch.autograd.grad(o.square().sum() + final.sum(), inputs)

    torch._dynamo.reset()
    compiled = torch.compile(linear_recurrence, fullgraph=True, backend="aot_eager")
    for got, want in zip(gradients(compiled), gradients(linear_recurrence)):
        torch.testing.assert_close(got, want)


def test_checkpoints_and_autocast():
    call = single(make("BTH", "delta", T=70))
    q, k, v = (call[n].bfloat16().float().requires_grad_() for n in "qkv")

    def computed(q, k, v):
        return linear_recurrence(**(call | {"q": q, "k": k, "v": v}))[0]

    want = torch.autograd.grad(computed(q, k, v).sum(), (q, k, v))
    for reentrant in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            o = torch.utils.checkpoint.checkpoint(computed, q, k, v, use_reentrant=reentrant)
        assert o.dtype == torch.float32
        o.sum().backward()
        for x, w in zip((q, k, v), want):
            assert torch.equal(x.grad, w)
            x.grad = None
