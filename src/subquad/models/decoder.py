"""Decoding on the CPU: all blocks that can be recorded run in one call for each token."""

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
from subquad.recurrence.token import Token

_KNOWN = {Block, SwiGLU, RMSNorm, NormThenGate, GateThenNorm, ShortConvolution, nn.Linear}


class Decoder:
    """Runs a stack of blocks for one token of one sequence.

    A recording knows the addresses of weights, and modules only as we made them. So before each
    token the modules are looked over: whoever replaces a projection (PEFT, quantisation), hooks a
    module, moves or reloads weights gets another recording, or none for that block, which is then
    called like any module.
    """

    def __init__(self) -> None:
        self._look: _Look | None = None
        self._pieces: list[_Piece] = []
        self._lock = threading.Lock()  # a recording has room for one token

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
                self._look = _Look(blocks, norm)
                self._pieces = list(_pieces(blocks, norm, known))
            states: list[State] = []
            for piece in self._pieces:
                x, new = piece.run(x, known[len(states) : len(states) + len(piece.blocks)])
                states += new
        finally:
            self._lock.release()
        return x, states


@dataclass
class _Piece:
    """Blocks in a row, perhaps none, the norm if they end the stack, and their token if there is
    one that says what they do."""

    blocks: list[Block]
    norm: RMSNorm | None
    token: Token | None
    names: list[tuple[str, ...]]  # of each block's state

    def run(self, x: Tensor, past: list[State]) -> tuple[Tensor, list[State]]:
        """All in order: x and the states of the blocks."""
        outputs = None
        if self.token is not None and not _has_any_global_hook():
            inputs = [state[name] for names, state in zip(self.names, past) for name in names]
            outputs = self.token.run([x, *inputs])
        if outputs is not None:
            tensors = iter(outputs[1:])
            return outputs[0], [dict(zip(names, tensors)) for names in self.names]
        states = []
        for block, state in zip(self.blocks, past):
            x, state = block(x, state)
            states.append(state)
        return x if self.norm is None else normed(self.norm, x), states


def _pieces(blocks: nn.ModuleList, norm: RMSNorm, past: list[State]) -> Iterator[_Piece]:
    """Blocks that can be recorded and blocks that cannot, in turn, and the norm."""
    stages: list[tuple[nn.Module, State]] = [*zip(blocks, past), (norm, {})]
    for can, group in groupby(stages, lambda stage: _is_recordable(*stage)):
        modules, states = map(list, zip(*group))
        ending = modules.pop() if modules[-1] is norm else None
        names = [tuple(state) for state in states[: len(modules)]]
        token = _record(modules, ending, states) if can and modules else None
        yield _Piece(modules, ending, token, names)


def _record(blocks: list[Block], norm: RMSNorm | None, past: list[State]) -> Token:
    """One token through the blocks, from states like these, and through the norm."""
    token = Token()
    x = y = torch.empty(1, 1, blocks[0].mixer_norm.size)
    before: list[Tensor] = []
    after: list[Tensor] = []
    for block, state in zip(blocks, past):
        old = {name: torch.empty(t.shape) for name, t in state.items()}
        y, new = block.record(token, y, old)
        before += old.values()
        after += [new[name] for name in state]
    y = y if norm is None else norm.record(token, y)
    token.finish([x, *before], [y, *after])
    return token


def _is_recordable(module: nn.Module, state: State) -> bool:
    """Whether all in it is as we made it, and plain float32, and its mixer has a `record`."""
    inside = list(module.modules())
    tensors = [*module.parameters(), *state.values()]
    return (
        all(type(m) in _KNOWN or (isinstance(m, Mixer) and says_a_token(m)) for m in inside)
        and not any(map(_is_watched, inside))
        and all(type(p) is nn.Parameter for p in module.parameters())
        and all(t.dtype == torch.float32 and t.is_cpu and t.is_contiguous() for t in tensors)
    )


def says_a_token(mixer: Mixer) -> bool:
    """Whether it has a `record` that belongs to the `forward` that it has."""
    owner = next(cls for cls in type(mixer).__mro__ if "forward" in vars(cls))
    return "record" in vars(owner)


def _is_watched(module: nn.Module) -> bool:
    """Somebody wants to see the module called, or calls something else in its place."""
    own = vars(module)
    return bool(own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own)


class _Look:
    """What some modules, all in them, and their parameters are like, to see whether that changes.

    Everything is looked at with every token, so it is laid out flat once, for quick passes.
    """

    def __init__(self, *roots: nn.Module) -> None:
        self._roots = roots
        self._modules = [m for root in roots for m in root.modules()]
        self._parameters = [p for root in roots for p in root.parameters()]
        owns = [vars(m) for m in self._modules]
        # Views, not copies: they show what is there at each look.
        groups = (own[name] for own in owns for name in ("_modules", "_parameters"))
        self._members = [group.values() for group in groups if group]
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
            list(map(id, chain.from_iterable(self._members))),
            list(map(len, self._sizes)),
            list(map(Tensor.data_ptr, self._parameters)),
            list(map(_DTYPE, self._parameters)),
        )


_DTYPE = attrgetter("dtype")
