"""The selective scan in plain PyTorch, on any device: a parallel scan inside each chunk of tokens.

Chunks follow one another, so memory holds [Bt,CHUNK,D,N] at a time and one state a chunk for the
backward pass, never [Bt,T,D,N]. Inside a chunk the pairs (decay, write) are combined by doubling
(Hillis and Steele 1986): decays are only ever multiplied, never divided by, so that no gate,
however strong, overflows. Sums are element-wise ones, which neither autocast nor TF32 touches.

A packed sequence's first token is one whose decay from the token before is zero and whose write
carries its own state; nothing else knows about packing.

Bt batch   T time   c chunk   D channels   N state numbers a channel   S sequences
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 32


class _Packing:
    """Which tokens of a chunk begin and end a sequence, and which one."""

    def __init__(self, cu_seqlens: Tensor | None) -> None:
        self.bounds = None if cu_seqlens is None else cu_seqlens.tolist()
        self.device = None if cu_seqlens is None else cu_seqlens.device

    def _within(self, positions: list[int], low: int, high: int) -> tuple[Tensor, Tensor]:
        found = [(p - low, s) for s, p in enumerate(positions) if low <= p < high]
        both = torch.tensor(found, dtype=torch.int64, device=self.device).reshape(-1, 2)
        return both[:, 0], both[:, 1]

    def starts(self, low: int, high: int) -> tuple[Tensor, Tensor]:
        """(places in the chunk low:high of first tokens, their sequences)."""
        return self._within(self.bounds[:-1] if self.bounds else [], low, high)

    def ends(self, low: int, high: int) -> tuple[Tensor, Tensor]:
        """(places in the chunk low:high of last tokens, their sequences)."""
        return self._within([e - 1 for e in self.bounds[1:]] if self.bounds else [], low, high)


def _combine(decay: Tensor, write: Tensor) -> Tensor:
    """h_t = decay_t h_{t-1} + write_t from h = 0, over axis 1, in log2(c) doubling steps."""
    reach = 1
    while reach < write.shape[1]:
        joined = write[:, reach:] + decay[:, reach:] * write[:, :-reach]
        write = torch.cat([write[:, :reach], joined], 1)
        decay = torch.cat([decay[:, :reach], decay[:, reach:] * decay[:, :-reach]], 1)
        reach *= 2
    return write


def _chunk(
    x: Tensor,  # [Bt,c,D]
    dt: Tensor,  # [Bt,c,D]
    A: Tensor,  # [D,N]
    B: Tensor,  # [Bt,c,N]
    carry: Tensor,  # [Bt,D,N] the state before the chunk
    state: Tensor,  # [S,D,N] the states that sequences start from
    starts: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(decay, the decay that links neighbours, the states before, after each token): [Bt,c,D,N]."""
    places, sequences = starts
    decay = torch.exp(dt[..., None] * A)
    link = decay.index_fill(1, places, 0.0) if places.numel() else decay
    write = (dt * x)[..., None] * B[:, :, None]
    fed = link[:, :1] * carry[:, None]
    write = torch.cat([write[:, :1] + fed, write[:, 1:]], 1)
    if places.numel():
        write = write.index_add(1, places, decay[:, places] * state[sequences])
    after = _combine(link, write)
    before = torch.cat([carry[:, None], after[:, :-1]], 1)
    if places.numel():
        before = before.index_copy(1, places, state[sequences][None])
    return decay, link, before, after


def checkpoint_shape(x: Tensor, A: Tensor, sequences: int) -> tuple[int, ...]:
    """[K,Bt,D,N]: one state for each chunk and sequence."""
    return -(-x.shape[1] // CHUNK), x.shape[0], *A.shape


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [Bt,T,D], the last states [S,D,N], and the state before each chunk [K,Bt,D,N] if `save`."""
    packing, carries, outputs = _Packing(cu_seqlens), [], []
    carry = state if cu_seqlens is None else torch.zeros_like(state[:1])
    last_state = state.clone()
    for low in range(0, x.shape[1], CHUNK):
        t = slice(low, low + CHUNK)
        carries.append(carry)
        starts = packing.starts(low, low + CHUNK)
        after = _chunk(x[:, t], dt[:, t], A, B[:, t], carry, state, starts)[3]
        outputs.append((after * C[:, t, None]).sum(-1) + D * x[:, t])
        places, sequences = packing.ends(low, low + CHUNK)
        if places.numel():
            last_state = last_state.index_copy(0, sequences, after[0, places])
        carry = after[:, -1]
    if cu_seqlens is None:
        last_state = carry.clone()
    checkpoints = torch.stack(carries) if save else x.new_empty(0, *carry.shape)
    return torch.cat(outputs, 1), last_state, checkpoints


def backward(
    dy: Tensor,
    dlast: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    checkpoints: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of x, dt, A, B, C, D and state from those of y and the last states."""
    packing, T = _Packing(cu_seqlens), x.shape[1]
    dx, ddt, dB, dC = (torch.empty_like(t) for t in (x, dt, B, C))
    dA, dstate = torch.zeros_like(A), torch.zeros_like(state)
    g_carry = dlast if cu_seqlens is None else torch.zeros_like(state[:1])
    for low in range((T - 1) // CHUNK * CHUNK, -1, -CHUNK):
        t = slice(low, low + CHUNK)
        x_t, dt_t, B_t, dy_t = x[:, t], dt[:, t], B[:, t], dy[:, t]
        starts, ends = packing.starts(low, low + CHUNK), packing.ends(low, low + CHUNK)
        decay, link, before, after = _chunk(
            x_t, dt_t, A, B_t, checkpoints[low // CHUNK], state, starts
        )
        read = dy_t[..., None] * C[:, t][:, :, None]  # [Bt,c,D,N]: what y sends to each state
        read = torch.cat([read[:, :-1], read[:, -1:] + g_carry[:, None]], 1)
        if ends[0].numel():
            read = read.index_add(1, ends[0], dlast[ends[1]][None])
        # Backwards in time the same recurrence runs, with the decay of the token after.
        ahead = torch.cat([torch.zeros_like(link[:, :1]), link[:, 1:].flip(1)], 1)
        g = _combine(ahead, read.flip(1)).flip(1)  # [Bt,c,D,N]: gradient of each state
        exponent = g * decay * before
        written = (g * B_t[:, :, None]).sum(-1)
        dx[:, t] = dt_t * written + D * dy_t
        ddt[:, t] = x_t * written + (exponent * A).sum(-1)
        dA += (exponent * dt_t[..., None]).sum((0, 1))
        dB[:, t] = (g * (dt_t * x_t)[..., None]).sum(2)
        dC[:, t] = (after * dy_t[..., None]).sum(2)
        if starts[0].numel():
            dstate[starts[1]] = (decay * g)[0, starts[0]]
        g_carry = link[:, 0] * g[:, 0]
    if cu_seqlens is None:
        dstate = g_carry.clone()
    return dx, ddt, dA, dB, dC, (dy * x).sum((0, 1)), dstate
