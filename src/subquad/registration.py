"""transformers' Auto classes know our models once subquad is imported, at no cost before that.

Importing `subquad.models` registers them as transformers' documentation asks for, but it loads
transformers. So only a promise is left in its table of configs: whoever looks up the model type
imports `subquad.models`, and what happens then is the ordinary registration. Nothing is imported
while transformers itself is being imported, in the middle of which our models could not be.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_TABLE = "transformers.models.auto.configuration_auto"
_TYPE, _CLASS = "subquad", "SubquadConfig"


class _Promise:
    """What transformers takes for the module of our config."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module("subquad.models"), name)


def promise(table: ModuleType) -> None:
    """Enter our config in transformers' table of those that it imports when they are asked for."""
    mapping = getattr(table, "CONFIG_MAPPING", None)
    names, modules = getattr(mapping, "_mapping", None), getattr(mapping, "_modules", None)
    if isinstance(names, dict) and isinstance(modules, dict):  # else `import subquad.models` does
        names.setdefault(_TYPE, _CLASS)
        modules.setdefault(_TYPE, _Promise())


class _WhenImported(MetaPathFinder):
    """Leaves the promise when the table is imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _TABLE:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_promise(module: ModuleType) -> None:
                run(module)
                promise(module)

            spec.loader.exec_module = run_and_promise  # type: ignore[method-assign]
        return spec


def register_when_asked() -> None:
    """Now, if the table is there; else when it is imported."""
    if _TABLE in sys.modules:
        promise(sys.modules[_TABLE])
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())
