"""The table: every published row, as the few things in which it differs.

Each row is a `Recurrence` and what cannot be derived from it: how keys and queries are made
(`features`), a formula where the derived one would not be the paper's, and the paper. Forms, state
size, complexities and time invariance follow from the spec. That a row is listed does not mean that
it runs yet: a row runs once a mixer of its name exists (`subquad table` says which do).

Letters: T tokens, H heads, K key size, V value size, d model width, N state size, w window.
"""

from __future__ import annotations

from dataclasses import dataclass

from subquad.recurrence.spec import Recurrence


@dataclass(frozen=True)
class Row:
    """One published model. `write_` and `read_` override the derived formulas."""

    name: str
    recurrence: Recurrence
    paper: str
    features: str = ""
    write_: str = ""
    read_: str = ""
    state_: str = ""
    train_: str = ""
    decode_: str = ""

    @property
    def engine(self) -> str:
        return self.recurrence.engine

    @property
    def write(self) -> str:
        """The recurrence as a formula."""
        return self.write_ or self.recurrence.write

    @property
    def read(self) -> str:
        """The read-out as a formula."""
        return self.read_ or self.recurrence.read

    @property
    def state(self) -> str:
        """Numbers kept for one sequence and layer."""
        if self.state_:
            return self.state_
        if self.engine == "matrix":
            return "H·K·(V+1)" if self.recurrence.read_out == "normalised" else "H·K·V"
        return "d·N"

    @property
    def train(self) -> str:
        """Complexity of one layer over T tokens, all at once."""
        if self.train_:
            return self.train_
        return {
            "matrix": "O(T·H·K·V)",
            "diagonal": "O(T·d·N)",
            "invariant": "O(T·d·(N + log T))",
            "attention": "O(T²·d)",
            "nonlinear": "O(T·d²), sequential",
        }[self.engine]

    @property
    def decode(self) -> str:
        """Complexity of one more token after T."""
        if self.decode_:
            return self.decode_
        return {
            "matrix": "O(H·K·V)",
            "diagonal": "O(d·N)",
            "invariant": "O(d·N)",
            "attention": "O(T·d)",
            "nonlinear": "O(d²)",
        }[self.engine]

    def as_dict(self, runs: bool) -> dict[str, object]:
        """The row for `subquad table --json`."""
        return {
            "name": self.name,
            "engine": self.engine,
            "recurrence": self.write,
            "read": self.read,
            "features": self.features,
            "state_size": self.state,
            "train_complexity": self.train,
            "decode_complexity": self.decode,
            "time_invariant": self.recurrence.time_invariant,
            "forms": list(self.recurrence.forms),
            "paper": self.paper,
            "runs": runs,
        }


def _matrix(decay: str = "none", erase: str = "none", read_out: str = "plain") -> Recurrence:
    return Recurrence("matrix", decay, erase, read_out)


_ATTENTION = Recurrence("attention")
_DIAGONAL = Recurrence("diagonal", "token_element")
_INVARIANT = Recurrence("invariant", "fixed_element")
_NONLINEAR = Recurrence("nonlinear")

_ROWS = (
    Row(
        "softmax_attention",
        _ATTENTION,
        "Vaswani et al. 2017, arXiv:1706.03762",
        "rotary positions, grouped heads",
        "keeps every k_t, v_t",
        "o_t = Σ_{s≤t} softmax_s(k_s · q_t / √K) v_s",
        "2·T·Hk·K",
    ),
    Row(
        "sliding_window_attention",
        _ATTENTION,
        "Beltagy et al. 2020, arXiv:2004.05150",
        "rotary positions, grouped heads",
        "keeps the last w of k_t, v_t",
        "o_t = Σ_{t-w<s≤t} softmax_s(k_s · q_t / √K) v_s",
        "2·w·Hk·K",
        "O(T·w·d)",
        "O(w·d)",
    ),
    Row(
        "linear_attention",
        _matrix(read_out="normalised"),
        "Katharopoulos et al. 2020, arXiv:2006.16236",
        "φ = elu + 1 (or relu, identity)",
        "S_t = S_{t-1} + φ(k_t) v_tᵀ",
        "o_t = S_tᵀ φ(q_t) / (z_t · φ(q_t)),  z_t = Σ φ(k_s)",
    ),
    Row(
        "performer",
        _matrix(read_out="normalised"),
        "Choromanski et al. 2021, arXiv:2009.14794",
        "φ(x) = exp(Wx - |x|²/2)/√m, W orthogonal random",
        "S_t = S_{t-1} + φ(k_t) v_tᵀ",
        "o_t = S_tᵀ φ(q_t) / (z_t · φ(q_t)),  z_t = Σ φ(k_s)",
    ),
    Row(
        "reformer",
        _ATTENTION,
        "Kitaev et al. 2020, arXiv:2001.04451",
        "shared keys and queries, locality-sensitive hashing",
        "keeps every k_t, v_t and its hash",
        "softmax over the keys in q_t's buckets",
        "2·T·d",
        "O(T·log T·d)",
        "O(T·d)",
    ),
    Row(
        "aft_full",
        _ATTENTION,
        "Zhai et al. 2021, arXiv:2105.14103",
        "learned position biases w",
        "keeps every k_t, v_t",
        "y_t = σ(q_t) ⊙ Σ_s e^{k_s + w_ts} v_s / Σ_s e^{k_s + w_ts}",
        "2·T·d",
    ),
    Row(
        "aft_local",
        _ATTENTION,
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
        Recurrence("diagonal", "none", read_out="own"),
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
        Recurrence("diagonal", "none", read_out="own"),
        "Zhai et al. 2021, arXiv:2105.14103",
        "position biases as a convolution, one for each head",
        "as aft_simple, and the last w of k_t, v_t",
        "y_t = σ(q_t) ⊙ (conv(e^k v, e^w - 1) + n_t) / (conv(e^k, e^w - 1) + z_t)",
        "2·w·d + 3·d",
        "O(T·w·d)",
        "O(w·d)",
    ),
    Row(
        "rwkv4",
        Recurrence("diagonal", "fixed_element", read_out="own"),
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
        _matrix("fixed_key", read_out="bonus"),
        "Peng et al. 2024, arXiv:2404.05892",
        "token shift",
    ),
    Row(
        "rwkv6",
        _matrix("token_key", read_out="bonus"),
        "Peng et al. 2024, arXiv:2404.05892",
        "data-dependent token shift",
    ),
    Row(
        "rwkv7",
        _matrix("token_key", "low_rank"),
        "Peng et al. 2025, arXiv:2503.14456",
        "a_t = -κ_t, b_t = κ_t ⊙ η_t, κ of norm 1",
    ),
    Row(
        "retnet",
        _matrix("fixed_head"),
        "Sun et al. 2023, arXiv:2307.08621",
        "rotary positions, γ_h = 1 - 2^{-5-h}",
    ),
    Row(
        "gated_retention",
        _matrix("token_head"),
        "Sun et al. 2024, arXiv:2405.05254",
        "rotary positions, log γ_t = logsigmoid(W x_t)/16",
    ),
    Row(
        "lightning_attention",
        _matrix("fixed_head"),
        "Qin et al. 2024, arXiv:2405.17381",
        "silu on q, k, v; slopes by head and layer",
    ),
    Row(
        "gla",
        _matrix("token_key"),
        "Yang et al. 2024, arXiv:2312.06635",
        "α_t = σ(W₂ W₁ x_t)^{1/16}",
    ),
    Row(
        "hgrn2",
        _matrix("token_key"),
        "Qin et al. 2024, arXiv:2404.07904",
        "k_t = 1 - α_t, lower bounds on α by layer",
    ),
    Row(
        "dfw",
        _matrix("token_key_value"),
        "Mao 2022, arXiv:2210.04243",
        "α_t = σ(.), β_t = σ(.)",
    ),
    Row(
        "gateloop",
        _matrix("token_key"),
        "Katsch 2023, arXiv:2311.01927",
        "complex α_t: a real decay and a rotation of q, k",
        read_="o_t = Re(S_tᵀ q_t)",
        state_="2·H·K·V",
    ),
    Row(
        "mamba",
        _DIAGONAL,
        "Gu and Dao 2023, arXiv:2312.00752",
        "Δ_t, B_t, C_t from the token; A fixed",
    ),
    Row(
        "mamba2",
        _matrix("token_head"),
        "Dao and Gu 2024, arXiv:2405.21060",
        "γ_t = exp(Δ_t A); k = B_t shared by heads, v = Δ_t x_t",
        read_="o_t = S_tᵀ C_t + D x_t",
    ),
    Row(
        "mlstm",
        _matrix("token_head", read_out="own"),
        "Beck et al. 2024, arXiv:2405.04517",
        "exponential input gate, stabilised by a running maximum",
        "S_t = f_t S_{t-1} + i_t k_t v_tᵀ,  n_t = f_t n_{t-1} + i_t k_t",
        "o_t = S_tᵀ q_t / max(|n_t · q_t|, 1)",
        "H·K·(V+1) + H",
    ),
    Row(
        "slstm",
        _NONLINEAR,
        "Beck et al. 2024, arXiv:2405.04517",
        "exponential gates that see h_{t-1}",
        "c_t = f_t c_{t-1} + i_t z_t,  n_t = f_t n_{t-1} + i_t",
        "h_t = σ(o_t) c_t / n_t",
        "4·d",
    ),
    Row(
        "deltanet",
        _matrix("none", "delta"),
        "Yang et al. 2024, arXiv:2406.06484",
        "k, q of norm 1; β in [0,1], or [0,2]",
    ),
    Row(
        "gated_deltanet",
        _matrix("token_head", "delta"),
        "Yang et al. 2025, arXiv:2412.06464",
        "k, q of norm 1; γ_t as in mamba2",
    ),
    Row(
        "kda",
        _matrix("token_key", "delta"),
        "Kimi Team 2025, arXiv:2510.26692",
        "k, q of norm 1; α_t a number a key channel",
    ),
    Row(
        "gated_rfa",
        _matrix("token_head", read_out="normalised"),
        "Peng et al. 2021, arXiv:2103.02143",
        "φ(x) = [sin Wx, cos Wx]/√D",
        "S_t = g_t S_{t-1} + (1 - g_t) φ(k_t) v_tᵀ",
        "o_t = S_tᵀ φ(q_t) / (z_t · φ(q_t))",
    ),
    Row(
        "abc",
        _matrix("token_key", read_out="own"),
        "Peng et al. 2022, arXiv:2110.02488",
        "m slots written with weights e^{s_t}/Σ e^s",
        "K̃_t, Ṽ_t: m slots, running averages of k and v",
        "o_t = Ṽ_tᵀ softmax(K̃_t q_t)",
        "2·H·m·K",
        "O(T·H·m·K)",
        "O(H·m·K)",
    ),
    Row(
        "gsa",
        _matrix("token_key", read_out="own"),
        "Zhang et al. 2024, arXiv:2409.07146",
        "m slots, each with a forget gate α_t",
        "K̃_t = diag(α_t) K̃_{t-1} + (1-α_t) k_tᵀ, likewise Ṽ_t",
        "o_t = Ṽ_tᵀ softmax(K̃_t q_t)",
        "2·H·m·K",
        "O(T·H·m·K)",
        "O(H·m·K)",
    ),
    Row(
        "lssl",
        _INVARIANT,
        "Gu et al. 2021, arXiv:2110.13985",
        "dense A, HiPPO start",
        read_="y_t = C h_t + D u_t",
        decode_="O(d·N²)",
    ),
    Row(
        "s4",
        _INVARIANT,
        "Gu et al. 2022, arXiv:2111.00396",
        "A diagonal plus low rank, bilinear",
        read_="y_t = C h_t + D u_t",
    ),
    Row(
        "s4d",
        _INVARIANT,
        "Gu et al. 2022, arXiv:2206.11893",
        "A complex diagonal, zero-order hold",
    ),
    Row(
        "h3",
        _INVARIANT,
        "Fu et al. 2023, arXiv:2212.14052",
        "a shift SSM on k, a diagonal SSM on k vᵀ",
        read_="y = q ⊙ SSM_diag(SSM_shift(k) ⊙ v)",
        state_="2·d·N",
    ),
    Row(
        "hyena",
        _INVARIANT,
        "Poli et al. 2023, arXiv:2302.10866",
        "implicit filters as long as the sequence",
        "z = h ∗ (x₁ ⊙ v)",
        "y = x₀ ⊙ z",
        "T·d",
        "O(T·log T·d)",
        "O(T·d)",
    ),
    Row(
        "lstm",
        _NONLINEAR,
        "Hochreiter and Schmidhuber 1997, doi:10.1162/neco.1997.9.8.1735",
        "gates that see h_{t-1}",
        "c_t = f_t c_{t-1} + i_t z_t",
        "h_t = o_t tanh(c_t)",
        "2·d",
    ),
)

ROWS: dict[str, Row] = {row.name: row for row in _ROWS}
