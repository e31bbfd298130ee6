"""Mamba against transformers' mixer with shared weights, and every cut of a sequence."""

import random
from itertools import pairwise

import pytest
import torch
from transformers import MambaConfig
from transformers.models.mamba import modeling_mamba

from subquad.mixers.mamba import Mamba

HIDDEN = 24


def build(**options):
    """A layer whose gates, steps and skip all matter to its output."""
    torch.manual_seed(0)
    layer = Mamba(HIDDEN, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.ndim > 1 and parameter is not layer.A_log:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
        layer.D.normal_()
        layer.dt_bias.add_(2.0)
    return layer


def their_name(name):
    """transformers' name of one of our parameters."""
    return name.replace("conv.", "conv1d.").replace("dt_bias", "dt_proj.bias")


def theirs(layer, monkeypatch, **options):
    """transformers' mixer, on its plain PyTorch path, with this layer's weights."""
    for name in ("causal_conv1d_fn", "mamba_inner_fn", "mamba_selective_scan"):
        function = getattr(modeling_mamba, name)
        monkeypatch.setattr(modeling_mamba, name, getattr(function, "__wrapped__", function))
    config = MambaConfig(hidden_size=HIDDEN, num_hidden_layers=1, **options)
    mixer = modeling_mamba.MambaMixer(config, 0)
    weights = {their_name(n): t for n, t in layer.state_dict().items()}
    weights["conv1d.weight"] = weights["conv1d.weight"][:, None]
    mixer.load_state_dict(weights)
    return mixer


@pytest.mark.parametrize(
    "ours, their",
    [
        ({}, {}),
        (
            {"expand": 3, "state_size": 5, "dt_rank": 7, "conv_width": 3, "bias": True},
            {"expand": 3, "state_size": 5, "time_step_rank": 7, "conv_kernel": 3, "use_bias": True},
        ),
        ({"conv_bias": False}, {"use_conv_bias": False}),
    ],
)
@pytest.mark.parametrize("T", [1, 2, 70])
def test_equals_transformers(T, ours, their, monkeypatch):
    layer = build(**ours)
    mixer = theirs(layer, monkeypatch, **their)
    x = torch.randn(2, T, HIDDEN)
    x_1, x_2 = (x.clone().requires_grad_() for _ in range(2))
    y, want = layer(x_1)[0], mixer(x_2)
    assert want.abs().mean() > 0.05
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
    weight = torch.randn_like(want)
    (y * weight).sum().backward()
    (want * weight).sum().backward()
    torch.testing.assert_close(x_1.grad, x_2.grad, rtol=1e-4, atol=1e-4)
    for name, parameter in layer.named_parameters():
        twin = mixer.get_parameter(their_name(name))
        gradient = twin.grad.view(parameter.shape)
        scale = 1e-4 * gradient.abs().max().clamp(min=1.0).item()
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=scale)


@torch.no_grad()
def test_any_cut_gives_the_same():
    layer, x = build(), torch.randn(3, 120, HIDDEN)
    whole, last = layer(x)
    chance = random.Random(0)
    cuts = [[*range(1, 120)], [100, *range(101, 120)]]
    cuts += [sorted(chance.sample(range(1, 120), chance.randint(1, 9))) for _ in range(20)]
    for inner in cuts:
        state, pieces = None, []
        for i, j in pairwise([0, *inner, 120]):
            before = state and {n: t.clone() for n, t in state.items()}
            y, after = layer(x[:, i:j], state)
            if before:
                assert all(torch.equal(state[n], before[n]) for n in before)  # not changed in place
            state = after
            pieces.append(y)
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)
        for name in last:
            torch.testing.assert_close(state[name], last[name], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_packed_rows_never_leak():
    layer, x = build(), torch.randn(1, 90, HIDDEN)
    bounds = [0, 1, 3, 40, 90]
    first = torch.tensor(bounds)
    y, state = layer(x, cu_seqlens=first)
    y_2, state_2 = layer(x, state, cu_seqlens=first)
    for s, (i, j) in enumerate(pairwise(bounds)):
        alone, one = layer(x[:, i:j])
        torch.testing.assert_close(y[:, i:j], alone, rtol=1e-4, atol=1e-4)
        again, one = layer(x[:, i:j], one)
        torch.testing.assert_close(y_2[:, i:j], again, rtol=1e-4, atol=1e-4)
        for name in one:
            torch.testing.assert_close(state_2[name][s : s + 1], one[name], rtol=1e-4, atol=1e-4)


def test_gradients_cross_a_cut():
    layer, x = build(), torch.randn(1, 40, HIDDEN)
    gradients = []
    for cut in (None, 17):
        leaf = x.clone().requires_grad_()
        if cut is None:
            y, _ = layer(leaf)
        else:
            y_1, state = layer(leaf[:, :cut])
            y_2, _ = layer(leaf[:, cut:], state)
            y = torch.cat([y_1, y_2], 1)
        gradients.append(torch.autograd.grad(y[:, 30:].square().sum(), leaf)[0])
    assert gradients[0][:, :17].abs().max() > 1e-3
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_autocast_keeps_float32_state_and_stays_close():
    layer, x = build(), torch.randn(2, 50, HIDDEN)
    want, _ = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = layer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and state["recurrent"].dtype == torch.float32
    assert (y - want).abs().max() < 0.05 * want.abs().max()


def test_published_start():
    torch.manual_seed(0)
    layer = Mamba(64)
    assert layer.dt_proj.in_features == 4 and layer.A_log.shape == (128, 16)
    torch.testing.assert_close(layer.A_log.exp(), torch.arange(1.0, 17).expand(128, 16))
    steps = torch.nn.functional.softplus(layer.dt_bias)
    assert steps.min() >= 1e-3 * 0.999 and steps.max() <= 0.1 * 1.001
    assert 0.35 < (steps < 0.01).float().mean() < 0.65  # log-uniform: half below the middle
    assert layer.dt_proj.weight.abs().max() <= 0.5 and (layer.D == 1).all()
    marked = {n for n, p in layer.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked == {"A_log", "D", "dt_bias", "conv.bias"}


@pytest.mark.parametrize(
    "options, named",
    [
        ({"expand": 0}, "expand"),
        ({"state_size": 1.5}, "state_size"),
        ({"dt_rank": "full"}, "dt_rank"),
        ({"conv_width": 0}, "conv_width"),
        ({"dt_min": 0.2}, "dt_min"),
    ],
)
def test_bad_options_are_named(options, named):
    with pytest.raises(ValueError, match=f"^{named}: .*expected"):
        Mamba(HIDDEN, **options)
