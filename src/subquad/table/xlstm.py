"""xLSTM: exponential gates, with a matrix for a memory or a vector."""

from subquad.table.row import Row
from subquad.table.spec import Recurrence

ROWS = (
    Row(
        "mlstm",
        Recurrence(decay="token_head", read_out="own"),
        "Beck et al. 2024, arXiv:2405.04517",
        "exponential input gate, stabilised by a running maximum",
        "S_t = f_t S_{t-1} + i_t k_t v_tᵀ,  n_t = f_t n_{t-1} + i_t k_t",
        "o_t = S_tᵀ q_t / max(|n_t · q_t|, 1)",
        "H·K·(V+1) + H",
    ),
    Row(
        "slstm",
        Recurrence("nonlinear"),
        "Beck et al. 2024, arXiv:2405.04517",
        "exponential gates that see h_{t-1}",
        "c_t = f_t c_{t-1} + i_t z_t,  n_t = f_t n_{t-1} + i_t",
        "h_t = σ(o_t) c_t / n_t",
        "4·d",
    ),
)
