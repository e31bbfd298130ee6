"""The examples run as they stand, and import nothing but public names."""

import ast
import importlib
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

from subquad.mixers import MIXERS
from subquad.table import ROWS

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.fixture(autouse=True)
def _leave_no_rows_behind() -> Iterator[None]:
    """An example may register a mixer; other tests must not meet it."""
    before = dict(MIXERS), dict(ROWS)
    yield
    for registry, entries in zip((MIXERS, ROWS), before):
        registry.clear()
        registry.update(entries)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs(example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [str(example)])
    runpy.run_path(str(example), run_name="__main__")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_it_imports_only_public_names(example: Path) -> None:
    for node in ast.walk(ast.parse(example.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("subquad"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert alias.name in module.__all__, f"{node.module}.{alias.name} is not public"


def test_there_is_one_for_each_thing_that_people_come_for() -> None:
    expected = {"layer", "lora", "own_row", "state_space", "streaming", "trainer"}
    assert {example.stem for example in EXAMPLES} == expected
