"""The delta rule: a key erases what it holds before it writes."""

from subquad.table.row import Row
from subquad.table.spec import Recurrence

ROWS = (
    Row(
        "deltanet",
        Recurrence(decay="none", erase="delta"),
        "Yang et al. 2024, arXiv:2406.06484",
        "k, q of norm 1; β in [0,1], or [0,2]",
    ),
    Row(
        "gated_deltanet",
        Recurrence(decay="token_head", erase="delta"),
        "Yang et al. 2025, arXiv:2412.06464",
        "k, q of norm 1; γ_t as in mamba2",
    ),
    Row(
        "kda",
        Recurrence(decay="token_key", erase="delta"),
        "Kimi Team 2025, arXiv:2510.26692",
        "k, q of norm 1; α_t a number a key channel",
    ),
)
