"""State spaces: selective (Mamba), time-invariant (S4 and its relatives), long convolutions."""

from subquad.table.row import Row
from subquad.table.spec import Recurrence

ROWS = (
    Row(
        "mamba",
        Recurrence("selective", "token_element"),
        "Gu and Dao 2023, arXiv:2312.00752",
        "Δ_t, B_t, C_t from the token; A fixed",
    ),
    Row(
        "mamba2",
        Recurrence(decay="token_head"),
        "Dao and Gu 2024, arXiv:2405.21060",
        "γ_t = exp(Δ_t A); k = B_t shared by heads, v = Δ_t x_t",
        read_="o_t = S_tᵀ C_t + D x_t",
    ),
    Row(
        "lssl",
        Recurrence("invariant", "fixed_element"),
        "Gu et al. 2021, arXiv:2110.13985",
        "dense A, HiPPO start",
        read_="y_t = C h_t + D u_t",
        decode_="O(d·N²)",
    ),
    Row(
        "s4",
        Recurrence("invariant", "fixed_element"),
        "Gu et al. 2022, arXiv:2111.00396",
        "A diagonal plus low rank, bilinear",
        read_="y_t = C h_t + D u_t",
    ),
    Row(
        "s4d",
        Recurrence("invariant", "fixed_element"),
        "Gu et al. 2022, arXiv:2206.11893",
        "A complex diagonal, zero-order hold",
    ),
    Row(
        "h3",
        Recurrence("invariant", "fixed_element"),
        "Fu et al. 2023, arXiv:2212.14052",
        "a shift SSM on k, a diagonal SSM on k vᵀ",
        read_="y = q ⊙ SSM_diag(SSM_shift(k) ⊙ v)",
        state_="2·d·N",
    ),
    Row(
        "hyena",
        Recurrence("invariant", "fixed_element"),
        "Poli et al. 2023, arXiv:2302.10866",
        "implicit filters as long as the sequence",
        "z = h ∗ (x₁ ⊙ v)",
        "y = x₀ ⊙ z",
        "T·d",
        "O(T·log T·d)",
        "O(T·d)",
        state_grows=True,
    ),
)
