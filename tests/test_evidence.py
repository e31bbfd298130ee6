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
    import experiments

    small = dataclasses.replace(
        experiments.EXPERIMENTS["parity"],
        rows=("deltanet:allow_negative_eigenvalues", "deltanet"),
        sizes={"small": experiments.Size((tiny,), note="Tiny.")},
        claims=(
            ("the one learns", lambda v: experiments.at(v, "deltanet", 0) > 2),
            ("the other is there", lambda v: experiments.at(v, small.rows[0], 0) > -2),
        ),
    )
    monkeypatch.setitem(experiments.EXPERIMENTS, "parity", small)

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
    assert all(one["environment"]["device"] == "cpu" for one in whole["runs"])
    drawing = (tmp_path / "out" / "parity-small-3-steps.svg").read_bytes()
    run("--report")
    assert drawing == (tmp_path / "out" / "parity-small-3-steps.svg").read_bytes()
    page = (tmp_path / "out" / "parity-small-3-steps.md").read_text()
    assert "up to 3 steps of 2" in page and "Tiny.\n" in page
    assert "seed by seed" not in page and "the one learns: **does not hold**" in page
    assert drawing.startswith(b"<?xml")


class FakeRun:
    """What `best_of` reads of a run."""

    def __init__(self, lr, *values, failure=""):
        test = dataclasses.make_dataclass("Test", ["name", "value"])
        self.job = dataclasses.make_dataclass("Job", ["label", "lr"])("gla", lr)
        self.row = dataclasses.make_dataclass("Row", ["tests", "failure"])(
            [test(f"t{i}", value) for i, value in enumerate(values)], failure
        )


def test_the_best_rate_counts_and_the_median_of_its_seeds(evidence):
    import evidence_report

    first = [FakeRun(1e-3, 0.9, 0.1), FakeRun(1e-3, 0.7, 0.3), FakeRun(1e-3, 0.8, None)]
    second = [FakeRun(1e-2, 1.0, 1.0), FakeRun(1e-2, 0.1, 0.0), FakeRun(1e-2, 0.2, 0.0)]
    values, chosen = evidence_report.best_of(first + second)
    assert values == {"gla": {"t0": 0.8, "t1": 0.2}} and chosen == {"gla": first}
    further = [FakeRun(1e-3, 0.999, 0.2), FakeRun(1e-2, 0.996, 0.9)]  # equally good as trained
    assert evidence_report.best_of(further)[0]["gla"]["t1"] == 0.9
    lucky = [FakeRun(1e-2, 0.95, 0.5)]  # of its rate the clock left one seed
    assert evidence_report.best_of(first + lucky)[1] == {"gla": first}
    lucky += [FakeRun(1e-2, None, None, failure="no number")] * 2  # and at another two diverged
    assert evidence_report.best_of(first + lucky)[1] == {"gla": first}


def test_a_page_tells_what_the_median_of_seeds_hides(evidence):
    from evidence_report import _by_seed

    chosen = {"gla": [0.99, 0.5742], "mamba": [0.9, None], "s4d": [0.7]}
    record = {"chosen": {label: {"values": values} for label, values in chosen.items()}}
    said = "As trained, seed by seed: `gla` 0.990, 0.574; `mamba` 0.900, diverged."
    assert _by_seed(record) == ["", said]
    assert _by_seed({"chosen": {"s4d": {"values": [0.7]}}}) == []


def test_what_the_clock_cut_off_early_does_not_count(evidence):
    from types import SimpleNamespace as Some

    from evidence_report import Run, counts

    def run(steps, cut):
        plan = Some(recipe=Some(steps=300))
        return Run(None, Some(plan=plan, rows=[Some(steps=steps, cut=cut)]))

    assert counts(run(100, True), 1 / 3) and not counts(run(99, True), 1 / 3)
    assert counts(run(10, False), 1 / 3) and counts(run(1, True), 0.0)  # solved; as planned


def test_values_of_a_row_rise_with_its_width(evidence):
    import experiments

    values = {f"{row} d={d}": {"t": d / 100} for row in ("gla", "mamba") for d in (64, 128, 32)}
    assert experiments.widths(values, "gla") == [0.32, 0.64, 1.28]
    with pytest.raises(KeyError):
        experiments.widths(values, "s4d")


def test_a_row_of_which_a_width_is_missing_is_not_judged_by_the_others(evidence):
    import evidence_report

    rows = ("softmax_attention", *evidence_report.EXPERIMENTS["mqar"].rows)
    values = {f"{row} d={d}": {"t": d / 100} for row in rows for d in (32, 64, 128)}
    mqar = evidence_report.EXPERIMENTS["mqar"]
    assert [v["holds"] for v in evidence_report.verdicts(mqar, values)] == [True, True]
    del values["gla d=32"]
    judged = evidence_report.verdicts(mqar, values, ["gla d=32"])
    assert [v["holds"] for v in judged] == [True, None]


def test_jobs_run_side_by_side_until_the_deadline(evidence, monkeypatch, tmp_path, capsys):
    work = tmp_path / "work"

    def run(*words: str) -> str:
        given = ["--work", str(work), "--out", str(tmp_path / "out"), "--steps", "2", *words]
        monkeypatch.setattr(sys, "argv", ["evidence.py", "parity@cpu", *given])
        evidence.main()
        return capsys.readouterr().out

    asked = ("--only", "retnet,gla", "--cpu-jobs", "2")
    told = run(*asked, "--deadline", "1", "--reserve", "0")
    assert "2 of 2 are not finished" in told  # too little time to begin
    told = run(*asked, "--deadline", "600")
    assert "0 of 2 are not finished" in told and told.count("2 steps of") == 2
    assert len(list(work.glob("parity-small-2-steps/*/*/result.json"))) == 2
    assert "0 of 0" in run(*asked)  # nothing runs again
    with pytest.raises(SystemExit, match=r"--only: got 'glaa'; expected some of deltanet:allow"):
        run("--only", "glaa", "--cpu-jobs", "1")
    page = run("--report")
    assert "Not run, or cut off too early to count: deltanet" in page and "| `gla` |" in page


def test_a_row_is_asked_for_at_every_width_or_at_one(evidence):
    import evidence_jobs

    jobs = list(evidence_jobs.Part.parse("mqar:medium", "", "cpu", lrs=(0.01,)).jobs())
    asked = evidence.chosen(jobs, "gla, mamba d=32")
    assert sorted(job.label for job in asked) == ["gla d=128", "gla d=32", "gla d=64", "mamba d=32"]
    assert evidence.chosen(jobs, "") == jobs


def test_what_cannot_be_run_is_refused_by_name(evidence, monkeypatch, tmp_path, capsys):
    import evidence_jobs

    part = evidence_jobs.Part.parse("mqar:medium@cpu", "small", "auto")
    assert (part.name, part.size, part.device) == ("mqar", "medium", "cpu")
    assert len({job.place for job in part.jobs()}) == len(list(part.jobs())) == 60
    with pytest.raises(ValueError, match=r"got 'mqr'; expected one of selective_copying"):
        evidence_jobs.Part.parse("mqr", "small", "auto")
    for words, told in (
        ("mqr", "got 'mqr'; expected one of selective_copying"),
        ("hippo:huge", "hippo has sizes"),
        ("mqar --lrs fast", "argument --lrs: invalid rates value: 'fast'"),
        ("mqar --steps 0", "argument --steps: invalid steps value: '0'"),
        ("mqar --seeds 0,x", "argument --seeds: invalid seeds value: '0,x'"),
    ):
        out = ["--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["evidence.py", *words.split(), *out])
        with pytest.raises(SystemExit) as refusal:
            evidence.main()
        assert told in f"{refusal.value}{capsys.readouterr().err}"
    with pytest.raises(ValueError, match=r"mqar has sizes \['small', .*\], not 'long'"):
        evidence_jobs.Part.parse("mqar:long", "small", "auto")


def test_every_size_of_every_experiment_can_be_planned(evidence):
    """No experiment fails after hours for a setting that could not be."""
    import experiments

    from subquad.arena.task.results import TaskArenaConfig

    for name, experiment in experiments.EXPERIMENTS.items():
        for size in experiment.sizes.values():
            for settings in size.settings:
                config = TaskArenaConfig(task=name, rows=experiment.rows, **settings)
                assert config.recipe().steps > 0


def test_growth_is_drawn_from_its_points(evidence, monkeypatch, tmp_path):
    import evidence_scaling

    results = FOLDER.parent / "docs" / "results"
    record = json.loads((results / "scaling-cpu.json").read_text(encoding="utf-8"))
    (tmp_path / "scaling-cpu.json").write_text(json.dumps(record), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["x", "cpu", "--folder", str(tmp_path)])
    evidence_scaling.main()
    drawn = (tmp_path / "scaling-cpu.svg").read_bytes()
    assert drawn.startswith(b"<?xml") and drawn.count(b"<use ") > 10 * 4 * 3  # points are markers
    monkeypatch.setattr(sys, "argv", ["x", "tpu", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit, match="tpu: there is no"):
        evidence_scaling.main()
