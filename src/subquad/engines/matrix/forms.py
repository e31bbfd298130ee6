"""The chunked form of the matrix recurrence: matrix products only, equal to `reference.loop`.

Inside a chunk of C tokens all pairs meet at once, as in attention; between chunks only the state
travels. With C >= T it is the parallel (quadratic) form, so the two are one function.

Without erasing (GLA, Yang et al. 2024, section 4; SSD, Dao and Gu 2024, section 6):

    O = tril(Q K^T . decay) V + (Q . decay) S        S <- decay . S + (K . decay)^T V

With erasing each token writes from what it has itself read, X, so that reads in a chunk depend on
each other through a unit lower triangular matrix L, solved once for all chunks at the same time
(the WY form: DeltaNet, Yang et al. 2024, section 3):

    X = U - W S,  U = L^{-1} base,  W = L^{-1} reader        S <- decay . S + ... + (B . decay)^T X

    delta rule   X_t = v_t - k_t^T S'        L = I + strict(K K^T . decay) diag(beta)
    low rank     X_t = a_t^T S_{t-1}         L = I - strict(A B^T . decay)

Shapes: q, k [B,Hk,1,N,C,K], v [B,Hk,G,N,C,V], see decay.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from subquad.engines.matrix.decay import (
    Decay,
    HeadDecay,
    KeyDecay,
    NoDecay,
    ValueDecay,
    shared_matmul,
)
from subquad.engines.matrix.grid import Grid
from subquad.engines.matrix.kind import is_fixed, is_per_key
from subquad.engines.matrix.reference import Delta, Erase, LowRank

CHUNKS_AT_ONCE = 64  # bounds the memory of a long sequence where no gradient is kept


def chunked(
    q: Tensor,  # [B,T,Hk,K], scaled already
    k: Tensor,  # [B,T,Hk,K]
    v: Tensor,  # [B,T,H,V]
    log_decay: Tensor | None,  # None | [H] | [H,K] | [B,T,H] | [B,T,H,K]
    erase: Erase,
    bonus: Tensor | None,  # [H,K]
    state: Tensor,  # [B,H,K,V], or [N,H,K,V] for N packed sequences
    cu_seqlens: Tensor | None,
    chunk: int,  # a power of two
    value_log_decay: Tensor | None = None,  # None | [H,V] | [B,T,H,V]
) -> tuple[Tensor, Tensor]:
    """All tokens, `chunk` at a time. Returns o [B,T,H,V] and the final state [B|N,H,K,V]."""
    Hk = k.shape[2]
    grid = Grid.of(q.shape[1], chunk, cu_seqlens)
    q, k, wide = grid.cut(q, Hk).contiguous(), grid.cut(k, Hk).contiguous(), grid.cut(v, Hk)
    v = wide.contiguous()
    if wide.shape[2] == 1:
        wide = v  # else heads that share a key lie side by side in `wide`, as `write` wants them
    g = _cut_decay(log_decay, grid, Hk)
    w = _cut_decay(value_log_decay, grid, Hk)
    beta = grid.cut(erase.beta.unsqueeze(-1), Hk).contiguous() if isinstance(erase, Delta) else None
    a = grid.cut(erase.a, Hk).contiguous() if isinstance(erase, LowRank) else None
    b = grid.cut(erase.b, Hk).contiguous() if isinstance(erase, LowRank) else None
    if bonus is not None:
        bonus = bonus.unflatten(0, (Hk, -1))[None, :, :, None, None]  # [1,Hk,G,1,1,K]
    initial = state.unflatten(1, (Hk, -1))  # [B|N,Hk,G,K,V]

    S = initial if cu_seqlens is None else initial[:1]
    outputs, ends = [], []
    for begin in range(0, grid.N, CHUNKS_AT_ONCE):
        cut = slice(begin, begin + CHUNKS_AT_ONCE)
        qn, kn, vn, wn, gn = *(x[:, :, :, cut] for x in (q, k, v, wide)), _at(g, cut)
        decay = NoDecay() if gn is None else _decay(gn)
        along_values = None if w is None else ValueDecay(_at(w, cut))  # type: ignore[arg-type]
        if along_values is not None:
            inside = _with_value_decay(qn, kn, vn, decay, along_values)
        elif erase is None:
            inside = _without_erase(qn, kn, vn, wn, decay, bonus)
        elif beta is not None:
            inside = _with_delta(qn, kn, vn, beta[:, :, :, cut], decay)
        elif a is not None and b is not None:
            inside = _with_low_rank(qn, kn, vn, wn, a[:, :, :, cut], b[:, :, :, cut], decay)

        # One entry a chunk. (unbind, because the gradient of indexing is as large as the whole.)
        written = None if inside.written is None else inside.written.unbind(3)
        erasing = None
        if inside.U is not None and inside.W is not None and inside.writer is not None:
            erasing = list(zip(inside.U.unbind(3), inside.W.unbind(3), inside.writer.mT.unbind(3)))
        starts, reads = [], []
        for n in range(qn.shape[3]):
            S = grid.enter(S, initial, begin + n)
            starts.append(S)
            new = [] if written is None else [written[n]]
            if erasing is not None:
                U, W, writer = erasing[n]
                reads.append(U - W @ S)
                new.append(writer @ reads[-1])
            kept = S if along_values is None else S * along_values.total(n)
            S = decay.carry(kept, n, sum(new[1:], new[0]))
            if cu_seqlens is not None:
                ends.append(S)
        o = decay.read(qn, torch.stack(starts, 3), own=bonus is None)
        if along_values is not None:
            o = o * along_values.start
        if inside.o is not None:
            o = o + inside.o
        if inside.scores is not None:
            o = o + shared_matmul(inside.scores, torch.stack(reads, 3))
        outputs.append(o)
    o = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 3)
    final = S if cu_seqlens is None else grid.leave(ends)
    return grid.join(o), final.flatten(1, 2).contiguous()


class _Inside(NamedTuple):
    """What chunks do by themselves, before their starting states are known."""

    o: Tensor | None  # [B,Hk,G,N,C,V] what the tokens read from values of their own chunk
    written: Tensor | None  # [B,Hk,G,N,K,V] what the values leave in the state
    # With erasing: the reads X = U - W S [..,C,V], who reads them and what they leave.
    U: Tensor | None = None  # [B,Hk,G,N,C,V]
    W: Tensor | None = None  # [B,Hk,G,N,C,K]
    writer: Tensor | None = None  # [B,Hk,G,N,C,K]
    scores: Tensor | None = None  # [B,Hk,G,N,C,C]


def _without_erase(
    q: Tensor, k: Tensor, v: Tensor, wide: Tensor, decay: Decay, bonus: Tensor | None
) -> _Inside:
    """`wide` is v in the memory layout that `write` reads best."""
    written = decay.write(k, wide)
    if bonus is None:
        return _Inside(shared_matmul(decay.scores(q, k, diagonal=True), v), written)
    # Token t reads before its own decay and write, and itself through the bonus.
    o = shared_matmul(decay.scores(q, k, diagonal=False, own=False), v)
    return _Inside(o + (q * bonus * k).sum(-1, keepdim=True) * v, written)


def _with_value_decay(
    q: Tensor, k: Tensor, v: Tensor, decay: Decay, along_values: ValueDecay
) -> _Inside:
    """A value channel forgets by itself, so no matrix of scores serves all: see `ValueDecay`."""
    scores = decay.scores(q, k, diagonal=True)
    return _Inside(along_values.weigh(scores, v), decay.write(k, v * along_values.end))


def _with_delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Decay) -> _Inside:
    """beta [B,Hk,G,N,C,1]; writes beta_s X_s, so beta multiplies the columns of every score."""
    L = decay.scores(k, k, diagonal=False) * beta.mT
    reader = decay.reader(k).expand(*beta.shape[:-1], -1)
    U, W = _solve(L, v, reader)
    scores = decay.scores(q, k, diagonal=True) * beta.mT
    return _Inside(None, None, U, W, decay.writer(k) * beta, scores)


def _with_low_rank(
    q: Tensor, k: Tensor, v: Tensor, wide: Tensor, a: Tensor, b: Tensor, decay: Decay
) -> _Inside:
    L = -decay.scores(a, b, diagonal=False, own=False)
    base = shared_matmul(decay.scores(a, k, diagonal=False, own=False), v)
    U, W = _solve(L, base, -decay.reader(a, own=False))
    o = shared_matmul(decay.scores(q, k, diagonal=True), v)
    scores = decay.scores(q, b, diagonal=True)
    return _Inside(o, decay.write(k, wide), U, W, decay.writer(b), scores)


def _solve(strict: Tensor, base: Tensor, reader: Tensor) -> tuple[Tensor, Tensor]:
    """(I + strict)^{-1} applied to base [..,C,V] and reader [..,C,K], by forward substitution.

    Solved transposed, X^T (I + strict)^T = both^T: 2.5x faster on the CPU, where the library's
    matrices are stored by columns.
    """
    both = torch.cat([base, reader], -1)
    solved = torch.linalg.solve_triangular(
        strict.mT, both.mT, upper=True, left=False, unitriangular=True
    ).mT
    U, W = solved.split([base.shape[-1], reader.shape[-1]], -1)
    return U, W


def _cut_decay(log_decay: Tensor | None, grid: Grid, Hk: int) -> Tensor | None:
    """Any decay -> [B|1,Hk,G,N|1,C,D], D = 1 for a number a head, K for a number a key channel."""
    if log_decay is None:
        return None
    g = log_decay if is_per_key(log_decay) else log_decay.unsqueeze(-1)
    return grid.cut_fixed(g, Hk) if is_fixed(log_decay) else grid.cut(g, Hk).contiguous()


def _decay(g: Tensor) -> Decay:
    return HeadDecay(g.squeeze(-1)) if g.shape[-1] == 1 else KeyDecay(g)


def _at(x: Tensor | None, cut: slice) -> Tensor | None:
    """Some chunks of x; all of it where it is the same for every chunk."""
    return x if x is None or x.shape[3] == 1 else x[:, :, :, cut]
