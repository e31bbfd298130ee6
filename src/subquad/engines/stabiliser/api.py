"""`stabilise`: exponential gates of any size as decays and inputs that never exceed one."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.engines.runtime.validation import check_cu_seqlens, check_shape, check_tensor
from subquad.errors import fail


def stabilise(
    log_decay: Tensor,
    log_input: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gates relative to the largest input weight so far.

        m_t = max(log_decay_t + m_{t-1}, log_input_t)
        log_decay'_t = log_decay_t + m_{t-1} - m_t <= 0        log_input'_t = log_input_t - m_t <= 0

    A recurrence h_t = e^{log_decay_t} h_{t-1} + e^{log_input_t} x_t run on the new gates gives
    e^{-m_t} h_t, whatever the size of the old ones. Ratios such as h_t over a normaliser of the
    same gates are thus unchanged, and with them all gradients: m is a constant to autograd.

    Source: Milakov and Gimelshein 2018 (arXiv:1805.02867); Beck et al. 2024 (xLSTM,
    arXiv:2405.04517, eq. 15-17).

    Args:
        log_decay, log_input: [B,T,C] real, of one dtype; log_decay may be any number, <= 0 or not.
        state: [B,C] m before the first token, or [N,C] when packed; -inf where nothing came yet.
        cu_seqlens: [N+1], the bounds of packed sequences (then B is 1).

    Returns:
        log_decay' and log_input' [B,T,C], m [B,T,C] and the last m of each sequence, like `state`.

    Raises:
        ValueError: naming the argument that does not fit, and the fix.
    """
    B, T, C = check_tensor("log_decay", log_decay, 3, "[B,T,C]").shape
    check_shape("log_input", check_tensor("log_input", log_input, 3, "[B,T,C]", log_decay),
                (B, T, C), "the shape of log_decay")  # fmt: skip
    rows = B if cu_seqlens is None else check_cu_seqlens(cu_seqlens, T, B, log_decay)
    check_shape("state", check_tensor("state", state, 2, "[B,C]", log_decay), (rows, C), "[B,C]")
    if not log_decay.dtype == log_input.dtype == state.dtype:
        got = f"{log_decay.dtype}, {log_input.dtype}, {state.dtype}"
        raise fail("log_decay, log_input, state", got, "one dtype", "cast them, best to float32")
    if T == 1 and cu_seqlens is None:
        before = state.unsqueeze(1)
        m = torch.maximum(log_decay + before, log_input).detach()
        return log_decay + before - m, log_input - m, m, m.squeeze(1)
    with torch.no_grad():
        m, before, last = _maxima(log_decay, log_input, state, cu_seqlens)
    # Where nothing has come yet, not even now, the old decay serves as well as any.
    shift = torch.where(m == -torch.inf, 0.0, before - m)
    return log_decay + shift, log_input - torch.where(m == -torch.inf, 0.0, m), m, last


def _maxima(
    log_decay: Tensor, log_input: Tensor, state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """m_t, m_{t-1} [B,T,C], and the last m of each sequence.

    x -> max(x + a, b) after x -> max(x + a', b') is max(x + a + a', max(b' + a, b)): one more such
    map, so all m come from log2(T) rounds of doubling (Hillis and Steele 1986). Sums are of gates
    in between only, and exact enough: any m gives the same results.
    """
    if cu_seqlens is None:
        first = torch.maximum(log_input[:, :1], log_decay[:, :1] + state.unsqueeze(1))
        a, b = log_decay, torch.cat([first, log_input[:, 1:]], 1)
        begins = None
    else:
        begins = cu_seqlens[:-1].long()
        begun = log_decay[0].index_select(0, begins) + state
        first = torch.maximum(log_input[0].index_select(0, begins), begun)
        b = log_input.index_copy(1, begins, first[None])
        a = log_decay.index_fill(1, begins, -torch.inf)  # nothing crosses into the next sequence
    reach = 1
    while reach < b.shape[1]:
        joined = torch.maximum(b[:, :-reach] + a[:, reach:], b[:, reach:])
        b = torch.cat([b[:, :reach], joined], 1)
        a = torch.cat([a[:, :reach], a[:, reach:] + a[:, :-reach]], 1)
        reach *= 2
    if begins is None:
        before = torch.cat([state.unsqueeze(1), b[:, :-1]], 1)
        return b, before, b[:, -1].contiguous()
    assert cu_seqlens is not None
    before = torch.cat([b[:, :1], b[:, :-1]], 1).index_copy(1, begins, state[None])
    return b, before, b[0].index_select(0, cu_seqlens[1:].long() - 1)
