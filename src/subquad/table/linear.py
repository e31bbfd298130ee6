"""Linear attention: a feature map in place of the softmax, nothing forgotten."""

from subquad.table.row import Row
from subquad.table.spec import Recurrence

ROWS = (
    Row(
        "linear_attention",
        Recurrence(read_out="normalised"),
        "Katharopoulos et al. 2020, arXiv:2006.16236",
        "φ = elu + 1 (or relu, identity)",
        "S_t = S_{t-1} + φ(k_t) v_tᵀ",
        "o_t = S_tᵀ φ(q_t) / (z_t · φ(q_t)),  z_t = Σ φ(k_s)",
    ),
    Row(
        "performer",
        Recurrence(read_out="normalised"),
        "Choromanski et al. 2021, arXiv:2009.14794",
        "φ(x) = exp(Wx - |x|²/2)/√m, W orthogonal random",
        "S_t = S_{t-1} + φ(k_t) v_tᵀ",
        "o_t = S_tᵀ φ(q_t) / (z_t · φ(q_t)),  z_t = Σ φ(k_s)",
    ),
)
