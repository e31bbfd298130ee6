"""`Recurrence`: what kind of recurrence a row is. It validates itself and derives the rest.

A row of the table says five small things (which engine, what the decay depends on, whether it
erases, how it reads); time invariance, the forms that exist, the state's shape, the formulas and
the costs follow from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from subquad.errors import choose, fail

FORMS = {
    "matrix": ("recurrent", "chunked", "parallel"),
    "selective": ("recurrent", "scan"),
    "average": ("recurrent", "scan"),
    "invariant": ("recurrent", "convolution"),
    "attention": ("parallel",),
    "nonlinear": ("recurrent",),
}

# What the decay d_t depends on: nothing learned from the token (fixed_*), or the token (token_*);
# and its shape: a number a head, a key channel, a key and a value channel, an element of the state.
DECAYS = (
    "none",
    "fixed_head",
    "fixed_key",
    "fixed_element",
    "token_head",
    "token_key",
    "fixed_value",
    "token_value",
    "token_key_value",
    "token_element",
)
ERASES = ("none", "delta", "low_rank")
READS = ("plain", "normalised", "bonus", "own")

# As written to the left of the state; a decay along values stands to its right.
_DECAY_SYMBOL = {
    "none": "",
    "fixed_head": "γ ",
    "fixed_key": "diag(w) ",
    "fixed_element": "A ",
    "token_head": "γ_t ",
    "token_key": "diag(α_t) ",
    "fixed_value": "",
    "token_value": "",
    "token_key_value": "(α_t β_tᵀ) ⊙ ",
    "token_element": "exp(Δ_t A) ⊙ ",
}


@dataclass(frozen=True)
class Recurrence:
    """The kind of a causal mixer with a state.

    Args:
        engine: "matrix" (a state [K,V] a head), "selective" (element-wise, its gates from the
            token), "average" (running weighted averages), "invariant" (linear and time-invariant:
            an SSM or a long convolution), "attention", "nonlinear".
        decay: one of `DECAYS`.
        erase: "none", "delta" or "low_rank" (matrix engine only).
        read_out: "plain" S^T q; "normalised", divided by the same read of the summed keys, z [K]
            beside S; "bonus", before the write, the current token
            weighted by u; "own", the row's published read-out (see the row).

    Raises:
        ValueError: a field that is not a choice, or a combination that no engine computes.
    """

    engine: Literal["matrix", "selective", "average", "invariant", "attention", "nonlinear"] = (
        "matrix"
    )
    decay: str = "none"
    erase: str = "none"
    read_out: str = "plain"

    def __post_init__(self) -> None:
        if str(self.engine) == "diagonal":  # what "selective" was called first
            object.__setattr__(self, "engine", "selective")
        choose("engine", self.engine, tuple(FORMS))
        choose("decay", self.decay, DECAYS)
        choose("erase", self.erase, ERASES)
        choose("read_out", self.read_out, READS)
        if self.erase != "none" and self.engine != "matrix":
            raise fail("erase", self.erase, "'none' outside the matrix engine", "engine='matrix'")
        along_values = "value" in self.decay
        if along_values and (self.erase != "none" or self.read_out == "bonus"):
            got = f"{self.decay!r} with an erase or a bonus"
            raise fail("decay", got, "a decay a head or a key channel", "no published row has both")
        if self.erase != "none" and self.read_out == "bonus":
            raise fail("read_out", "'bonus' with an erase", "'plain'", "no published row has both")
        if self.engine == "invariant" and self.decay.startswith("token"):
            raise fail(
                "decay", self.decay, "a fixed decay", "engine='selective' for one from the token"
            )

    @property
    def time_invariant(self) -> bool:
        """Whether every token is treated alike, so that the map is a convolution."""
        fixed = not self.decay.startswith("token") and self.erase == "none"
        return fixed and self.engine in ("matrix", "selective", "average", "invariant")

    @property
    def forms(self) -> tuple[str, ...]:
        """The forms that exist: equal ways to compute the same thing."""
        return FORMS[self.engine]

    @property
    def linear_time(self) -> bool:
        """Whether T tokens cost O(T) and one more token O(1)."""
        return self.engine != "attention"

    def state_shape(self, H: int, K: int, V: int) -> tuple[int, ...]:
        """Of one sequence. Matrix: [H,K,V] (and z [H,K] where normalised); element-wise: [H*V
        channels, K numbers each]."""
        if self.engine == "matrix":
            return (H, K, V)
        if self.engine in ("selective", "average", "invariant"):
            return (H * V, K)
        raise fail(
            "engine", self.engine, "one with a state of constant size", "see the row's notes"
        )

    @property
    def write(self) -> str:
        """The recurrence as a formula."""
        d = _DECAY_SYMBOL[self.decay]
        S = {"fixed_value": "S_{t-1} diag(w)", "token_value": "S_{t-1} diag(β_t)"}.get(
            self.decay, "S_{t-1}"
        )
        if self.engine == "selective":
            return f"h_t = {d}h_{{t-1}} + Δ_t B_t x_t"
        if self.engine == "invariant":
            return "h_t = Ā h_{t-1} + B̄ u_t"
        if self.engine != "matrix":
            return ""
        if self.erase == "delta":
            return f"S_t = (I - β_t k_t k_tᵀ) {d}{S} + β_t k_t v_tᵀ"
        if self.erase == "low_rank":
            return f"S_t = ({d or 'I '}+ b_t a_tᵀ) {S} + k_t v_tᵀ"
        return f"S_t = {d}{S} + k_t v_tᵀ"

    @property
    def read(self) -> str:
        """The read-out as a formula."""
        if self.engine == "selective":
            return "y_t = C_t · h_t + D x_t"
        if self.engine == "invariant":
            return "y_t = 2 Re(C h_t) + D u_t"
        if self.engine != "matrix":
            return ""
        return {
            "plain": "o_t = S_tᵀ q_t",
            "normalised": "o_t = S_tᵀ q_t / (z_t · q_t),  z_t = Σ k",
            "bonus": "o_t = (S_{t-1} + (u ⊙ k_t) v_tᵀ)ᵀ q_t",
            "own": "o_t = S_tᵀ q_t, then as published",
        }[self.read_out]

    def flops_per_token(self, H: int, K: int, V: int, form: str, chunk: int, T: int) -> int:
        """Multiply-adds counted as two, of the matrix engine's forward pass for one token."""
        choose("form", form, FORMS["matrix"])
        touches = 2 if self.decay == "none" else 3  # write, read, decay
        erase = {"none": 0, "delta": 2, "low_rank": 2}[self.erase]
        if form == "recurrent":
            return 2 * H * K * V * (touches + erase)
        C = min(chunk, T)
        pairs = 1 + erase  # score matrices [C,C] and what they multiply
        return 2 * H * (pairs * C * (K + V) // 2 + (2 + erase) * K * V)
