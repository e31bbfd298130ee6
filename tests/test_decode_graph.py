"""What decoding by CUDA graphs promises where there is none: no change; snapshots are copies."""

import copy
import gc
import pickle
import weakref
from typing import ClassVar

import pytest
import torch

from subquad import SubquadConfig, SubquadForCausalLM
from subquad.decode.fingerprint import Fingerprint, runs_hooks
from subquad.decode.gpu import graph as graphs_module
from subquad.decode.gpu.graph import MOST_IDLE, _Shelf
from subquad.engines.runtime.overwrite import may_overwrite, overwriting_states
from subquad.generate import generate_batch
from subquad.mixers import GatedDeltaNet
from subquad.models import SubquadCache, language
from subquad.models.stack import SubquadModel


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
    with overwriting_states([state]):
        assert may_overwrite(state) and not may_overwrite(state.clone())
    assert not may_overwrite(state)


def test_a_row_of_somebody_elses_keeps_the_states_it_was_given():
    """It may read them after an engine did, as it was promised."""
    model = build()
    model.model.layers[1].mixer.__class__ = type("Theirs", (GatedDeltaNet,), {})
    states = [{"recurrent": torch.zeros(1)}, {"recurrent": torch.zeros(1)}]
    (ours,) = graphs_module._writable(model, states)
    assert ours is states[0]["recurrent"]


class Graph:
    """Stands for a StepGraph: what a shelf asks of one."""

    def __init__(self, model, serves=lambda: True):
        self.weights = [(weakref.ref(p), p.data_ptr()) for p in model.parameters()]
        self.asked, self.fingerprint = serves, Fingerprint([model], model, outer=model)

    computes = graphs_module.StepGraph.computes

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
    loaded = []
    monkeypatch.setattr(Graph, "load", lambda self, states: loaded.append(states), raising=False)
    monkeypatch.setattr(Graph, "replay", lambda self, tokens: "logits", raising=False)
    monkeypatch.setattr(Graph, "states", [{"recurrent": tokens}], raising=False)
    states = second.states
    assert graphs_module.replay(model, tokens, second) == "logits"
    assert attempts.made == 3 and loaded == [states]
    assert second.states == [{"recurrent": tokens}] and second.states[0] is not Graph.states[0]


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


def patch_a_class(model, monkeypatch):
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: x)


def patch_a_module(model, monkeypatch):
    model.inner.forward = lambda x: x


def read_weights_otherwise(model, monkeypatch):
    """They lie where they did, as after two conversions of a model they may."""
    model.inner.weight.data = model.inner.weight.data.view(torch.float16)


def exchange_weights(model, monkeypatch):
    model.inner.weight, model.other.weight = model.other.weight, model.inner.weight


def change_the_config(model, monkeypatch):
    model.config.residual_in_fp32 = True


def change_a_dtype(model, monkeypatch):
    model.kind = torch.float32


def change_a_function(model, monkeypatch):
    model.activation = torch.nn.functional.gelu


@pytest.mark.parametrize(
    "change",
    [
        patch_a_class,
        patch_a_module,
        read_weights_otherwise,
        exchange_weights,
        change_the_config,
        change_a_dtype,
        change_a_function,
    ],
)
def test_whatever_changes_what_a_model_computes_is_seen(change, monkeypatch):
    model = Switched().bfloat16()
    model.other = torch.nn.Linear(2, 2, dtype=torch.bfloat16)
    model.kind, model.activation = torch.bfloat16, torch.nn.functional.silu
    model.config = SubquadConfig(layers=["gla"], hidden_size=32, residual_in_fp32=False)
    before = Fingerprint([model], model, outer=model)
    assert not before.changed(model)
    change(model, monkeypatch)
    assert before.changed(model)


def test_a_model_all_of_whose_modules_are_watched_is_stepped_through():
    model = Switched()
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert runs_hooks(model)
    hook.remove()
    assert not runs_hooks(model)


@torch.no_grad()
def test_modes_that_would_see_operations_see_them(monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode

    model, cache, tokens = build(), SubquadCache(2), torch.zeros(1, 1, dtype=torch.long)
    model(torch.arange(6)[None], past_key_values=cache)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert graphs_module._decodes(model, tokens, cache)
    assert not graphs_module._decodes(model, tokens[0], cache)
    with FlopCounterMode(display=False):
        assert not graphs_module._decodes(model, tokens, cache)


@torch.no_grad()
@pytest.mark.parametrize("layers", [1, 3])
def test_a_cache_of_another_model_is_refused_where_steps_are_replayed(monkeypatch, layers):
    monkeypatch.setattr(language, "replay_step", lambda *_: "logits")
    with pytest.raises(ValueError, match="past_key_values"):
        build()(torch.arange(1)[None], past_key_values=SubquadCache(layers), replay=True)


class Doubled(SubquadModel):
    def forward(self, *args, **kwargs):
        output = SubquadModel.forward(self, *args, **kwargs)
        output.last_hidden_state = output.last_hidden_state * 2
        return output


def patch_the_stack(model, monkeypatch):
    model.model.forward = Doubled.forward.__get__(model.model)


def derive_from_the_stack(model, monkeypatch):
    model.model.__class__ = Doubled


def hook_the_stack(model, monkeypatch):
    model.model.register_forward_hook(lambda *_: None)


@torch.no_grad()
@pytest.mark.parametrize("change", [patch_the_stack, derive_from_the_stack, hook_the_stack])
def test_what_somebody_added_to_the_stack_is_called(change, monkeypatch):
    """A captured step runs its blocks only."""
    model, cache = build(), SubquadCache(2)
    model(torch.arange(6)[None], past_key_values=cache)
    monkeypatch.setattr(language, "replay_step", lambda *_: "logits")

    def is_replayed():
        output = model(torch.arange(1)[None], past_key_values=cache, replay=True)
        return isinstance(output.logits, str)

    assert is_replayed()
    change(model, monkeypatch)
    assert not is_replayed()


class Captured(graphs_module.StepGraph):
    """What is on a StepGraph once it was captured, and no graph."""

    def __init__(self):
        self.tokens, self.logits = torch.zeros(1, 1), torch.zeros(1, 1, 3)
        self.states = [{"recurrent": torch.zeros(2), "conv": torch.zeros(3)}]
        self.flat, self.writable = graphs_module._flat(self.states), []


@torch.no_grad()
def test_a_captured_step_does_not_read_what_autocast_cached():
    """Its copies of the weights end with the caller's `with`, and miss what changes in place."""
    weight, cast = torch.nn.Parameter(torch.eye(2)), []

    class Model:
        def step(self, tokens, states):
            cast.append(torch.mm(torch.ones(1, 2), weight))
            return cast[-1], states

    graph, model = Captured(), Model()
    with torch.autocast("cpu", torch.bfloat16):
        for scale in (1, 2):
            weight.copy_(scale * torch.eye(2))
            torch.mm(torch.ones(1, 2), weight)  # the prompt's pass fills the cache
            graph._step(model)
        assert torch.is_autocast_cache_enabled()
    assert [c[0, 0].item() for c in cast] == [1, 2] and cast[0].dtype == torch.bfloat16


def test_states_that_change_places_do_not_run_over_one_another():
    """As of a row that remembers its last two tokens, or turns its state round."""

    class Model:
        def step(self, tokens, states):
            (state,) = states
            return tokens, [{"last": tokens, "before": state["last"], "turned": state["turned"].mT}]

    graph = Captured()
    last, before, turned = torch.ones(1, 1), torch.full((1, 1), 2.0), torch.arange(4.0).view(2, 2)
    graph.states = [{"last": last, "before": before, "turned": turned.clone()}]
    graph.flat = graphs_module._flat(graph.states)
    graph._step(Model())
    (state,) = graph.states
    assert state["last"].item() == 0 and state["before"].item() == 1
    assert torch.equal(state["turned"], turned.mT)


def test_states_that_somebody_puts_in_a_cache_are_not_its_graphs():
    graph = Captured()
    given = [dict(state) for state in graph.states]
    assert graph.holds(given)
    given[0]["conv"] = torch.ones(3)
    assert not graph.holds(given) and not graph.holds([]) and not graph.holds([{}])
    assert not graph.states[0]["conv"].any()


def test_a_graph_waits_for_the_stream_on_which_another_cache_used_it(monkeypatch):
    seen = []

    class Side:
        wait_event = staticmethod(lambda event: seen.append(("wait", event)))

    class Done:
        record = staticmethod(lambda stream: seen.append(("record", stream)))

    class Replayed:
        replay = staticmethod(lambda: seen.append("replay"))

    graph, side = Captured(), Side()
    graph.done, graph.graph = Done(), Replayed()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: side)
    graph.load([{"recurrent": torch.ones(2), "conv": torch.ones(3)}])
    graph.replay(torch.ones(1, 1))
    assert seen == [("wait", graph.done), "replay", ("record", side)]
    assert all(t.all() for t in graph.flat) and graph.tokens.all()


def test_a_graph_that_a_cache_holds_is_looked_at_when_other_states_come():
    model = Switched()
    graph = Graph(model)
    assert graphs_module._goes_on(graph, model, None, "other", held=False)
    model.off = True
    assert not graphs_module._goes_on(graph, model, None, "other", held=False)
    assert graphs_module._goes_on(graph, model, None, "own", held=True)


@torch.no_grad()
def test_generating_changes_nothing_that_a_graph_looks_at():
    model = build()
    model.generate(torch.arange(6)[None], max_new_tokens=3, do_sample=False)
    before = Fingerprint([model], model, outer=model)
    model.generate(torch.arange(6)[None], max_new_tokens=3, do_sample=False)
    assert not before.changed(model)


class Repeated(graphs_module.StepGraph):
    """Steps on its own buffers as a StepGraph does, by running them anew."""

    made: ClassVar[list] = []

    def __init__(self, model, tokens, states):
        self.settings = graphs_module._settings(tokens)
        self.fingerprint = Fingerprint([model], model, outer=model)
        self.weights = [(weakref.ref(p), p.data_ptr()) for p in model.parameters()]
        self.tokens = tokens.clone()
        self.states = [{n: t.clone() for n, t in state.items()} for state in states]
        self.flat, self.writable = graphs_module._flat(self.states), []
        self.model = weakref.ref(model)
        self.made.append(self)

    def load(self, states):
        for own, new in zip(self.states, states):
            for name, tensor in new.items():
                own[name].copy_(tensor)

    def replay(self, tokens):
        self.tokens.copy_(tokens)
        return self._step(self.model()).clone()


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that were made, where a CPU decodes as a GPU does."""

    def decodes(model, tokens, cache):
        return tokens.shape[1:] == (1,) and cache.batch_size == len(tokens)

    monkeypatch.setattr(Repeated, "made", [])
    monkeypatch.setattr(graphs_module, "StepGraph", Repeated)
    monkeypatch.setattr(graphs_module, "_decodes", decodes)
    return Repeated.made


@torch.no_grad()
def test_leased_graphs_decode_what_steps_do(graphs, monkeypatch):
    model, ids = build(), torch.arange(18).view(3, 6)
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 8, "do_sample": False}
    ways = [
        lambda: model.generate(ids, **options),
        lambda: model.generate(ids, num_beams=2, **options),
        lambda: generate_batch(model, ids, max_new_tokens=8, temperature=0.9, seed=1),
    ]
    found = [[way() for _ in range(2)] for way in ways]
    gc.collect()
    assert len(graphs) == 2  # of three rows and of six
    monkeypatch.setattr(language, "replay_step", lambda *_: None)
    for way, (first, second) in zip(ways, found):
        assert torch.equal(first, second) and torch.equal(first, way())


@torch.no_grad()
def test_a_state_put_in_by_hand_is_gone_on_from_and_spoils_no_graph(graphs, monkeypatch):
    model, ids = build(), torch.arange(6)[None]

    def decode(edited):
        cache = SubquadCache(2)
        model(ids, past_key_values=cache)
        logits = []
        for n in range(4):
            if edited and n == 2:
                cache.states[0]["recurrent"] = cache.states[0]["recurrent"] * 3
            logits.append(model(ids[:, :1], past_key_values=cache, replay=True).logits)
        return torch.cat(logits)

    found = [decode(edited) for edited in (True, False)]
    gc.collect()
    assert len(graphs) == 1
    monkeypatch.setattr(language, "replay_step", lambda *_: None)
    assert all(map(torch.equal, found, [decode(edited) for edited in (True, False)]))
    assert not torch.equal(*found)


@torch.no_grad()
def test_a_cache_that_goes_from_model_to_model_is_moved_on_by_each(graphs, monkeypatch):
    first, ids = build(), torch.arange(6)[None]
    second = copy.deepcopy(first)
    second.lm_head.weight.mul_(-1)

    def decode():
        cache = SubquadCache(2)
        first(ids, past_key_values=cache)
        models = (first, second, second, first)
        return [m(ids[:, :1], past_key_values=cache, replay=True).logits for m in models]

    found = decode()
    assert len(graphs) >= 2
    monkeypatch.setattr(language, "replay_step", lambda *_: None)
    assert all(map(torch.equal, found, decode()))
