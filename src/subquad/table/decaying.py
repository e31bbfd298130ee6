"""Fast weights that forget: a decay a head, a key channel, a slot or a value channel."""

from subquad.table.row import Row
from subquad.table.spec import Recurrence

ROWS = (
    Row(
        "retnet",
        Recurrence(decay="fixed_head"),
        "Sun et al. 2023, arXiv:2307.08621",
        "rotary positions, γ_h = 1 - 2^{-5-h}",
    ),
    Row(
        "gated_retention",
        Recurrence(decay="token_head"),
        "Sun et al. 2024, arXiv:2405.05254",
        "rotary positions, log γ_t = logsigmoid(W x_t)/16",
    ),
    Row(
        "lightning_attention",
        Recurrence(decay="fixed_head"),
        "Qin et al. 2024, arXiv:2405.17381",
        "silu on q, k, v; slopes by head and layer",
    ),
    Row(
        "gla",
        Recurrence(decay="token_key"),
        "Yang et al. 2024, arXiv:2312.06635",
        "α_t = σ(W₂ W₁ x_t)^{1/16}",
    ),
    Row(
        "hgrn2",
        Recurrence(decay="token_key"),
        "Qin et al. 2024, arXiv:2404.07904",
        "k_t = 1 - α_t, lower bounds on α by layer",
    ),
    Row(
        "dfw",
        Recurrence(decay="token_key_value"),
        "Mao 2022, arXiv:2210.04243",
        "α_t = σ(.), β_t = σ(.)",
    ),
    Row(
        "gateloop",
        Recurrence(decay="token_key"),
        "Katsch 2023, arXiv:2311.01927",
        "complex α_t: a real decay and a rotation of q, k",
        read_="o_t = Re(S_tᵀ q_t)",
        state_="2·H·K·V",
    ),
    Row(
        "gated_rfa",
        Recurrence(decay="token_head", read_out="normalised"),
        "Peng et al. 2021, arXiv:2103.02143",
        "φ(x) = [sin Wx, cos Wx]/√D",
        "S_t = g_t S_{t-1} + (1 - g_t) φ(k_t) v_tᵀ",
        "o_t = S_tᵀ φ(q_t) / (z_t · φ(q_t))",
    ),
    Row(
        "abc",
        Recurrence(decay="token_value", read_out="own"),
        "Peng et al. 2022, arXiv:2110.02488",
        "m slots written with weights e^{s_t}/Σ e^s",
        "K̃_t, Ṽ_t: m slots, running averages of k and v",
        "o_t = Ṽ_tᵀ softmax(K̃_t q_t)",
        "2·H·m·K",
        "O(T·H·m·K)",
        "O(H·m·K)",
        then=(Recurrence(decay="token_key", read_out="own"),),
    ),
    Row(
        "gsa",
        Recurrence(decay="token_value", read_out="own"),
        "Zhang et al. 2024, arXiv:2409.07146",
        "m slots, each with a forget gate α_t",
        "K̃_t = diag(α_t) K̃_{t-1} + (1-α_t) k_tᵀ, likewise Ṽ_t",
        "o_t = Ṽ_tᵀ softmax(K̃_t q_t)",
        "2·H·m·K",
        "O(T·H·m·K)",
        "O(H·m·K)",
        then=(Recurrence(decay="token_key", read_out="own"),),
    ),
)
