"""Bad input is refused in one form: the argument, what came, what was expected, the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def fail(argument: str, got: object, expected: str, fix: str) -> ValueError:
    """The one form every complaint of the library takes."""
    return ValueError(f"{argument}: got {got}; expected {expected}. Fix: {fix}.")


def choose(argument: str, value: object, choices: Sequence[str]) -> None:
    """`value` must be one of `choices`."""
    if value not in choices:
        close = nearest(value, choices)
        fix = f"perhaps {' or '.join(map(repr, close))}" if close else "pick one of these names"
        raise fail(argument, repr(value), f"one of {', '.join(choices)}", fix)


def pick(argument: str, value: str, choices: Iterable[str]) -> str:
    """The choice that `value` means, whatever its case and hyphens: `Mamba-2` is `mamba2`."""
    choices = tuple(choices)
    meant = [] if value in choices else [c for c in choices if _letters(c) == _letters(value)]
    if len(meant) == 1:
        return meant[0]
    choose(argument, value, choices)
    return value


def nearest(value: object, choices: Iterable[str]) -> list[str]:
    """Up to three choices that `value` may be a misspelling of, the likeliest first."""
    by_letters = {_letters(choice): choice for choice in choices}
    found = difflib.get_close_matches(_letters(str(value)), by_letters, n=3)
    return [by_letters[letters] for letters in found]


def is_whole(x: object, least: int) -> bool:
    """Whether x is an int, and at least `least`. True, an int to Python, is none here."""
    return isinstance(x, int) and not isinstance(x, bool) and x >= least


def _letters(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "").replace(" ", "")
