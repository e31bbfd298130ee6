"""RWKV, from a running average to a free rank-one transition."""

from subquad.table.row import Row
from subquad.table.spec import Recurrence

ROWS = (
    Row(
        "rwkv4",
        Recurrence("average", "fixed_element", read_out="own"),
        "Peng et al. 2023, arXiv:2305.13048",
        "token shift",
        "n_t = e^{-w} n_{t-1} + e^{k_t} v_t,  z_t = e^{-w} z_{t-1} + e^{k_t}",
        "y_t = σ(r_t) ⊙ (n_{t-1} + e^{u+k_t} v_t) / (z_{t-1} + e^{u+k_t})",
        "5·d",
        "O(T·d)",
        "O(d)",
    ),
    Row(
        "rwkv5",
        Recurrence(decay="fixed_key", read_out="bonus"),
        "Peng et al. 2024, arXiv:2404.05892",
        "token shift",
    ),
    Row(
        "rwkv6",
        Recurrence(decay="token_key", read_out="bonus"),
        "Peng et al. 2024, arXiv:2404.05892",
        "data-dependent token shift",
    ),
    Row(
        "rwkv7",
        Recurrence(decay="token_key", erase="low_rank"),
        "Peng et al. 2025, arXiv:2503.14456",
        "a_t = -κ_t, b_t = κ_t ⊙ η_t, κ of norm 1",
    ),
)
