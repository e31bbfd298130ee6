"""What every arena says of a model: its shape at the common size, and how fast it decodes."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """One row's model at the common size; `model` holds the keyword arguments of SubquadConfig."""

    row: str
    parameters: int
    embedding_parameters: int
    model: dict[str, Any]

    @property
    def description(self) -> str:
        """The model in one line, such as `4 layers of 144, MLP 368, num_heads 2`."""
        parts = [f"{self.model['num_hidden_layers']} layers of {self.model['hidden_size']}"]
        if "intermediate_size" in self.model:
            parts.append(f"MLP {self.model['intermediate_size']}")
        options = self.model.get("mixer_options", {}).get(self.row, {})
        return ", ".join([*parts, *(f"{name} {value}" for name, value in options.items())])


@dataclass(frozen=True)
class DecodeTiming:
    """Decoding one sequence (batch 1) with `context` tokens already in the cache."""

    context: int
    seconds_per_token: float  # median
    low: float  # quartiles of the same steps
    high: float
    prefill_seconds: float  # for all `context` tokens, from an empty cache
    cache_bytes: int

    @property
    def tokens_per_second(self) -> float:
        return 1.0 / self.seconds_per_token
