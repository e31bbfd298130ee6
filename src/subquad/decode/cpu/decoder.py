"""Decoding on the CPU: all blocks that can be traced run in one call for each token."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from subquad.backend.fast_paths import are_fast_paths_on
from subquad.decode.cpu.operations import Untraceable
from subquad.decode.cpu.recording import Recording
from subquad.decode.cpu.trace import Trace
from subquad.decode.fingerprint import Fingerprint, has_plain_settings
from subquad.engines.runtime.eager import can_call_compiled_code
from subquad.layers.norms import normed
from subquad.layers.projection import is_every_module_watched, is_watched
from subquad.layers.traceable import is_traceable
from subquad.mixers.base import Mixer, State


class Decoder:
    """Runs a stack of blocks for one token of one sequence.

    A trace knows the addresses of weights, and modules only as they were. So before each token
    they are looked over: whoever replaces a projection (PEFT, quantisation), hooks a module, moves
    or reloads weights or changes a setting gets another trace, or none for that block, which is
    then called like any module.

    Between tokens, that is. While a token is on its way its weights are read by address: whoever
    gives a parameter other memory from another thread (`p.data = ...`, `model.to(...)`) waits until
    it is done, as for any operation of PyTorch; this one is a whole token long. To keep the old
    memory alive instead would double a model that has moved to a GPU.
    """

    def __init__(self) -> None:
        self._fingerprint: Fingerprint | None = None
        self._pieces: list[_Piece] = []
        self._lock = threading.Lock()  # a trace has room for one token

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Decoder, ()  # the weights of a copy lie elsewhere

    def __call__(
        self,
        blocks: nn.ModuleList,
        norm: nn.Module,
        x: Tensor,
        past: Sequence[State | None],
        shared: Sequence[nn.Module | None],
    ) -> tuple[Tensor, list[State]] | None:
        """x [1,1,hidden] after all blocks and the norm, and their states; None where it cannot."""
        if not are_fast_paths_on():
            return None
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or x.shape[:2] != (1, 1):
            return None
        if torch.is_autocast_enabled("cpu") or not can_call_compiled_code((x,)):
            return None
        known = [state for state in past if state is not None]
        if len(known) < len(blocks) or is_every_module_watched():
            return None
        if not self._lock.acquire(blocking=False):
            return None
        try:
            roots = (blocks, norm, *dict.fromkeys(m for m in shared if m is not None))
            if self._fingerprint is None or self._fingerprint.changed(*roots):
                self._fingerprint = None  # should this be interrupted
                layers = [_Layer(block, module) for block, module in zip(blocks, shared)]
                self._pieces = list(_pieces(layers, norm, x, known))
                traced = [m for p in self._pieces if p.trace is not None for m in p.modules]
                self._fingerprint = Fingerprint(traced, *roots)
            states: list[State] = []
            carried: dict[str, Tensor] = {}
            for piece in self._pieces:
                own = known[len(states) : len(states) + len(piece.layers)]
                x, new, carried = piece.run(x, own, carried)
                states += new
        finally:
            self._lock.release()
        return x, states


class _Layer(NamedTuple):
    """A block, and what it shares with others of its row."""

    block: nn.Module
    shared: nn.Module | None


@dataclass
class _Piece:
    """Layers in a row, perhaps none, the norm if they end the stack, and their trace if there is
    one."""

    layers: list[_Layer]
    norm: nn.Module | None = None
    trace: Trace | None = None
    names: Sequence[tuple[str, ...]] = ()  # of each block's state, in the trace's order
    carries: tuple[str, ...] = ()  # what the trace leaves for later layers

    @property
    def modules(self) -> list[nn.Module]:
        modules = [m for layer in self.layers for m in layer if m is not None]
        return modules if self.norm is None else [*modules, self.norm]

    def run(
        self, x: Tensor, past: list[State], carried: dict[str, Tensor]
    ) -> tuple[Tensor, list[State], dict[str, Tensor]]:
        """All in order: x, the states of the blocks and what is carried on."""
        outputs = None if self.trace is None else self._run_trace(self.trace, x, past)
        if outputs is not None:
            tensors = iter(outputs[1:])
            states = [dict(zip(names, tensors)) for names in self.names]
            return outputs[0], states, carried | dict(zip(self.carries, tensors))
        states = []
        for (block, shared), state in zip(self.layers, past):
            x, state, carried = block(x, state, None, carried, shared)
            states.append(state)
        return x if self.norm is None else normed(self.norm, x), states, carried

    def _run_trace(self, trace: Trace, x: Tensor, past: list[State]) -> list[Tensor] | None:
        if list(map(len, past)) != list(map(len, self.names)):
            return None  # they will say what is wrong with their states
        try:
            inputs = [state[name] for names, state in zip(self.names, past) for name in names]
        except KeyError:
            return None
        return trace.run([x, *inputs])


def _pieces(
    layers: list[_Layer], norm: nn.Module, x: Tensor, past: list[State]
) -> Iterator[_Piece]:
    """Layers that can be traced and layers that cannot, in turn, and the norm."""
    called: list[_Layer] = []
    ended, begun = False, False  # begun: an earlier piece may carry something on
    while layers:
        piece = _traced(layers, norm, x, past, begun)
        if piece is None:
            called.append(layers[0])
        else:
            if called:
                yield _Piece(called)
            yield piece
            called, ended = [], piece.norm is not None
        done = 1 if piece is None else len(piece.layers)
        begun = begun or any(map(_carries, layers[:done]))
        layers, past = layers[done:], past[done:]
    if not ended:
        yield _Piece(called, norm)


def _carries(layer: _Layer) -> bool:
    return bool(getattr(getattr(layer.block, "mixer", None), "carries", ()))


def _traced(
    layers: list[_Layer], norm: nn.Module, x: Tensor, past: list[State], begun: bool
) -> _Piece | None:
    """As many of the layers as can be, from the first on, and the norm behind the last of all."""
    recording, names = Recording(), []
    x = recording.input(x.shape)
    inputs, outputs, ending = [x], [], None
    carried: dict[str, Tensor] = {}
    try:
        for layer, state in zip(layers, past):
            if begun and _carries(layer):
                raise Untraceable("what a layer outside the trace carried on")
            own = {name: recording.input(tensor.shape) for name, tensor in state.items()}
            x, after, carried = _record(recording, layer, x, own, state, carried)
            inputs += own.values()
            outputs += [after[name] for name in own]
            names.append(tuple(own))
        if _can_trace(norm):
            x = recording.record(normed, norm, x)
            ending = norm
    except Untraceable:
        pass
    if not names:
        return None
    trace = Trace(recording, inputs, [x, *outputs, *carried.values()])
    return _Piece(layers[: len(names)], ending, trace, names, tuple(carried))


def _record(
    recording: Recording,
    layer: _Layer,
    x: Tensor,
    own: State,
    state: State,
    carried: dict[str, Tensor],
) -> tuple[Tensor, State, dict[str, Tensor]]:
    """What the layer gives, from a state `own` like `state`; or Untraceable."""
    block, shared = layer
    if not all(_can_trace(m) for m in layer if m is not None):
        raise Untraceable(f"{type(block).__name__} as it is")
    if any(t.dtype != torch.float32 for t in state.values()):
        raise Untraceable("a state that is not float32")

    def call() -> tuple[Tensor, State, dict[str, Tensor]]:
        with _unchanged(block):
            y, after, left = block(x, own, None, carried, shared)
        if {name: t.shape for name, t in after.items()} != {n: t.shape for n, t in own.items()}:
            raise Untraceable("a state that grows")
        return y, after, left

    return recording.record(call)


def _can_trace(root: nn.Module) -> bool:
    """Whether all in it is as we made it, or a user's mixer with settings that are plain values."""
    modules = list(root.modules())
    return (
        all(is_traceable(m) or isinstance(m, Mixer) for m in modules)
        and not any(map(is_watched, modules))
        and all(type(p) is nn.Parameter and p.is_contiguous() for p in root.parameters())
        and all(map(has_plain_settings, modules))
    )


@contextmanager
def _unchanged(root: nn.Module) -> Iterator[None]:
    """Untraceable if the modules change themselves: who counts calls must be called. The change is
    taken back, since this was no call."""
    members = ("_parameters", "_buffers", "_modules")
    owns = [vars(m) for m in root.modules()]
    owns += [own[name] for own in owns for name in members]
    before = [dict(own) for own in owns]
    try:
        yield
    finally:
        changed = [pair for pair in zip(owns, before) if not _same(*pair)]
        for own, old in changed:
            for name in own.keys() - old.keys():
                del own[name]
            own.update(old)
    if changed:
        raise Untraceable("a module that changes itself")


def _same(a: dict[str, object], b: dict[str, object]) -> bool:
    return a.keys() == b.keys() and all(a[name] is b[name] for name in a)
