"""The specification: one step of the matrix recurrence, and the loop over it.

Everything else in this library is a faster way to compute what this file says. Nothing here is
clever: every line carries the shape of what it makes, and tests compare each form with it.

    B batch   T time   H heads   Hk key heads (H a multiple of Hk)   K key size   V value size
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from subquad.engines.matrix.kind import is_fixed, is_per_key


@dataclass(frozen=True)
class Delta:
    """Erase what the key already holds before writing: the delta rule (Schlag et al. 2021, eq. 24).

        S' = d_t * S_{t-1};   S_t = S' + beta_t k_t (v_t - S'^T k_t)^T

    beta: [B,T,H], in [0, 1] for a plain delta rule, in [0, 2] with negative eigenvalues
    (Grazzi et al. 2024). Keys are expected to have norm 1; longer ones can diverge.
    """

    beta: Tensor


@dataclass(frozen=True)
class LowRank:
    """A free rank-one transition, as in RWKV-7 (Peng et al. 2025) and other DPLR recurrences.

        S_t = d_t * S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T

    a, b: [B,T,H,K]. Nothing keeps it stable but the caller: for RWKV-7, a = -kk and b = kk * a'.
    """

    a: Tensor
    b: Tensor


Erase = Delta | LowRank | None


def parts(erase: Erase) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(beta, a, b) of an erase: Delta has the first, LowRank the other two."""
    if isinstance(erase, Delta):
        return erase.beta, None, None
    return (None, erase.a, erase.b) if isinstance(erase, LowRank) else (None, None, None)


def step(
    q: Tensor,  # [B,Hk,K], scaled already
    k: Tensor,  # [B,Hk,K]
    v: Tensor,  # [B,H,V]
    log_decay: Tensor | None,  # None, or broadcastable to [B,H,K]: [B,H,1], [B,H,K], [H,1], [H,K]
    beta: Tensor | None,  # [B,H]         Delta
    a: Tensor | None,  # [B,H,K]       LowRank, with b
    b: Tensor | None,  # [B,H,K]
    bonus: Tensor | None,  # [H,K]
    state: Tensor,  # [B,H,K,V]
    value_log_decay: Tensor | None = None,  # broadcastable to [B,H,V]
) -> tuple[Tensor, Tensor]:
    """One token: forget, erase, write, read. Returns the output [B,H,V] and the new state."""
    B, H, K, V = state.shape
    G = H // k.shape[1]  # heads that share a key
    S = state.view(B, -1, G, K, V)  # [B,Hk,G,K,V]
    q = q.view(B, -1, 1, K, 1)  # [B,Hk,1,K,1], one for the whole group
    k = k.view(B, -1, 1, K, 1)  # [B,Hk,1,K,1]
    v = v.view(B, -1, G, 1, V)  # [B,Hk,G,1,V]

    if a is not None and b is not None:
        a = a.view(B, -1, G, K, 1)  # [B,Hk,G,K,1]
        b = b.view(B, -1, G, K, 1)  # [B,Hk,G,K,1]
        erased = b * (a * S).sum(-2, keepdim=True)  # [B,Hk,G,K,V] = b a^T S
    before = S
    if log_decay is not None:
        d = log_decay.exp()  # [B,H,K] up to broadcasting
        S = S * d.reshape(-1, S.shape[1], G, d.shape[-1], 1)  # [B,Hk,G,K,V]
    if value_log_decay is not None:
        S = S * value_log_decay.exp().reshape(-1, S.shape[1], G, 1, V)  # [B,Hk,G,K,V]
    if a is not None and b is not None:
        S = S + erased  # [B,Hk,G,K,V]
    if beta is not None:
        v = beta.view(B, -1, G, 1, 1) * (v - (k * S).sum(-2, keepdim=True))  # [B,Hk,G,1,V]
    S = S + k * v  # [B,Hk,G,K,V]

    if bonus is None:
        o = (q * S).sum(-2)  # [B,Hk,G,V]
    else:  # read before the write, the current token with a weight of its own
        u = bonus.view(-1, G, K, 1)  # [Hk,G,K,1]
        o = (q * (before + u * k * v)).sum(-2)  # [B,Hk,G,V]
    return o.reshape(B, H, V), S.reshape(B, H, K, V)


def loop(
    q: Tensor,  # [B,T,Hk,K], scaled already
    k: Tensor,  # [B,T,Hk,K]
    v: Tensor,  # [B,T,H,V]
    log_decay: Tensor | None,  # None | [H] | [H,K] | [B,T,H] | [B,T,H,K]
    erase: Erase,
    bonus: Tensor | None,  # [H,K]
    state: Tensor,  # [B,H,K,V], or [N,H,K,V] with N packed sequences
    cu_seqlens: Tensor | None,  # [N+1]
    value_log_decay: Tensor | None = None,  # None | [H,V] | [B,T,H,V]
) -> tuple[Tensor, Tensor]:
    """The recurrent form: `step` for one token after another."""
    if cu_seqlens is not None:
        return _loop_packed(q, k, v, log_decay, erase, bonus, state, cu_seqlens, value_log_decay)
    outputs = []
    for t in range(q.shape[1]):
        beta, a, b = (None if x is None else x[:, t] for x in parts(erase))
        decay = decay_at(log_decay, t)
        along_values = decay_at(value_log_decay, t)
        o, state = step(q[:, t], k[:, t], v[:, t], decay, beta, a, b, bonus, state, along_values)
        outputs.append(o)
    return torch.stack(outputs, dim=1), state


def decay_at(log_decay: Tensor | None, t: int) -> Tensor | None:
    """The decay of token t, one number a head ([..., 1]) or a key channel ([..., K])."""
    if log_decay is None:
        return None
    d = log_decay if is_fixed(log_decay) else log_decay[:, t]  # [H], [H,K], [B,H] or [B,H,K]
    return d if is_per_key(log_decay) else d.unsqueeze(-1)


def _loop_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    erase: Erase,
    bonus: Tensor | None,
    state: Tensor,
    cu_seqlens: Tensor,
    value_log_decay: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Packed sequences, by definition: each is run alone from its own state."""
    ends = cu_seqlens.tolist()
    outputs, finals = [], []
    for n, (i, j) in enumerate(pairwise(ends)):
        cut = slice(i, j)
        part: Erase = None
        if isinstance(erase, Delta):
            part = Delta(erase.beta[:, cut])
        elif isinstance(erase, LowRank):
            part = LowRank(erase.a[:, cut], erase.b[:, cut])
        g, w = (x if x is None or is_fixed(x) else x[:, cut] for x in (log_decay, value_log_decay))
        own = state[n : n + 1]
        o, final = loop(q[:, cut], k[:, cut], v[:, cut], g, part, bonus, own, None, w)
        outputs.append(o)
        finals.append(final)
    return torch.cat(outputs, dim=1), torch.cat(finals)
