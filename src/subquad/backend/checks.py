"""A switch for checks of values, which are too dear to be always on."""

from __future__ import annotations

import os
from types import TracebackType

_ON = os.environ.get("SUBQUAD_CHECKS", "0").lower() in ("1", "true", "on", "yes")


class checks:
    """Have engines look at the values they are given, for good or within a `with` block.

        with subquad.checks(True):          # or SUBQUAD_CHECKS=1 in the environment
            model(ids)

    `linear_recurrence` then refuses NaN and infinity, decays above 1, and keys so long that the
    delta rule multiplies what it should erase: the ways in which a layer silently returns 1e12. On
    a GPU each call waits for its values. Off by default.

    Args:
        enabled: True or False.
    """

    def __init__(self, enabled: bool) -> None:
        global _ON
        self._before, _ON = _ON, bool(enabled)

    def __enter__(self) -> checks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        global _ON
        _ON = self._before


def are_checks_on() -> bool:
    return _ON
