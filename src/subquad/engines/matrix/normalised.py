"""The matrix recurrence with a normaliser beside it: what the keys alone have written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from subquad.engines.matrix.api import linear_recurrence
from subquad.engines.runtime.validation import check_shape, check_tensor
from subquad.errors import fail


def normalised_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    state: Tensor | None = None,
    normaliser: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    form: str = "auto",
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`linear_recurrence` and, beside the state S, the decayed sum z of its keys.

        S_t = d_t * S_{t-1} + k_t v_t^T      o_t = scale * S_t^T q_t
        z_t = d_t * z_{t-1} + k_t            n_t = scale * z_t . q_t

    What divides by what is the caller's: o / (n + eps) in linear attention (Katharopoulos et al.
    2020, arXiv:2006.16236, eq. 18-20), o / max(|n|, e^-m) in mLSTM (Beck et al. 2024,
    arXiv:2405.04517, eq. 21-23).

    Args:
        q, k, v, log_decay, scale, cu_seqlens, form, impl: as `linear_recurrence`'s.
        state, normaliser: S [B,H,K,V] and z [B,H,K] before the first token, both float32 (float64
            for float64 inputs), N sequences when packed; both or neither. None: zeros.

    Returns:
        o [B,T,H,V] and n [B,T,H], not divided yet, the final state and the final normaliser. n is
        float32 (float64 for float64 inputs): it sums over all tokens.

    Raises:
        ValueError: as `linear_recurrence`.
    """
    if (state is None) != (normaliser is None):
        got = "a state without it" if normaliser is None else "no state with it"
        raise fail("normaliser", got, "both or neither", "keep the two together")
    B, T, H = check_tensor("v", v, 4, "[B,T,H,V]").shape[:3]
    V = v.shape[3]
    precise = torch.float64 if v.dtype == torch.float64 else torch.float32
    if state is not None and normaliser is not None:
        check_tensor("state", state, 4, "[B,H,K,V]", v)
        check_tensor("normaliser", normaliser, 3, "[B,H,K]", v)
        check_shape("normaliser", normaliser, tuple(state.shape[:3]), "[B,H,K]")
        for name, x in (("state", state), ("normaliser", normaliser)):
            if x.dtype != precise:
                raise fail(name, x.dtype, f"{precise}: it adds up over all tokens", "cast it")
    options: dict[str, Any] = {"scale": scale, "cu_seqlens": cu_seqlens, "form": form, "impl": impl}
    own = None if normaliser is None else normaliser.unsqueeze(-1)  # [B,H,K,1]
    if T > 1 and not v.is_cuda:  # a column of ones in v: compiled chunks have room for it
        wide = pad(v.to(precise), (0, 1), value=1.0)
        both = None if state is None or own is None else torch.cat([state, own], -1)
        o, both = linear_recurrence(
            q.to(precise), k.to(precise), wide, log_decay, state=both, **options
        )
        o, n = o.split([V, 1], -1)
        S, z = both.split([V, 1], -1)
        return o.to(v.dtype), n.squeeze(-1), S.contiguous(), z.squeeze(-1).contiguous()
    # On a GPU it would widen the tiles of every head: z is a recurrence of its own, with V = 1.
    ones = torch.ones(B, T, H, 1, dtype=v.dtype, device=v.device)
    o, final = linear_recurrence(q, k, v, log_decay, state=state, **options)
    n, total = linear_recurrence(q, k, ones, log_decay, state=own, **options)
    return o, n.squeeze(-1).to(total.dtype), final, total.squeeze(-1)
