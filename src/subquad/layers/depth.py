"""Where a layer stands in its model: some rows start, or decay, by it."""

from __future__ import annotations

from dataclasses import dataclass

from subquad.errors import fail


@dataclass(frozen=True)
class Depth:
    """Where a layer stands in its model: layer `index` of `total`, from 0."""

    index: int
    total: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.total:
            raise fail(
                "depth", f"layer {self.index} of {self.total}", "0 <= index < total", "count"
            )

    @property
    def fraction(self) -> float:
        """0 for the first layer, 1 for the last."""
        return self.index / max(1, self.total - 1)
