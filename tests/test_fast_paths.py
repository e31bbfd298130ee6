"""The switch that runs everything plainly: the same results, and no machinery."""

import os
import subprocess
import sys

import pytest
import torch

import subquad
from subquad.backend.fast_paths import are_fast_paths_on
from subquad.decode.cpu import trace
from subquad.layers import growing


@pytest.fixture
def model():
    torch.manual_seed(0)
    layers = ["gated_deltanet", "mamba", "softmax_attention"]
    config = subquad.SubquadConfig(layers=layers, hidden_size=64, vocab_size=97)
    return subquad.SubquadForCausalLM(config).eval()


def test_the_same_tokens_without_a_trace(model, monkeypatch):
    ids = torch.arange(5)[None]
    fast = model.generate(ids, max_new_tokens=12, do_sample=False)

    def refuse(*args):
        raise AssertionError("machinery ran")

    monkeypatch.setattr(trace.Trace, "run", refuse)
    monkeypatch.setattr(growing, "_alike", refuse)
    monkeypatch.setattr("subquad.engines.projection.cpu.linear", refuse)
    with pytest.raises(AssertionError, match="machinery ran"):
        model.generate(ids, max_new_tokens=12, do_sample=False)
    with subquad.fast_paths(False):
        assert not are_fast_paths_on()
        assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), fast)
    assert are_fast_paths_on()


def test_operators_are_seen_by_the_dispatcher():
    x = torch.randn(2, 8, 32)
    weight = torch.randn(32, 4)
    due, _ = subquad.short_convolution(x, weight)
    with subquad.fast_paths(False), torch.profiler.profile() as profile:
        y, _ = subquad.short_convolution(x, weight)
    assert torch.equal(y, due)
    assert any("subquad::" in event.key for event in profile.key_averages())


def test_it_lasts_when_called_and_nests():
    try:
        subquad.fast_paths(False)
        with subquad.fast_paths(True):
            assert are_fast_paths_on()
        assert not are_fast_paths_on()
    finally:
        subquad.fast_paths(True)


@pytest.mark.parametrize(("value", "on"), [("0", False), ("off", False), ("1", True)])
def test_the_environment_switches_it(value, on):
    code = "from subquad.backend.fast_paths import are_fast_paths_on as on; print(on())"
    environment = os.environ | {"SUBQUAD_FAST_PATHS": value}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(on)
