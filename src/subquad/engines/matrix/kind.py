"""What kind of decay a `log_decay` is: its number of axes says it, and nobody asks but here."""

from __future__ import annotations

from torch import Tensor

LAYOUT = "[H], [H,K], [B,T,H] or [B,T,H,K]"
_BY_AXES = {1: "fixed_head", 2: "fixed_key", 3: "token_head", 4: "token_key"}


def decay_kind(log_decay: Tensor | None) -> str:
    """Its name in the table: "none", "fixed_head", "fixed_key", "token_head" or "token_key"."""
    return "none" if log_decay is None else _BY_AXES[log_decay.ndim]


def is_layout(log_decay: Tensor) -> bool:
    """Whether it has as many axes as some kind."""
    return log_decay.ndim in _BY_AXES


def is_fixed(log_decay: Tensor) -> bool:
    """The same for every token: [H] or [H,K]."""
    return log_decay.ndim <= 2


def is_per_key(log_decay: Tensor) -> bool:
    """A number a key channel, [H,K] or [B,T,H,K], not a number a head."""
    return log_decay.ndim % 2 == 0
