"""Precision is the engines' own, both ways: under autocast, in float64, with NaN and extremes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import subquad
from subquad import Delta, LowRank, mixers
from subquad.decode.cpu.recording import Recording
from subquad.decode.cpu.trace import Trace


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def kinds(T: int) -> dict[str, dict]:
    beta = torch.rand(2, T, 2)
    kappa = F.normalize(torch.randn(2, T, 2, 16), dim=-1)
    return {
        "none": {},
        "bonus": {"bonus": torch.randn(2, 16)},
        "delta": {"erase": Delta(beta)},
        "low rank": {"erase": LowRank(-kappa, kappa * torch.rand(2, T, 2, 16))},
        "along values": {"value_log_decay": -torch.rand(2, T, 2, 16)},
    }


@pytest.mark.parametrize("impl", ["auto", "torch"])
@pytest.mark.parametrize("kind", kinds(1))
def test_a_backward_pass_under_autocast_is_the_plain_one(kind, impl):
    q, k = torch.randn(2, 90, 2, 16), F.normalize(torch.randn(2, 90, 2, 16), dim=-1)
    v, decay = torch.randn(2, 90, 2, 16), -torch.rand(2, 90, 2)
    options, found = kinds(90)[kind], []
    for autocast in (False, True):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, decay)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            o, final = subquad.linear_recurrence(*leaves, impl=impl, **options)
            loss = o.square().sum() + final.square().sum()
            found.append(torch.autograd.grad(loss, leaves))
    for got, want in zip(found[1], found[0]):
        torch.testing.assert_close(got, want)


def test_shielded_graphs_are_differentiated_twice_and_kept():
    q, k, v = (torch.randn(1, 7, 1, 3, dtype=torch.float64).requires_grad_() for _ in range(3))

    def call(*x):
        return subquad.linear_recurrence(*x, impl="torch", form="chunked")

    assert torch.autograd.gradcheck(call, (q, k, v))
    assert torch.autograd.gradgradcheck(call, (q, k, v))
    o, _ = call(q, k, v)
    first = torch.autograd.grad(o.sum(), (q, k, v), retain_graph=True)
    again = torch.autograd.grad(o.sum(), (q, k, v))
    assert all(map(torch.equal, first, again))
    _, final = call(q, k, v)
    assert torch.autograd.grad(final.sum(), q, allow_unused=True)[0] is None


@pytest.mark.parametrize("name", ["Mamba", "Mamba2", "GLA", "GatedDeltaNet", "RWKV7", "MLSTM"])
def test_float64_layers_are_float64_throughout(name):
    """Numerical derivatives see every step that is rounded to float32."""
    options = {"GLA": {"num_heads": 1}, "GatedDeltaNet": {"num_heads": 1, "head_dim": 4}}
    options |= {"MLSTM": {"num_heads": 1}, "Mamba2": {"head_dim": 8, "state_size": 4}}
    layer = getattr(mixers, name)(8, **options.get(name, {})).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.2 * torch.randn_like(p))
    x = torch.randn(1, 5, 8, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: layer(x)[0], x, eps=1e-6, atol=1e-7, rtol=1e-6)


def test_a_float64_model_keeps_its_residual():
    config = subquad.SubquadConfig(layers=["gla"], hidden_size=32, vocab_size=20)
    model = subquad.SubquadForCausalLM(config).double().eval()
    ids = torch.arange(6)[None]
    hidden = model(ids, output_hidden_states=True).hidden_states
    assert {h.dtype for h in hidden} == {torch.float64}


@pytest.mark.parametrize("kind", kinds(1))
def test_nan_is_not_taken_for_silence(kind):
    """One token in compiled code: what was NaN stays NaN, and does not wipe the state."""
    q, v = torch.randn(2, 1, 2, 16), torch.randn(2, 1, 2, 16)
    state, options = torch.ones(2, 2, 16, 16), kinds(1)[kind]
    told = subquad.explain(q, q, v, state=state, **options)
    assert told.impl == "numba"
    o, final = subquad.linear_recurrence(q, q, v * torch.nan, state=state, **options)
    assert o.isnan().all() and final.isnan().all()
    o, final = subquad.linear_recurrence(q, q, v, state=state * torch.nan, **options)
    assert o.isnan().all() and final.isnan().all()


def test_nan_survives_every_kernel_of_a_decoded_token():
    for row in ("gla", "mamba", "mamba2", "gated_deltanet", "linear_attention"):
        config = subquad.SubquadConfig(layers=[row, row], hidden_size=64, vocab_size=20)
        model = subquad.SubquadForCausalLM(config).eval()
        ids = torch.arange(6)[None]
        with torch.no_grad():
            cache = model(ids).past_key_values
            model(ids[:, :1], past_key_values=cache)  # traced
            model.model.embed_tokens.weight[3] = torch.nan
            logits = model(torch.tensor([[3]]), past_key_values=cache).logits
            assert logits.isnan().all(), row
            assert model(ids[:, :1], past_key_values=cache).logits.isnan().all(), row


EXTREMES = [-1e38, -3e38, -200.0, -104.0, -88.0, -87.0, 0.0, 87.0, 88.0, 200.0, 1e38]


def test_compiled_functions_at_their_ends():
    """silu(-1e38) is -0, not the product of a huge number and a clamped exponential."""
    x = torch.tensor(EXTREMES).view(1, 1, -1)
    for function in (F.silu, torch.sigmoid, F.softplus, torch.exp, torch.tanh):
        recording = Recording()
        inputs = [recording.input(x.shape)]
        trace = Trace(recording, inputs, recording.record(lambda t, f=function: [f(t[0])], inputs))
        [got] = trace.run([x])
        want = function(x.double()).float()
        torch.testing.assert_close(got, want, rtol=3e-6, atol=2e-38)
    weight = torch.zeros(len(EXTREMES), 2)
    weight[:, 1] = 1.0
    y, _ = subquad.short_convolution(x, weight, activation="silu")
    torch.testing.assert_close(y, F.silu(x.double()).float(), rtol=3e-6, atol=2e-38)


def test_tensors_that_hold_their_negative_are_read_right():
    """`z.conj().imag` has its memory's sign reversed."""
    negative = torch.randn(1, 1, 64, dtype=torch.complex64).conj().imag
    assert negative.is_neg()
    plain = negative.clone()
    weight = torch.randn(64, 4)
    state = torch.randn(1, 3, 64)
    from subquad.engines.norm.api import l2_norm, rms_norm

    for call in (
        lambda x: l2_norm(x, 16),
        lambda x: rms_norm(x, 64, None, 1e-5),
        lambda x: subquad.short_convolution(x, weight, state=state)[0],
        lambda x: subquad.linear_recurrence(*[x.view(1, 1, 4, 16)] * 3)[0],
        lambda x: subquad.engines.projection.api.linear(x, torch.ones(2048, 64)),
    ):
        with torch.no_grad():
            torch.testing.assert_close(call(negative), call(plain))


@pytest.mark.parametrize(("K", "V"), [(88, 120), (96, 100), (7, 13)])
def test_any_whole_number_of_values(K, V):
    layer = mixers.GatedDeltaNet(2 * K, num_heads=2, head_dim=K, expand_v=V / K)
    assert layer.value_head_dim == V
    layer = mixers.GatedDeltaNet(2 * K, num_heads=2, head_dim=K, value_head_dim=V)
    assert layer(torch.randn(1, 3, 2 * K))[0].shape == (1, 3, 2 * K)
    with pytest.raises(ValueError, match=r"expand_v: got 1.01; .*pass value_head_dim"):
        mixers.GatedDeltaNet(2 * K, num_heads=2, head_dim=K, expand_v=1.01)
    with pytest.raises(ValueError, match="value_head_dim: got 0"):
        mixers.GatedDeltaNet(2 * K, num_heads=2, head_dim=K, value_head_dim=0)
