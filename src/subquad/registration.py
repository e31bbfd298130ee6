"""Our model class is known to transformers as soon as anybody there could ask for it.

`AutoModelForCausalLM.from_pretrained` looks a folder's model_type up in tables that are filled by
`subquad.models`. To import that with `import subquad` would cost seconds that most never need, so
it waits until transformers' own tables are imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_TABLES = "transformers.models.auto.configuration_auto"  # the first of them to be imported


class _Finder(MetaPathFinder):
    """Finds nothing itself; sees that the tables are imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _TABLES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Loads a module as its own loader does, then registers our class."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        importlib.import_module("subquad.models")


def register_when_asked() -> None:
    """Now, if transformers' tables are there already; else with them."""
    if _TABLES in sys.modules:
        importlib.import_module("subquad.models")
    else:
        sys.meta_path.insert(0, _Finder())
