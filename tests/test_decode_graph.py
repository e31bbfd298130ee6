"""What decoding by CUDA graphs promises where there is none: no change; snapshots are copies."""

import copy
import gc
import pickle
import weakref

import pytest
import torch

from subquad import SubquadConfig, SubquadForCausalLM
from subquad.models import SubquadCache
from subquad.models import graph as graphs_module
from subquad.models.graph import MOST_IDLE, _Shelf
from subquad.recurrence.gpu import may_overwrite, overwriting_states


def build() -> SubquadForCausalLM:
    torch.manual_seed(0)
    config = SubquadConfig(layers=["mamba2", "gated_deltanet"], hidden_size=32, vocab_size=50)
    return SubquadForCausalLM(config).eval()


@torch.no_grad()
def test_asking_for_a_replay_on_a_cpu_is_an_ordinary_call():
    model, ids = build(), torch.arange(6)[None]
    plain = SubquadCache(2)
    model(ids, past_key_values=plain)
    asked = copy.copy(plain)
    want = model(ids[:, :1], past_key_values=plain).logits
    got = model(ids[:, :1], past_key_values=asked, replay=True)
    assert torch.equal(got.logits, want) and got.past_key_values is asked
    assert asked.lease is None and asked.get_seq_length() == 7
    for one, other in zip(plain.states, asked.states):
        assert all(torch.equal(one[name], other[name]) for name in one)


@torch.no_grad()
def test_a_snapshot_of_a_leased_cache_is_a_copy():
    cache = SubquadCache(2)
    build()(torch.arange(6)[None], past_key_values=cache)
    free = copy.copy(cache)
    assert free.states[0]["recurrent"] is cache.states[0]["recurrent"]  # costs nothing
    cache.lease = lambda: None  # whatever it is, it cannot be pickled
    snapshots = [copy.copy(cache), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    before = cache.states[0]["recurrent"].clone()
    cache.states[0]["recurrent"].zero_()  # as a replayed step writes over it
    for snapshot in snapshots:
        assert snapshot.lease is None and snapshot.get_seq_length() == 6
        assert torch.equal(snapshot.states[0]["recurrent"], before)


def test_states_may_be_overwritten_only_within_and_only_whole():
    state = torch.zeros(2, 3, 4)
    assert not may_overwrite(state)
    with overwriting_states():
        assert may_overwrite(state)
        assert not may_overwrite(None) and not may_overwrite(state.transpose(1, 2))
    assert not may_overwrite(state)


class Graph:
    """Stands for a StepGraph: what a shelf asks of one."""

    def __init__(self, model, serves=lambda: True):
        self.weights = [(weakref.ref(p), p.data_ptr()) for p in model.parameters()]
        self.asked, self.shown = serves, graphs_module._shown(model)

    def serves(self, tokens, states):
        return self.asked()


def lend(shelf, model):
    return shelf.lend(model, torch.zeros(1, 1), [])


def test_a_graph_is_lent_to_one_cache_at_a_time_and_comes_back_with_it():
    model, shelf = torch.nn.Linear(2, 2), _Shelf()
    graph, other = Graph(model), Graph(model, serves=lambda: False)
    for each in (other, graph):
        shelf.put_back(each)
    lease = lend(shelf, model)
    assert lease.graph is graph and shelf.idle == [other]
    del lease
    gc.collect()
    assert shelf.idle == [other, graph]


def test_a_shelf_keeps_the_latest_graphs_and_none_of_weights_that_were_replaced():
    model, shelf = torch.nn.Linear(2, 2), _Shelf()
    graphs = [Graph(torch.nn.Linear(2, 2)), *(Graph(model) for _ in range(MOST_IDLE - 1))]
    for graph in (Graph(model), *graphs):
        shelf.put_back(graph)
    assert shelf.idle == graphs
    assert lend(shelf, model).graph is graphs[1]
    assert graphs[0] not in shelf.idle


def test_graphs_that_come_back_while_one_is_looked_for_push_it_off_without_harm():
    """Any line may collect a cache, whose lease then ends in the middle of another's search."""
    model, shelf = torch.nn.Linear(2, 2), _Shelf()
    late = [Graph(model) for _ in range(MOST_IDLE)]

    def collected():
        for graph in late:
            shelf.put_back(graph)
        return True

    shelf.put_back(Graph(model, serves=collected))
    shelf.put_back(Graph(model))
    # Both that were there at first are gone. Nothing can be captured for tokens on another device.
    assert shelf.lend(model, torch.zeros(1, 1, device="meta"), []) is None
    assert shelf.idle == late


class Attempts:
    """Stands for StepGraph: fails with the errors given, one an attempt, and then succeeds."""

    def __init__(self, *errors):
        self.errors = list(errors)
        self.made = 0

    def __call__(self, model, tokens, states):
        self.made += 1
        if self.errors:
            raise self.errors.pop(0)
        return Graph(model)


def full():
    return torch.OutOfMemoryError("CUDA out of memory.")


def test_a_capture_without_memory_is_tried_again_without_the_idle_graphs(monkeypatch):
    model, shelf, attempts = torch.nn.Linear(2, 2), _Shelf(), Attempts(full())
    monkeypatch.setattr(graphs_module, "StepGraph", attempts)
    shelf.put_back(Graph(model, serves=lambda: False))
    lease = lend(shelf, model)
    assert lease is not None and attempts.made == 2 and shelf.idle == [] and shelf.fit


def test_memory_that_ran_out_switches_graphs_off_for_one_cache_only(monkeypatch):
    ended = RuntimeError("the end of the capture failed too")
    ended.__context__ = full()
    model, attempts = build(), Attempts(full(), ended)
    monkeypatch.setattr(graphs_module, "StepGraph", attempts)
    monkeypatch.setattr(graphs_module, "_decodes", lambda *_: True)
    first, second = (SubquadCache(2) for _ in range(2))
    with torch.no_grad():
        for cache in (first, second):
            model(torch.arange(6)[None], past_key_values=cache)
    tokens = torch.zeros(1, 1, dtype=torch.long)
    with pytest.warns(UserWarning, match="end of the capture failed too"):
        assert graphs_module.replay(model, tokens, first) is None
    assert graphs_module.replay(model, tokens, first) is None
    assert attempts.made == 2  # at its first token, and not again at each of the next
    monkeypatch.setattr(Graph, "holds", lambda self, states: True, raising=False)
    monkeypatch.setattr(Graph, "replay", lambda self, tokens: "logits", raising=False)
    monkeypatch.setattr(Graph, "states", [], raising=False)
    assert graphs_module.replay(model, tokens, second) == "logits"
    assert attempts.made == 3


def test_other_errors_of_a_capture_switch_graphs_off(monkeypatch):
    model, shelf = torch.nn.Linear(2, 2), _Shelf()
    attempts = Attempts(RuntimeError("operation not permitted when stream is capturing"))
    monkeypatch.setattr(graphs_module, "StepGraph", attempts)
    with pytest.warns(UserWarning, match="not permitted"):
        assert lend(shelf, model) is None
    assert not shelf.fit and attempts.made == 1


class Switched(torch.nn.Module):
    """Something beside a weight that can be switched off, as PEFT's adapters can."""

    def __init__(self):
        super().__init__()
        self.inner, self.off, self.scaling = torch.nn.Linear(2, 2), False, {"default": 2.0}


def test_a_graph_does_not_serve_a_model_that_was_changed_since(monkeypatch):
    model, shelf = Switched(), _Shelf()
    captured = []
    monkeypatch.setattr(
        shelf, "_capture", lambda model, *_: captured.append(Graph(model)) or captured[-1]
    )
    with_adapter = lend(shelf, model).graph
    model.off = True
    without = lend(shelf, model)
    assert without.graph is not with_adapter
    assert lend(shelf, model).graph is not with_adapter  # while `without` is still lent
    model.off = False
    assert lend(shelf, model).graph is with_adapter  # each has its own
    model.scaling["default"] = 1.0
    assert lend(shelf, model).graph not in captured[:-1]
    assert len(captured) == 4


def test_a_model_with_hooks_inside_is_stepped_through():
    """A captured step would leave out their Python."""
    model, shelf = Switched(), _Shelf()
    shelf.put_back(Graph(model))
    hook = model.inner.register_forward_hook(print)
    assert lend(shelf, model) is None and shelf.fit
    hook.remove()
    model.register_forward_hook(print)  # the model's own are called outside of the step
    assert lend(shelf, model) is not None


def test_a_graph_that_a_cache_holds_is_looked_at_when_other_states_come():
    model = Switched()
    graph = Graph(model)
    graph.holds = lambda states: states == "own"
    assert graphs_module._goes_on(graph, model, None, "other")
    model.off = True
    assert not graphs_module._goes_on(graph, model, None, "other")
    assert graphs_module._goes_on(graph, model, None, "own")


@torch.no_grad()
def test_generating_changes_nothing_that_a_graph_looks_at():
    model = build()
    model.generate(torch.arange(6)[None], max_new_tokens=3, do_sample=False)
    shown = graphs_module._shown(model)
    model.generate(torch.arange(6)[None], max_new_tokens=3, do_sample=False)
    assert shown and graphs_module._shown(model) == shown
