"""The synthetic tasks by which the field tells its models apart.

    from subquad import tasks

    task = tasks.get("mqar", pairs=4)           # or preset="published"
    batch = task.sample(32, seed=0, step=0)     # the same wherever and whenever it is drawn
    batch.inputs, batch.labels                  # [32,64] each; labels are -100 where nothing is due

`subquad arena --list-tasks` shows what each measures; `subquad arena --task mqar` trains rows on
one, equally.
"""

import dataclasses
import importlib
from typing import Any

from subquad.errors import choose, fail
from subquad.labels import IGNORE
from subquad.tasks.base import Batch, Recipe, Task
from subquad.tasks.copying import Copying, SelectiveCopying
from subquad.tasks.digits import Digits
from subquad.tasks.hippo import Hippo
from subquad.tasks.listops import ListOps
from subquad.tasks.recall import MQAR, AssociativeRecall, InductionHeads
from subquad.tasks.stories import Stories
from subquad.tasks.tracking import Parity, WordProblem

_CLASSES: tuple[type[Task], ...] = (
    SelectiveCopying,
    Copying,
    InductionHeads,
    AssociativeRecall,
    MQAR,
    Parity,
    WordProblem,
    Stories,
    ListOps,
    Digits,
    Hippo,
)

TASKS: dict[str, type[Task]] = {cls.name: cls for cls in _CLASSES}


def get(name: str, /, *, preset: str = "small", **settings: Any) -> Task:
    """A task by its name.

    Args:
        name: one of `TASKS`.
        preset: where the settings begin: "small" (trains in about two minutes on two cores),
            "published", or another of the task's own.
        settings: the task's fields, over the preset's.

    Raises:
        ValueError: an unknown name, preset or setting, or settings that cannot be.
    """
    choose("name", name, tuple(TASKS))
    cls = TASKS[name]
    choose("preset", preset, tuple(cls.presets))
    known = tuple(field.name for field in dataclasses.fields(cls))
    for setting in settings:
        if setting not in known:
            raise fail(
                setting, "no such setting", f"one of {', '.join(known)} for {name}", "rename it"
            )
    return cls(**{**cls.presets[preset], **settings})


# These need transformers, which to draw a batch does not.
_LAZY = {"TaskModel": "model", "Score": "scoring", "score": "scoring"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'subquad.tasks' has no attribute {name!r}; it has {__all__}")
    return getattr(importlib.import_module(f"subquad.tasks.{_LAZY[name]}"), name)


__all__ = [
    "IGNORE",
    "MQAR",
    "TASKS",
    "AssociativeRecall",
    "Batch",
    "Copying",
    "Digits",
    "Hippo",
    "InductionHeads",
    "ListOps",
    "Parity",
    "Recipe",
    "Score",
    "SelectiveCopying",
    "Stories",
    "Task",
    "TaskModel",
    "WordProblem",
    "get",
    "score",
]
