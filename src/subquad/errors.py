"""Bad input is refused in one form: the argument, what came, what was expected, the fix."""

from __future__ import annotations

from collections.abc import Sequence


def fail(argument: str, got: object, expected: str, fix: str) -> ValueError:
    """The one form every complaint of the library takes."""
    return ValueError(f"{argument}: got {got}; expected {expected}. Fix: {fix}.")


def choose(argument: str, value: object, choices: Sequence[str]) -> None:
    """`value` must be one of `choices`."""
    if value not in choices:
        raise fail(argument, repr(value), f"one of {', '.join(choices)}", "pick one of these names")


def is_whole(x: object, least: int) -> bool:
    """Whether x is an int, and at least `least`. True, an int to Python, is none here."""
    return isinstance(x, int) and not isinstance(x, bool) and x >= least
