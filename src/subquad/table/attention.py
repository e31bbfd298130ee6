"""Attention: every token is kept; what linear time is measured against."""

from subquad.table.row import Row
from subquad.table.spec import Recurrence

ROWS = (
    Row(
        "softmax_attention",
        Recurrence("attention"),
        "Vaswani et al. 2017, arXiv:1706.03762",
        "rotary positions, grouped heads",
        "keeps every k_t, v_t",
        "o_t = Σ_{s≤t} softmax_s(k_s · q_t / √K) v_s",
        "2·T·Hk·K",
        state_grows=True,
    ),
    Row(
        "sliding_window_attention",
        Recurrence("attention"),
        "Beltagy et al. 2020, arXiv:2004.05150",
        "rotary positions, grouped heads",
        "keeps the last w of k_t, v_t",
        "o_t = Σ_{t-w<s≤t} softmax_s(k_s · q_t / √K) v_s",
        "2·w·Hk·K",
        "O(T·w·d)",
        "O(w·d)",
    ),
    Row(
        "reformer",
        Recurrence("attention"),
        "Kitaev et al. 2020, arXiv:2001.04451",
        "shared keys and queries, locality-sensitive hashing",
        "keeps every k_t, v_t and its hash",
        "softmax over the keys in q_t's buckets",
        "2·T·d",
        "O(T·log T·d)",
        "O(T·d)",
        state_grows=True,
    ),
)
