"""Decoding on the CPU: all blocks that can be traced run in one call for each token."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from operator import attrgetter, is_not

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from subquad.mixers.base import Mixer, State
from subquad.mixers.convolution import ShortConvolution
from subquad.mixers.norms import GateThenNorm, NormThenGate, RMSNorm
from subquad.models.block import Block, SwiGLU, normed
from subquad.recurrence.operations import Untraceable
from subquad.recurrence.trace import Trace

_KNOWN = {Block, SwiGLU, RMSNorm, NormThenGate, GateThenNorm, ShortConvolution, nn.Linear}


class Decoder:
    """Runs a stack of blocks for one token of one sequence.

    A trace knows the addresses of weights, and modules only as they were. So before each token
    they are looked over: whoever replaces a projection (PEFT, quantisation), hooks a module, moves
    or reloads weights or changes a setting gets another trace, or none for that block, which is
    then called like any module.
    """

    def __init__(self) -> None:
        self._look: _Look | None = None
        self._pieces: list[_Piece] = []
        self._lock = threading.Lock()  # a trace has room for one token

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Decoder, ()  # the weights of a copy lie elsewhere

    def __call__(
        self, blocks: nn.ModuleList, norm: RMSNorm, x: Tensor, past: Sequence[State | None]
    ) -> tuple[Tensor, list[State]] | None:
        """x [1,1,hidden] after all blocks and the norm, and their states; None where it cannot."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or x.shape[:2] != (1, 1):
            return None
        known = [state for state in past if state is not None]
        if len(known) < len(blocks) or not x.is_cpu or not self._lock.acquire(blocking=False):
            return None
        try:
            if self._look is None or self._look.changed(blocks, norm):
                self._pieces = list(_pieces(blocks, norm, known))
                self._look = _Look(self._pieces, blocks, norm)
            states: list[State] = []
            for piece in self._pieces:
                x, new = piece.run(x, known[len(states) : len(states) + len(piece.blocks)])
                states += new
        finally:
            self._lock.release()
        return x, states


@dataclass
class _Piece:
    """Blocks in a row, perhaps none, the norm if they end the stack, and their trace if there is
    one."""

    blocks: list[Block]
    norm: RMSNorm | None
    trace: Trace | None
    names: list[tuple[str, ...]]  # of each block's state

    def run(self, x: Tensor, past: list[State]) -> tuple[Tensor, list[State]]:
        """All in order: x and the states of the blocks."""
        outputs = None
        if self.trace is not None and not _has_any_global_hook():
            inputs = [state[name] for names, state in zip(self.names, past) for name in names]
            outputs = self.trace.run([x, *inputs])
        if outputs is not None:
            tensors = iter(outputs[1:])
            return outputs[0], [dict(zip(names, tensors)) for names in self.names]
        states = []
        for block, state in zip(self.blocks, past):
            x, state = block(x, state)
            states.append(state)
        return x if self.norm is None else normed(self.norm, x), states


def _pieces(blocks: nn.ModuleList, norm: RMSNorm, past: list[State]) -> Iterator[_Piece]:
    """Blocks that can be traced and blocks that cannot, in turn, and the norm."""
    stages: list[tuple[nn.Module, State]] = [*zip(blocks, past), (norm, {})]
    for can, group in groupby(stages, lambda stage: _can_trace(*stage)):
        modules, states = map(list, zip(*group))
        ending = modules.pop() if modules[-1] is norm else None
        names = [tuple(state) for state in states[: len(modules)]]
        trace = _trace(modules, ending, states) if can and modules else None
        yield _Piece(modules, ending, trace, names)


def _trace(blocks: list[Block], norm: RMSNorm | None, past: list[State]) -> Trace | None:
    """One token through the blocks, from states like these, and the norm; None if it cannot be."""
    names = [tuple(state) for state in past[: len(blocks)]]

    def stack(tensors: Sequence[Tensor]) -> list[Tensor]:
        x, rest = tensors[0], iter(tensors[1:])
        after = []
        for block, own in zip(blocks, names):
            x, state = block(x, {name: next(rest) for name in own})
            after += [state[name] for name in own]
        return [x if norm is None else normed(norm, x), *after]

    before = [state[name] for state, own in zip(past, names) for name in own]
    attributes = [vars(m).values() for block in blocks for m in block.modules()]
    kept = list(chain.from_iterable(attributes))
    try:
        trace = Trace(stack, [torch.empty(1, 1, blocks[0].mixer_norm.size), *before])
    except Untraceable:
        return None
    # Who changes itself when called (a counter) must be called.
    return None if any(map(is_not, kept, chain.from_iterable(attributes))) else trace


def _can_trace(module: nn.Module, state: State) -> bool:
    """Whether all in it is as we made it, plain float32, and does what a trace knows."""
    inside = list(module.modules())
    tensors = [*module.parameters(), *state.values()]
    return (
        all(type(m) in _KNOWN or isinstance(m, Mixer) for m in inside)
        and not any(map(_is_watched, inside))
        and all(type(p) is nn.Parameter for p in module.parameters())
        and all(t.dtype == torch.float32 and t.is_cpu and t.is_contiguous() for t in tensors)
        and (not isinstance(module, Block) or _trace([module], None, [state]) is not None)
    )


def _is_watched(module: nn.Module) -> bool:
    """Somebody wants to see the module called, or calls something else in its place."""
    own = vars(module)
    return bool(own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own)


class _Look:
    """What some modules, all in them, and their parameters are like, to see whether that changes.

    Everything is looked at with every token, so it is laid out flat once, for quick passes.
    """

    def __init__(self, pieces: Sequence[_Piece], *roots: nn.Module) -> None:
        self._roots = roots
        self._parameters = [p for root in roots for p in root.parameters()]
        owns = [vars(m) for root in roots for m in root.modules()]
        # Views, not copies: they show what is there at each look.
        members = [own[name].values() for own in owns for name in ("_modules", "_parameters")]
        traced = [block for piece in pieces if piece.trace is not None for block in piece.blocks]
        settings = [vars(m).values() for block in traced for m in block.modules()]
        self._values = [*members, *settings]
        self._kept = list(chain.from_iterable(self._values))  # so that no other gets their identity
        hooks = ("_forward_hooks", "_forward_pre_hooks")
        self._sizes = [*owns, *(own[name] for own in owns for name in hooks)]
        self._seen = self._see()

    def changed(self, *roots: nn.Module) -> bool:
        return any(map(is_not, roots, self._roots)) or self._see() != self._seen

    def _see(self) -> tuple[list[object], ...]:
        """Equal at two times if nothing that matters has changed between.

        A `forward` of a module's own is an entry more in its dictionary.
        """
        return (
            list(map(id, chain.from_iterable(self._values))),
            list(map(len, self._sizes)),
            list(map(Tensor.data_ptr, self._parameters)),
            list(map(_DTYPE, self._parameters)),
        )


_DTYPE = attrgetter("dtype")
