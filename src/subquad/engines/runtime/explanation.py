"""What an engine call runs and why, as an object that prints as a page."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_WATCHERS: list[list[Explanation]] = []


@dataclass(frozen=True)
class Explanation:
    """One call of an engine; `print` it.

    Attributes:
        recurrence, read: the formulas.
        form, impl: what runs, with chunks of `chunk` tokens in the chunked form.
        device: where.
        why: the reason for the choice.
        forms: all forms that exist for this recurrence.
        state_shape, state_bytes: of all sequences of the batch together.
        flops_per_token: floating-point operations of the forward pass for one token.
        note: what the caller must see to, if anything.
    """

    recurrence: str
    read: str
    form: str
    impl: str
    chunk: int | None
    device: str
    why: str
    forms: tuple[str, ...]
    state_shape: tuple[int, ...]
    state_bytes: int
    flops_per_token: int
    note: str = ""

    def __str__(self) -> str:
        note = [f"note        {self.note}"] if self.note else []
        chunk = "" if self.chunk is None else f", chunks of {self.chunk}"
        return "\n".join(
            [
                f"recurrence  {self.recurrence}",
                f"read        {self.read}",
                f"runs        {self.form} form{chunk}, impl {self.impl}, on {self.device}",
                f"why         {self.why}",
                f"forms       {', '.join(self.forms)}",
                f"state       {list(self.state_shape)}, {self.state_bytes:,} bytes",
                f"work        {self.flops_per_token:,} floating-point operations a token",
                *note,
            ]
        )


@contextmanager
def watch() -> Iterator[list[Explanation]]:
    """Collect what the engines run inside, for instance in a whole model:

        with subquad.watch() as calls:
            model(ids)
        print(calls[0])

    The list fills in the order of the calls.
    """
    calls: list[Explanation] = []
    _WATCHERS.append(calls)
    try:
        yield calls
    finally:
        _WATCHERS[:] = [others for others in _WATCHERS if others is not calls]


def watched() -> bool:
    """Whether a `watch()` is open."""
    return bool(_WATCHERS)


def tell(explanation: Explanation) -> None:
    """Add a call's explanation to every open `watch()`."""
    for calls in _WATCHERS:
        calls.append(explanation)
