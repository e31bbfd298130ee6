"""Attention-free Transformers: weighted averages over time, channel by channel."""

from subquad.table.row import Row
from subquad.table.spec import Recurrence

ROWS = (
    Row(
        "aft_full",
        Recurrence("attention"),
        "Zhai et al. 2021, arXiv:2105.14103",
        "learned position biases w",
        "keeps every k_t, v_t",
        "y_t = σ(q_t) ⊙ Σ_s e^{k_s + w_ts} v_s / Σ_s e^{k_s + w_ts}",
        "2·T·d",
        state_grows=True,
    ),
    Row(
        "aft_local",
        Recurrence("attention"),
        "Zhai et al. 2021, arXiv:2105.14103",
        "position biases w inside a window only",
        "keeps the last w of k_t, v_t, and running sums",
        "as aft_full with w_ts = 0 for |t-s| ≥ w",
        "2·w·d + 3·d",
        "O(T·w·d)",
        "O(w·d)",
    ),
    Row(
        "aft_simple",
        Recurrence("average", "none", read_out="own"),
        "Zhai et al. 2021, arXiv:2105.14103",
        "a cumulative softmax over time for every channel",
        "n_t = n_{t-1} + e^{k_t} v_t,  z_t = z_{t-1} + e^{k_t}",
        "y_t = σ(q_t) ⊙ n_t / z_t",
        "3·d",
        "O(T·d)",
        "O(d)",
    ),
    Row(
        "aft_conv",
        Recurrence("average", "none", read_out="own"),
        "Zhai et al. 2021, arXiv:2105.14103",
        "position biases as a convolution, one for each head",
        "as aft_simple, and the last w of k_t, v_t",
        "y_t = σ(q_t) ⊙ (conv(e^k v, e^w - 1) + n_t) / (conv(e^k, e^w - 1) + z_t)",
        "2·w·d + 3·d",
        "O(T·w·d)",
        "O(w·d)",
    ),
)
