"""What a decay does inside a chunk, exact for any gates, in matrix products.

Token s reaches token t through exp(g_{s+1} + ... + g_t). Two temptations are avoided here.
Factoring it into e^{G_t} e^{-G_s}, with cumulative sums G, overflows once a chunk decays by more
than e^88. The difference e^{G_t - G_s} does not overflow but cancels: behind a token with log
decay -50 the sums have lost the digits that later gates near 0 need. So every segment is summed by
itself, and every exponent is a sum of numbers <= 0 over its own tokens.

For a number a head that is one masked cumulative sum, [C,C] a head and chunk. For a number a key
channel, [C,C,K] would be too much, and the segments are summed by bisection. Cut the chunk in two
halves; a pair with s on the left and t on the right meets at the cut:

    g_{s+1} + ... + g_t  =  suffix_s (left half, after s)  +  prefix_t (right half, t included)

Each such block of scores is one matrix product, (q e^prefix) (k e^suffix)^T, with both factors
<= 1. Pairs inside one half are the same problem, half as large.

    B batch  Hk key heads  G heads sharing a key  N chunks  C chunk size, a power of two  K  V
    x, y     [B,Hk,G|1,N,C,K]   (1: shared by the group, never expanded)
    state    [B,Hk,G,K,V]
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad


class Decay(Protocol):
    """The six things a chunk asks of its decay. `own` says whether token t's decay has been
    applied when t reads: true for every published read but RWKV's bonus and LowRank's `a`."""

    def scores(self, x: Tensor, y: Tensor, diagonal: bool, own: bool = True) -> Tensor:
        """x_t^T (decay s -> t) y_s for s < t (and s = t with `diagonal`), else 0: [..,C,C]."""

    def reader(self, x: Tensor, own: bool = True) -> Tensor:
        """x_t with the decay from the chunk's start to t multiplied in: [B,Hk,G,N,C,K]."""

    def writer(self, y: Tensor) -> Tensor:
        """y_s with the decay from s to the chunk's end multiplied in: [B,Hk,G,N,C,K]."""

    def read(self, x: Tensor, states: Tensor, own: bool = True) -> Tensor:
        """reader(x) @ states, for the states [..,K,V] at the chunks' starts: [..,C,V]."""

    def write(self, keys: Tensor, values: Tensor) -> Tensor:
        """writer(keys)^T @ values: [..,K,V]."""

    def carry(self, state: Tensor, n: int, written: Tensor) -> Tensor:
        """A state [B,Hk,G,K,V] from the start of chunk n to its end, plus what the chunk wrote."""


def shared_matmul(x: Tensor, y: Tensor) -> Tensor:
    """x @ y where x may be shared by y's group (x.shape[2] == 1): one product, nothing expanded.

    x [B,Hk,G|1,N,M,L], y [B,Hk,G|1,N,L,V] -> [B,Hk,G,N,M,V]. A shared x meets all heads at once by
    laying their columns side by side.
    """
    G = y.shape[2]
    if x.shape[2] == G or G == 1:
        return x @ y
    wide = y.permute(0, 1, 3, 4, 2, 5).flatten(-2)  # [B,Hk,N,L,G*V]
    out = (x.squeeze(2) @ wide).unflatten(-1, (G, -1))  # [B,Hk,N,M,G,V]
    result: Tensor = out.permute(0, 1, 4, 2, 3, 5)
    return result


def pairs(x: Tensor, y: Tensor) -> Tensor:
    """x_t^T y_s for all t, s: [B,Hk,G|1,N,C,C], G where either side has it."""
    if y.shape[2] < x.shape[2]:
        flipped: Tensor = shared_matmul(y, x.mT).mT
        return flipped
    return shared_matmul(x, y.mT)


class NoDecay:
    """d_t = 1."""

    def scores(self, x: Tensor, y: Tensor, diagonal: bool, own: bool = True) -> Tensor:
        return pairs(x, y).tril(0 if diagonal else -1)

    def reader(self, x: Tensor, own: bool = True) -> Tensor:
        return x

    def writer(self, y: Tensor) -> Tensor:
        return y

    def read(self, x: Tensor, states: Tensor, own: bool = True) -> Tensor:
        return shared_matmul(x, states)

    def write(self, keys: Tensor, values: Tensor) -> Tensor:
        return shared_matmul(keys.mT, values)

    def carry(self, state: Tensor, n: int, written: Tensor) -> Tensor:
        return state + written


class _Gated:
    """What both decays do with the gates from a chunk's start to t, and from s to its end."""

    start: Tensor  # [..,C,1|K]
    end: Tensor  # [..,C,1|K]
    totals: tuple[Tensor, ...]  # of each chunk (or one for all): [B|1,Hk,G,1|K,1]

    def _start(self, own: bool) -> Tensor:
        return self.start if own else pad(self.start[..., :-1, :], (0, 0, 1, 0), value=1.0)

    def reader(self, x: Tensor, own: bool = True) -> Tensor:
        return x * self._start(own)

    def writer(self, y: Tensor) -> Tensor:
        return y * self.end

    def carry(self, state: Tensor, n: int, written: Tensor) -> Tensor:
        return torch.addcmul(written, state, self.totals[n if len(self.totals) > 1 else 0])


class HeadDecay(_Gated):
    """One number a head and token: multiplies scores and values, so shared keys stay shared.

    log_decay [B|1,Hk,G,N|1,C]; a 1 where a fixed decay is the same for all. The weights are kept
    with s before t, so that the cumulative sums run along memory.
    """

    def __init__(self, log_decay: Tensor) -> None:
        C = log_decay.shape[-1]
        ones = torch.ones(C, C, dtype=torch.bool, device=log_decay.device)
        rows = log_decay.unsqueeze(-2).expand(*log_decay.shape, C)  # [..,C,C], g_t in every row s
        segment = rows.masked_fill(ones.tril(), 0.0).cumsum_(-1)  # g_{s+1} + ... + g_t
        self.weights = segment.masked_fill_(ones.tril(-1), float("-inf")).exp_()  # of s -> t
        self.start = log_decay.cumsum(-1).exp().unsqueeze(-1)  # [..,C,1]
        self.end = self.weights[..., -1:]  # [..,C,1]
        self.totals = self.start[..., -1:, :].unbind(3)  # of each chunk: [B|1,Hk,G,1,1]

    def scores(self, x: Tensor, y: Tensor, diagonal: bool, own: bool = True) -> Tensor:
        weights = self.weights
        if not own:  # the decay s -> t-1 stands one column before
            weights = pad(weights[..., :-1], (1, 0))
        elif not diagonal:
            weights = weights.triu(1)
        scores: Tensor = (pairs(y, x) * weights).mT
        return scores

    def read(self, x: Tensor, states: Tensor, own: bool = True) -> Tensor:
        return shared_matmul(x, states) * self._start(own)

    def write(self, keys: Tensor, values: Tensor) -> Tensor:
        return shared_matmul(keys.mT, values * self.end)


class KeyDecay(_Gated):
    """One number a key channel and token. log_decay [B|1,Hk,G,N|1,C,K]."""

    def __init__(self, log_decay: Tensor) -> None:
        levels = _bisect(log_decay)
        # Of each level the pairs that meet there: t in a right half, s in the left one beside it.
        self.halves = [
            (prefix[..., 1::2, :, :], suffix[..., 0::2, :, :].exp())
            for prefix, suffix in levels[:-1]
        ]
        prefix, suffix = levels[-1]
        self.start = prefix.squeeze(-3).exp()  # [..,C,K]
        self.end = suffix.squeeze(-3).exp()  # [..,C,K]
        self.totals = self.start[..., -1:, :].mT.unbind(3)  # of each chunk: [B|1,Hk,G,K,1]

    def scores(self, x: Tensor, y: Tensor, diagonal: bool, own: bool = True) -> Tensor:
        batch = torch.broadcast_shapes(x.shape[:-2], self.start.shape[:-2])
        own_score = (x * y).sum(-1) if diagonal else x.new_zeros(x.shape[:-1])  # [..,C]
        block = own_score[..., None, None].expand(*batch, -1, 1, 1)  # [..,C,1,1]
        for prefix, suffix_exp in self.halves:
            h = prefix.shape[-2]
            if not own:
                prefix = pad(prefix[..., :-1, :], (0, 0, 1, 0))
            x_right = x.unflatten(-2, (-1, 2, h)).select(-3, 1)  # [..,C/2h,h,K]
            y_left = y.unflatten(-2, (-1, 2, h)).select(-3, 0)
            low = (x_right * prefix.exp()) @ (y_left * suffix_exp).mT  # [..,C/2h,h,h]
            top = torch.cat([block[..., 0::2, :, :], torch.zeros_like(low)], -1)
            bottom = torch.cat([low, block[..., 1::2, :, :]], -1)
            block = torch.cat([top, bottom], -2)  # [..,C/2h,2h,2h]
        return block.squeeze(-3)

    def read(self, x: Tensor, states: Tensor, own: bool = True) -> Tensor:
        return self.reader(x, own) @ states

    def write(self, keys: Tensor, values: Tensor) -> Tensor:
        return self.writer(keys).mT @ values


class ValueDecay:
    """A number a value channel and token, beside the decay of keys. log_decay [B|1,Hk,G,N|1,C,V].

    The same bisection with the roles swapped: where a pair meets, the score is the same for all
    value channels, and it is the value that carries its suffix and the output its prefix.
    """

    def __init__(self, log_decay: Tensor) -> None:
        levels = _bisect(log_decay)
        self.halves = [
            (prefix[..., 1::2, :, :].exp(), suffix[..., 0::2, :, :].exp())
            for prefix, suffix in levels[:-1]
        ]
        prefix, suffix = levels[-1]
        self.start = prefix.squeeze(-3).exp()  # [..,C,V], from the chunk's start to t
        self.end = suffix.squeeze(-3).exp()  # [..,C,V], from s to the chunk's end
        self.totals = self.start[..., -1:, :].unbind(3)  # of each chunk: [B|1,Hk,G,1,V]

    def total(self, n: int) -> Tensor:
        """Of chunk n."""
        return self.totals[n if len(self.totals) > 1 else 0]

    def weigh(self, scores: Tensor, values: Tensor) -> Tensor:
        """sum_s scores_ts (decay s -> t) values_s: scores [..,C,C], values [..,C,V] -> [..,C,V]."""
        out = scores.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * values
        for prefix, suffix in self.halves:
            h = prefix.shape[-2]
            blocks = scores.unflatten(-2, (-1, 2 * h)).unflatten(-1, (-1, 2 * h))
            blocks = blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)  # [..,C/2h,2h,2h]
            left = values.unflatten(-2, (-1, 2, h)).select(-3, 0)  # [..,C/2h,h,V]
            right = prefix * (blocks[..., h:, :h] @ (left * suffix))
            both = torch.stack([torch.zeros_like(right), right], -3)  # [..,C/2h,2,h,V]
            out = out + both.flatten(-4, -2)
        return out


def _bisect(log_decay: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Prefix and suffix sums of log_decay [..,C,D] in blocks of h = 1, 2, 4, ..., C.

    Each [..,C/h,h,D]: the prefix includes the token, the suffix is what follows it in its block.
    """
    prefix = log_decay.unsqueeze(-2)  # [..,C,1,D]
    suffix = torch.zeros_like(prefix)
    levels = [(prefix, suffix)]
    for _ in range(log_decay.shape[-2].bit_length() - 1):
        pl, pr = prefix[..., 0::2, :, :], prefix[..., 1::2, :, :]
        sl, sr = suffix[..., 0::2, :, :], suffix[..., 1::2, :, :]
        prefix = torch.cat([pl, pr + pl[..., -1:, :]], -2)
        suffix = torch.cat([sl + pr[..., -1:, :], sr], -2)
        levels.append((prefix, suffix))
    return levels
