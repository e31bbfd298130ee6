"""Published layers, one file each: projections, gates and norms around one call of the engine."""

from subquad.mixers.base import Mixer, State

_CLASSES: tuple[type[Mixer], ...] = ()

MIXERS: dict[str, type[Mixer]] = {cls.row: cls for cls in _CLASSES}
"""The mixers by the name of their row in the table."""

__all__ = ["MIXERS", "Mixer", "State", *(cls.__name__ for cls in _CLASSES)]
