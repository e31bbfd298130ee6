"""Decoding on a GPU without Python: one token through the model as a CUDA graph.

A decoded token is some twenty small kernels a layer, and launching them from Python takes longer
than running them. So the step is captured once and replayed for every token. It reads and writes
fixed addresses: tokens, logits, and states, which a graph owns and writes over. A cache leases a
graph from its model while it lives, and its states are then the graph's; snapshots of it are
copies. Where states grow (softmax attention) there is nothing to capture, and `replay` says None.
"""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from operator import is_
from typing import Any, Protocol

import torch
from torch import Tensor

from subquad.backend.fast_paths import are_fast_paths_on
from subquad.backend.gpu.capture import capture, side_stream
from subquad.decode.fingerprint import Fingerprint, runs_hooks
from subquad.engines.runtime.eager import is_plain
from subquad.engines.runtime.overwrite import overwriting_states
from subquad.mixers.base import State


class Cache(Protocol):
    """What of a `SubquadCache` a graph moves on."""

    states: list[State | None]
    lease: Lease | None
    has_empty_rows: bool

    def __len__(self) -> int: ...

    @property
    def batch_size(self) -> int: ...

    def advance(
        self, states: list[State], rows: int, tokens: int, device: torch.device
    ) -> None: ...


MOST_IDLE = 4  # graphs kept for later calls, by model: one each for as many batch sizes


def replay(model: Any, tokens: Tensor, cache: Cache) -> Tensor | None:
    """Logits [B,1,vocabulary] of `tokens` [B,1] after `cache`, which moves on; or None.

    None leaves everything as it was: the call is not one of decoding on a GPU (one token a row, a
    state of each, no gradient), or the model has states that grow.
    """
    if not _decodes(model, tokens, cache):
        return None
    states = [state for state in cache.states if state is not None]
    shelf = _SHELVES.setdefault(model, _Shelf())
    if len(states) < len(cache) or not shelf.fit:
        return None
    lease = cache.lease
    if lease is not None and lease.shelf is not shelf:  # the cache went from model to model
        lease = None
    held = lease is not None and lease.graph.holds(states)
    if lease is None or not _goes_on(lease.graph, model, tokens, states, held):
        held, lease = False, None if cache in shelf.stepwise else shelf.lend(model, tokens, states)
        if lease is None:
            shelf.stepwise.add(cache)
            return None
    if not held:
        lease.graph.load(states)
    cache.lease = lease
    logits = lease.graph.replay(tokens)
    # Dicts of its own: what somebody puts in them is seen, and does not end up in the graph's.
    cache.advance([dict(s) for s in lease.graph.states], len(tokens), 1, tokens.device)
    return logits


def _decodes(model: Any, tokens: Tensor, cache: Cache) -> bool:
    """Whether it is a step to replay. Not where a mode would see each of its operations."""
    one = tokens.is_cuda and tokens.shape[1:] == (1,)
    if (
        not one
        or not are_fast_paths_on()
        or model.training
        or torch.is_grad_enabled()
        or not is_plain((tokens,))
    ):
        return False
    if torch.cuda.is_current_stream_capturing():
        return False
    return not cache.has_empty_rows and cache.batch_size == len(tokens)


def _goes_on(graph: StepGraph, model: Any, tokens: Tensor, states: list[State], held: bool) -> bool:
    """Whether a cache's graph is still valid. Between two replayed tokens modules are not checked.

    held: these are the graph's own states.
    """
    return graph.serves(tokens, None if held else states) and (held or graph.computes(model))


class StepGraph:
    """One token for each sequence of a batch, captured.

    Attributes:
        states: by layer, where the graph reads and writes them.
        fingerprint: of its modules when it was captured.
    """

    def __init__(self, model: Any, tokens: Tensor, states: list[State]) -> None:
        self.settings, self.fingerprint = (
            _settings(tokens),
            Fingerprint([model], model, outer=model),
        )
        self.weights = [(weakref.ref(p), p.data_ptr()) for p in model.parameters()]
        with torch.inference_mode(False), torch.no_grad():
            self.tokens = tokens.clone()
            self.states = [{n: t.clone() for n, t in state.items()} for state in states]
            self.flat = _flat(self.states)
            self.writable = _writable(model, self.states)
            self.done = torch.cuda.Event()  # with the last replayed step
            side, here = side_stream(tokens.device), torch.cuda.current_stream(tokens.device)
            side.wait_stream(here)
            try:
                with torch.cuda.stream(side):  # compile and choose kernels before the capture
                    self._step(model)
                    self._step(model)
            finally:  # if a step failed, its buffers are given back while `side` may still run
                here.wait_stream(side)
            self.graph, self.logits = capture(lambda: self._step(model), side, here)

    def _step(self, model: Any) -> Tensor:
        with overwriting_states(self.writable), _casting_anew():
            logits, states = model.step(self.tokens, self.states)
        mine = {t.untyped_storage().data_ptr() for t in self.flat}
        moves = []
        for own, new in zip(self.states, states):
            for name, tensor in new.items():
                if tensor.shape != own[name].shape or tensor.dtype != own[name].dtype:
                    raise _Grows
                if tensor is not own[name]:
                    # One of ours in another's place must be read before that is written.
                    aliased = tensor.untyped_storage().data_ptr() in mine
                    moves.append((own[name], tensor.clone() if aliased else tensor))
        for place, tensor in moves:
            place.copy_(tensor)
        return logits

    def serves(self, tokens: Tensor, states: list[State] | None) -> bool:
        """Whether it can go on from these states, or its own (None): the same shapes, and weights
        where they were."""
        return (
            self.settings == _settings(tokens)
            and (states is None or _shapes(self.states) == _shapes(states))
            and all((p := w()) is not None and p.data_ptr() == at for w, at in self.weights)
        )

    def computes(self, model: Any) -> bool:
        """Whether it still does what the model does."""
        return not runs_hooks(model) and not self.fingerprint.changed(model)

    def holds(self, states: list[State]) -> bool:
        """Whether these are its own."""
        given = _flat(states)
        return len(given) == len(self.flat) and all(map(is_, given, self.flat))

    def load(self, states: list[State]) -> None:
        """Go on from these states instead, after another cache's steps on another stream."""
        self._stream().wait_event(self.done)
        for own, new in zip(self.states, states):
            for name, tensor in new.items():
                own[name].copy_(tensor)

    def replay(self, tokens: Tensor) -> Tensor:
        """Logits [B,1,vocabulary]; the states move on."""
        self.tokens.copy_(tokens)
        self.graph.replay()
        logits = self.logits.clone()
        self.done.record(self._stream())
        return logits

    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.tokens.device)


class Lease:
    """A cache's lease on a graph, which its model gets back for the next cache when it ends."""

    def __init__(self, graph: StepGraph, shelf: _Shelf) -> None:
        self.graph, self.shelf = graph, shelf
        weakref.finalize(self, shelf.put_back, graph).atexit = False


class _Shelf:
    """A model's graphs that no cache holds.

    Graphs come back whenever a cache is collected, in any thread and in the middle of a capture.
    There nothing may wait for a lock, so `idle` is only changed in place, by calls that are atomic.
    """

    def __init__(self) -> None:
        self.idle: list[StepGraph] = []
        self.fit = True  # False once it turned out that this model's step cannot be captured
        # Caches that got no graph. The next cache may: by then memory may be free.
        self.stepwise: weakref.WeakSet[Cache] = weakref.WeakSet()

    def put_back(self, graph: StepGraph) -> None:
        self.idle.append(graph)
        del self.idle[:-MOST_IDLE]

    def take(self, graph: StepGraph) -> bool:
        """Whether it was still there: others may have come back and pushed it off."""
        try:
            self.idle.remove(graph)
        except ValueError:
            return False
        return True

    def lend(self, model: Any, tokens: Tensor, states: list[State]) -> Lease | None:
        """A graph that serves, an idle one or a new one; None if the model's step has none."""
        with _LOCK:
            return self._lend(model, tokens, states)

    def _lend(self, model: Any, tokens: Tensor, states: list[State]) -> Lease | None:
        if runs_hooks(model):
            return None
        parameters = {id(p) for p in model.parameters()}
        for graph in list(self.idle):
            if {id(w()) for w, _ in graph.weights} != parameters:
                self.take(graph)  # of weights that were replaced
            elif graph.computes(model) and graph.serves(tokens, states) and self.take(graph):
                return Lease(graph, self)
        if any(p.device != tokens.device for p in model.parameters()):
            return None
        try:
            return Lease(self._capture(model, tokens, states), self)
        except _Grows:
            self.fit = False
        except RuntimeError as error:
            self.fit = _is_out_of_memory(error)
            warnings.warn(f"decoding goes on without a CUDA graph: {error}", stacklevel=2)
        return None

    def _capture(self, model: Any, tokens: Tensor, states: list[State]) -> StepGraph:
        """A new graph; if memory runs out, once more without the idle ones, which hold some."""
        try:
            return StepGraph(model, tokens, states)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
        self.idle.clear()
        gc.collect()  # of the failed attempt
        torch.cuda.empty_cache()
        return StepGraph(model, tokens, states)


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Also where the end of a capture that ran out of memory failed in its turn."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__context__
    return error is not None


class _Grows(Exception):
    """A state changes its shape with the token."""


# One capture at a time, for all share a stream. Threads may replay theirs meanwhile.
_LOCK = threading.Lock()
_SHELVES: weakref.WeakKeyDictionary[Any, _Shelf] = weakref.WeakKeyDictionary()


def _settings(tokens: Tensor) -> tuple[object, ...]:
    """What a captured step depends on beside weights and states."""
    autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
    return tokens.shape, tokens.dtype, tokens.device, autocast


def _writable(model: Any, states: list[State]) -> list[Tensor]:
    """The states that engines may write over: of mixers that declare it, each class for itself."""
    kinds = [vars(type(block.mixer)) for block in model.model.layers]
    declared = [kind.get("writes_state_in_place", False) for kind in kinds]
    return _flat([state for state, may in zip(states, declared) if may])


@contextmanager
def _casting_anew() -> Iterator[None]:
    """Without autocast's cache: its copies of the weights are gone when the graph is replayed."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)


def _flat(states: list[State]) -> list[Tensor]:
    return [tensor for state in states for tensor in state.values()]


def _shapes(states: list[State]) -> list[list[tuple[str, torch.Size, torch.dtype]]]:
    return [[(n, t.shape, t.dtype) for n, t in sorted(state.items())] for state in states]
