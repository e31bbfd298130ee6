"""benchmarks/evidence.py: runs what is missing, judges only what was run, by the numbers."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def evidence(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("evidence", FOLDER / "evidence.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "evidence", module)
    spec.loader.exec_module(module)
    return module


def test_an_experiment_is_run_in_parts_and_judged_when_its_rows_are_there(
    evidence, monkeypatch, tmp_path
):
    tiny = {"parameters": 30_000, "batch_size": 2, "test_sequences": 4, "eval_every": 2}
    small = dataclasses.replace(
        evidence.EXPERIMENTS["parity"],
        rows=("deltanet:allow_negative_eigenvalues", "deltanet"),
        sizes={"small": evidence.Size((tiny,), note="Tiny.")},
        claims=(
            ("the one learns", lambda v: evidence.at(v, "deltanet", 0) > 2),
            ("the other is there", lambda v: evidence.at(v, small.rows[0], 0) > -2),
        ),
    )
    monkeypatch.setitem(evidence.EXPERIMENTS, "parity", small)

    def run(*words: str) -> dict:
        places = ("--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"))
        monkeypatch.setattr(sys, "argv", ["evidence.py", "parity", "--steps", "3", *places, *words])
        evidence.main()
        return json.loads((tmp_path / "out" / "parity-small-3-steps.json").read_text())

    part = run("--only", "deltanet:allow_negative_eigenvalues", "--device", "cpu")
    assert part["missing"] == ["deltanet"]
    assert [claim["holds"] for claim in part["verdict"]] == [None, True]
    whole = run("--device", "cpu")
    assert whole["missing"] == [] and len(whole["runs"]) == 2
    assert [claim["holds"] for claim in whole["verdict"]] == [False, True]
    assert whole["runs"][0] == part["runs"][0]  # read back, not run again
    assert whole["runs"][0]["config"]["steps"] == 3
    page = (tmp_path / "out" / "parity-small-3-steps.md").read_text()
    assert "Tiny. 3 steps only." in page and "the one learns: **does not hold**" in page
    assert (tmp_path / "out" / "parity-small-3-steps.svg").exists()


def test_the_best_rate_counts_and_the_median_of_its_seeds(evidence):
    class Result:
        def __init__(self, *values):
            self.tests = [
                type("T", (), {"name": f"t{i}", "value": v}) for i, v in enumerate(values)
            ]
            self.value = values[0]

    runs = {1e-3: [(0.9, 0.1), (0.7, 0.3), (0.8, None)], 1e-2: [(1.0, 1.0), (0.1, 0.0), (0.2, 0.0)]}
    found = [
        ("gla", lr, seed, Result(*values), None)
        for lr, seeds in runs.items()
        for seed, values in enumerate(seeds)
    ]
    values, chosen = evidence.best_of(found)
    assert values == {"gla": {"t0": 0.8, "t1": 0.2}}
    assert chosen["gla"].value == 0.9


def test_every_size_of_every_experiment_can_be_planned(evidence):
    """No experiment fails after hours for a setting that could not be."""
    from subquad.arena.task_results import TaskArenaConfig

    for name, experiment in evidence.EXPERIMENTS.items():
        for size in experiment.sizes.values():
            for settings in size.settings:
                config = TaskArenaConfig(task=name, rows=experiment.rows, **settings)
                assert config.recipe().steps > 0
