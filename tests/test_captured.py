"""Which training steps are replayed from a graph and which run as they are, told without a GPU."""

import contextlib

import pytest
import torch

from subquad.train.captured import Captured


class Stream:
    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        pass


class Graph:
    """Notes what the calls under its capture did, and does it again with what then lies there."""

    capturing = None

    def __init__(self):
        self.calls = []

    def replay(self):
        for call, tensors in self.calls:
            call("replayed", *tensors)


@contextlib.contextmanager
def capture(graph, **options):
    Graph.capturing = graph
    try:
        yield
    finally:
        Graph.capturing = None


@pytest.fixture
def done(monkeypatch):
    """How each step ran, and on what."""
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    has_memory(monkeypatch, free=50, reserved=100, allocated=0)
    return []


def has_memory(monkeypatch, free, reserved, allocated):
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1000))


def captured(done, failing=()):
    failing = list(failing)

    def note(how, tensor):
        done.append((how, *tensor.tolist()))

    def step(tensor):
        if Graph.capturing is None:
            note("eager", tensor)
        elif failing:
            raise failing.pop()
        else:
            Graph.capturing.calls.append((note, (tensor,)))
        return tensor

    return Captured(step, torch.device("cpu"))


def test_steps_are_replayed_on_their_own_batches_and_others_are_not(done):
    update = captured(done)
    for batch in ([0.0], [1.0], [2.0], [3.0], [4.0], [5.0, 6.0], [7.0]):
        update(torch.tensor(batch))
    update(torch.tensor([8]))  # a copy would make it a float
    ways = ["eager"] * 3 + ["replayed"] * 2 + ["eager", "replayed", "eager"]
    assert [how for how, *_ in done] == ways
    assert [tensor for _, *tensor in done] == [[0], [1], [2], [3], [4], [5, 6], [7], [8]]


def test_a_shape_that_came_for_the_first_time_is_not_captured(done):
    """Nothing is compiled for it yet, and it may never come again."""
    update = captured(done)
    for size in (2, 2, 2, 1, 2, 2, 2, 2, 2):
        update(torch.zeros(size))
    assert [how for how, *_ in done] == ["eager"] * 7 + ["replayed"] * 2


def test_a_step_that_cannot_be_captured_runs_as_it_is_from_then_on(done):
    update = captured(done, [torch.OutOfMemoryError("CUDA out of memory.")])
    with pytest.warns(UserWarning, match="without a CUDA graph: CUDA out of memory"):
        for n in range(6):
            update(torch.tensor([float(n)]))
    assert done == [("eager", float(n)) for n in range(6)]


@pytest.fixture
def current(monkeypatch, done):
    """The current stream, where the end of a capture of a failed step fails, as torch's does."""
    now = [Stream()]

    @contextlib.contextmanager
    def stream(other):
        before, now[0] = now[0], other
        try:
            yield
        finally:
            now[0] = before

    @contextlib.contextmanager
    def graph(graph, stream, **options):
        now[0] = stream
        with capture(graph):
            yield
        raise AssertionError("no such step was to succeed")

    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now[0])
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return now


def test_a_failed_capture_leaves_the_stream_as_it_was(done, current):
    update, before = captured(done, [RuntimeError("operation not permitted")]), current[0]
    with pytest.warns(UserWarning, match="without a CUDA graph: operation not permitted"):
        for n in range(4):
            update(torch.tensor([float(n)]))
    assert current == [before]


def test_a_failed_capture_of_decoding_leaves_the_stream_as_it_was(current, monkeypatch):
    from subquad.decode.gpu import graph

    class Model(torch.nn.Module):
        def step(self, tokens, states):
            if Graph.capturing is not None:
                raise RuntimeError("operation not permitted")
            return tokens, states

    monkeypatch.setattr(torch.cuda, "Event", Stream)
    monkeypatch.setattr(graph, "side_stream", Stream)
    monkeypatch.setattr(graph, "_writable", lambda model, states: [])
    before = current[0]
    with pytest.raises(RuntimeError, match="not permitted"):
        graph.StepGraph(Model(), torch.zeros(1, 1), [{"recurrent": torch.zeros(2)}])
    assert current == [before]


@pytest.mark.parametrize(("free", "way"), [(30, "replayed"), (29, "eager")])
def test_a_graph_leaves_room_for_others(done, monkeypatch, free, way):
    has_memory(monkeypatch, free=free, reserved=100, allocated=40)
    update = captured(done)
    for n in range(5):
        update(torch.tensor([float(n)]))
    assert [how for how, *_ in done] == ["eager"] * 3 + [way] * 2


def test_what_others_have_left_in_the_cache_does_not_count(done, monkeypatch):
    """As a large model that this process has trained before a small one."""
    memory = {"free": 10, "cached": 90}

    def take(size):
        memory["free"] -= size
        memory["cached"] += size

    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: memory["cached"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (memory["free"], 100))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: take(-memory["cached"]))
    update = captured(done)
    for n in range(5):
        update(torch.tensor([float(n)]))
        take(max(0, 4 - memory["cached"]))  # of each step's tensors
    assert [how for how, *_ in done] == ["eager"] * 3 + ["replayed"] * 2


def test_a_replay_returns_what_the_captured_step_returned(done):
    update = captured(done)
    found = [update(torch.tensor([float(n)])) for n in range(6)]
    assert found[4] is found[5] and found[5].tolist() == [5.0]
    assert [x.tolist() for x in found[:3]] == [[0.0], [1.0], [2.0]]


def test_batches_that_lie_on_the_device_stay_as_they_are(done):
    """As those of a data set that is kept there and seen again in every epoch."""
    update = captured(done)
    batches = [torch.tensor([float(n)]) for n in range(6)]
    for batch in batches * 2:
        update(batch)
    assert [batch.item() for batch in batches] == [0, 1, 2, 3, 4, 5]
    assert [n for _, n in done] == [0, 1, 2, 3, 4, 5] * 2
