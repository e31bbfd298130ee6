"""Tokens laid out in chunks, for plain and for packed sequences.

A plain batch is padded to a whole number of chunks. Packed sequences get chunks of their own, so
that no chunk holds tokens of two; the number of chunks is bounded from the shapes alone, so nothing
waits for the device and `torch.compile` sees static sizes. Padding is zeros: a zero key writes
nothing, a zero log decay keeps the state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Grid:
    """N chunks of C tokens over T tokens; of which sequence each chunk is, when packed."""

    T: int
    C: int
    N: int
    token: Tensor | None = None  # [N*C] the token in each place (0 where there is none)
    filled: Tensor | None = None  # [N*C] whether there is one; None: the first T places
    place: Tensor | None = None  # [T] the place of each token
    sequence: Tensor | None = None  # [N] the sequence of each chunk
    first: Tensor | None = None  # [N] whether the chunk begins its sequence
    last: Tensor | None = None  # [sequences] the last chunk of each sequence

    @staticmethod
    def of(T: int, C: int, cu_seqlens: Tensor | None) -> Grid:
        if cu_seqlens is None:
            return Grid(T, C, -(-T // C))
        cu = cu_seqlens.long()
        sequences, device = cu.shape[0] - 1, cu.device
        N = (T + sequences * (C - 1)) // C  # at most one ragged chunk a sequence
        chunks = (cu.diff() + C - 1) // C  # [sequences]
        ends = chunks.cumsum(0)  # [sequences]
        begins = ends - chunks
        n = torch.arange(N, device=device)
        sequence = torch.searchsorted(ends, n, right=True).clamp(max=sequences - 1)  # [N]
        token = (cu[sequence] + (n - begins[sequence]) * C)[:, None] + torch.arange(
            C, device=device
        )
        filled = token < cu[sequence + 1][:, None]  # [N,C]; spare chunks at the end are empty
        t = torch.arange(T, device=device)
        of_token = torch.searchsorted(cu[1:], t, right=True)  # [T]
        return Grid(
            T,
            C,
            N,
            token=torch.where(filled, token, 0).flatten(),
            filled=filled.flatten(),
            place=begins[of_token] * C + t - cu[of_token],
            sequence=sequence,
            first=n == begins[sequence],
            last=ends - 1,
        )

    @property
    def padded(self) -> bool:
        return self.token is not None or self.N * self.C != self.T

    def cut(self, x: Tensor, Hk: int) -> Tensor:
        """[B,T,H,D] -> [B,Hk,G,N,C,D], zeros where there is no token; a view where it can be."""
        if self.token is not None and self.filled is not None:
            # Masked, not multiplied by 0: the token gathered in vain may be NaN or -inf.
            x = x.index_select(1, self.token)
            x = x.masked_fill(~self.filled[None, :, None, None], 0.0)
        elif self.padded:
            x = pad(x, (0, 0, 0, 0, 0, self.N * self.C - self.T))
        x = x.unflatten(1, (self.N, self.C)).unflatten(3, (Hk, -1))  # [B,N,C,Hk,G,D]
        return x.permute(0, 3, 4, 1, 2, 5)

    def cut_fixed(self, g: Tensor, Hk: int) -> Tensor:
        """A decay [H,D], the same for all tokens -> [1,Hk,G,N|1,C,D], 0 where no token is."""
        g = g.unflatten(0, (Hk, -1))[None, :, :, None, None]  # [1,Hk,G,1,1,D]
        if not self.padded:
            return g.expand(-1, -1, -1, 1, self.C, -1)
        filled = self.filled
        if filled is None:
            filled = torch.arange(self.N * self.C, device=g.device) < self.T
        return torch.where(filled.view(1, 1, 1, self.N, self.C, 1), g, 0.0)

    def join(self, x: Tensor) -> Tensor:
        """[B,Hk,G,N,C,D] -> [B,T,H,D]."""
        x = x.permute(0, 3, 4, 1, 2, 5).flatten(3, 4).flatten(1, 2)  # [B,N*C,H,D]
        if self.place is not None:
            return x.index_select(1, self.place)
        return x[:, : self.T]

    def enter(self, state: Tensor, initial: Tensor, n: int) -> Tensor:
        """The state at the start of chunk n: a packed sequence begins from its own."""
        if self.first is None or self.sequence is None:
            return state
        mine = initial.index_select(0, self.sequence[n : n + 1])
        return torch.where(self.first[n], mine, state)

    def leave(self, ends: list[Tensor]) -> Tensor:
        """The final states, from the states at the ends of all chunks."""
        if self.last is None:
            return ends[-1]
        return torch.cat(ends).index_select(0, self.last)
