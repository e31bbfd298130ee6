"""Decoding by captured graphs on a CUDA device (`pytest -m gpu`): the same as step by step."""

import copy
import gc

import pytest
import torch

from subquad.decode.gpu import graph
from subquad.generate import generate_batch, generate_tokens
from subquad.mixers import MIXERS
from subquad.models import SubquadCache, SubquadConfig, SubquadForCausalLM, language

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ATTENTION = ("softmax_attention", "sliding_window_attention")
CONSTANT = [row for row in MIXERS if row not in ATTENTION]
NEW = 12


def build(*layers: str, dtype=torch.bfloat16) -> SubquadForCausalLM:
    torch.manual_seed(0)
    config = SubquadConfig(hidden_size=128, layers=list(layers) * 2)
    model = SubquadForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)  # so that the past, not only the last token, decides
    model.generation_config.eos_token_id = None
    return model.to("cuda", dtype)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 256, (3, 11), generator=torch.Generator().manual_seed(5)).cuda()


@pytest.fixture
def replays(monkeypatch) -> list[bool]:
    """Whether each step that asked for it was replayed."""
    asked = []

    def replay(*arguments):
        logits = graph.replay(*arguments)
        asked.append(logits is not None)
        return logits

    monkeypatch.setattr(language, "replay_step", replay)
    return asked


def eagerly(monkeypatch, call):
    with monkeypatch.context() as patched:
        patched.setattr(language, "replay_step", lambda *_: None)
        return call()


@pytest.mark.parametrize("row", CONSTANT)
def test_every_row_of_constant_state(row, ids, replays, monkeypatch):
    model = build(row)
    ways = {
        "greedy": lambda: model.generate(ids, max_new_tokens=NEW, do_sample=False),
        "beams": lambda: model.generate(ids, max_new_tokens=NEW, num_beams=2, do_sample=False),
        "loop": lambda: generate_batch(model, ids, max_new_tokens=NEW),
        "drawn": lambda: generate_batch(
            model, ids, max_new_tokens=NEW, temperature=0.9, top_p=0.9, seed=3
        ),
        "stream": lambda: list(
            generate_tokens(model, ids[0].tolist(), max_new_tokens=NEW, temperature=0.7, seed=1)
        ),
    }
    for name, way in ways.items():
        want = eagerly(monkeypatch, way)
        replays.clear()
        for _ in range(2):
            got = way()
            same = torch.equal(got, want) if isinstance(got, torch.Tensor) else got == want
            assert same, (name, got, want)
        assert len(replays) >= 2 * (NEW - 1) and all(replays), name
    assert torch.equal(ways["loop"](), ways["greedy"]()[:, ids.shape[1] :])


def test_a_growing_state_decodes_step_by_step(ids, replays, monkeypatch):
    model = build("gla", "softmax_attention")
    want = eagerly(monkeypatch, lambda: generate_batch(model, ids, max_new_tokens=NEW))
    assert torch.equal(generate_batch(model, ids, max_new_tokens=NEW), want)
    assert replays and not any(replays)


def test_a_module_that_is_switched_off_is_not_replayed(ids, replays, monkeypatch):
    """As an adapter of PEFT is: all weights stay where they were. And hooks inside are called."""
    model = build("gla")
    mixer = model.model.layers[0].mixer
    forward = type(mixer).forward

    def switched(self, x, *args, **kwargs):
        y, state = forward(self, x, *args, **kwargs)
        return y * 0 if getattr(self, "off", False) else y, state

    def decode():
        return generate_batch(model, ids, max_new_tokens=NEW)

    monkeypatch.setattr(type(mixer), "forward", switched)
    whole = decode()
    mixer.off = True
    want = eagerly(monkeypatch, decode)
    assert torch.equal(decode(), want) and not torch.equal(want, whole)
    mixer.off = False
    assert torch.equal(decode(), whole) and all(replays)
    replays.clear()
    calls = []
    mixer.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(decode(), whole)
    assert len(calls) >= NEW and not any(replays)


def test_graphs_are_captured_once(ids, monkeypatch):
    captured = []
    initialise = graph.StepGraph.__init__

    def count(self, *arguments):
        captured.append(self)
        initialise(self, *arguments)

    monkeypatch.setattr(graph.StepGraph, "__init__", count)
    model = build("mamba2", "gated_deltanet")
    for _ in range(3):
        generate_batch(model, ids, max_new_tokens=4)
        model.generate(ids, max_new_tokens=4)
    assert len(captured) == 1
    generate_batch(model, ids[:1], max_new_tokens=4)
    assert len(captured) == 2
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)  # where it was: the graph sees it
    want = eagerly(monkeypatch, lambda: generate_batch(model, ids, max_new_tokens=4))
    assert torch.equal(generate_batch(model, ids, max_new_tokens=4), want)
    assert len(captured) == 2
    model.lm_head.weight = torch.nn.Parameter(-model.lm_head.weight.clone())  # elsewhere
    want = eagerly(monkeypatch, lambda: generate_batch(model, ids, max_new_tokens=4))
    assert torch.equal(generate_batch(model, ids, max_new_tokens=4), want)
    assert len(captured) == 3


def test_two_caches_and_snapshots_do_not_disturb_one_another(ids, monkeypatch):
    model = build("gated_deltanet")
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
    first = model.generate(ids, **options)
    kept = copy.copy(first.past_key_values)
    states = [{n: t.clone() for n, t in s.items()} for s in kept.states]
    second = model.generate(ids.flip(1), **options)  # while the first cache lives
    assert first.past_key_values.lease.graph is not second.past_key_values.lease.graph

    def go_on(cache):
        longer = torch.cat([first.sequences, ids[:, :3]], 1)
        return model.generate(longer, past_key_values=cache, max_new_tokens=NEW, do_sample=False)

    got = go_on(first.past_key_values)
    for state, before in zip(kept.states, states):
        assert all(torch.equal(state[n], before[n]) for n in before)
    assert torch.equal(eagerly(monkeypatch, lambda: go_on(kept)), got)


def test_a_model_is_freed_with_its_graphs(ids):
    generate_batch(build("mamba2"), ids, max_new_tokens=4)  # the library's own workspaces stay
    gc.collect()
    before = torch.cuda.memory_allocated()
    model = build("mamba2")
    generate_batch(model, ids, max_new_tokens=4)
    del model
    gc.collect()
    assert torch.cuda.memory_allocated() - before < 2**20


def test_rows_stop_one_by_one(ids, monkeypatch):
    model = build("gla")
    free = generate_batch(model, ids, max_new_tokens=NEW, temperature=1.0, seed=0)
    stop = free[0, 4].item()
    got = generate_batch(model, ids, max_new_tokens=NEW, temperature=1.0, seed=0, stop_ids=(stop,))
    for row, whole in zip(got.tolist(), free.tolist()):
        end = whole.index(stop) if stop in whole else len(row)
        assert row == whole[:end] + [stop] * (len(row) - end)


def test_an_eager_step_leaves_its_states_alone(ids):
    model = build("mamba2")
    cache = SubquadCache(2)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        before = [{n: t.clone() for n, t in s.items()} for s in cache.states]
        kept = copy.copy(cache)
        model(ids[:, :1], past_key_values=cache)
        model(ids[:, :1], past_key_values=cache, replay=True)
    for state, old in zip(kept.states, before):
        assert all(torch.equal(state[n], old[n]) for n in old)


def test_a_capture_that_runs_out_of_memory_is_tried_again(ids, monkeypatch):
    model = build("mamba2")
    want = eagerly(monkeypatch, lambda: generate_batch(model, ids, max_new_tokens=NEW))
    step, asked = graph.StepGraph._step, []

    def too_much(self, model):
        if torch.cuda.is_current_stream_capturing():
            asked.append(torch.empty(2**50, device="cuda"))
        return step(self, model)

    with monkeypatch.context() as patched, pytest.warns(UserWarning, match="out of memory"):
        patched.setattr(graph.StepGraph, "_step", too_much)
        assert torch.equal(generate_batch(model, ids, max_new_tokens=NEW), want)
    cache = SubquadCache(2)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache, replay=True)
    assert cache.lease is not None and not asked
