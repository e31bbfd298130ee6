"""One switch for all machinery that makes the same results sooner."""

from __future__ import annotations

import os
from types import TracebackType

_ON = os.environ.get("SUBQUAD_FAST_PATHS", "1").lower() not in ("0", "false", "off", "no")


class fast_paths:
    """Switch the library's machinery on or off, for good or within a `with` block.

        subquad.fast_paths(False)           # from here on; likewise SUBQUAD_FAST_PATHS=0
        with subquad.fast_paths(False):     # in here
            model.generate(ids)

    Off, every layer is called as the module that it is and every operation goes through PyTorch's
    dispatcher: no trace of decoded tokens and no threads of our own on a CPU, no CUDA graphs and no
    replayed launches on a GPU, no caches that grow in place. The kernels are the same, so the
    results are, up to the rounding of sums in another order. To look for a fault, or to profile
    what really runs.

    Args:
        enabled: True or False.
    """

    def __init__(self, enabled: bool) -> None:
        global _ON
        self._before, _ON = _ON, bool(enabled)

    def __enter__(self) -> fast_paths:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        global _ON
        _ON = self._before


def are_fast_paths_on() -> bool:
    """Asked before any such machinery is used."""
    return _ON
