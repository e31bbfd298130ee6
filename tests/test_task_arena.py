"""Rows on tasks: equal shapes, tests at any length in flat memory, reports that stand alone."""

import html
import json
import math
import os
import re
import shutil
import tracemalloc
import weakref
from dataclasses import fields, replace
from functools import partial
from html.parser import HTMLParser

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from subquad import tasks
from subquad.arena import ArenaConfig, run_arena
from subquad.arena.drawing import short
from subquad.arena.entrants import Entrant, split_rows
from subquad.arena.scaling.report import scaling_table, write_scaling
from subquad.arena.scaling.results import QUANTITIES, ScalingConfig, fit_exponent
from subquad.arena.scaling.run import kept_for_backward, run_scaling
from subquad.arena.task.example import example
from subquad.arena.task.report import (
    findings,
    render_task_html,
    task_command_line,
    task_table,
    write_task_report,
)
from subquad.arena.task.results import TaskArenaConfig, TaskArenaResults
from subquad.arena.task.run import make_plan, run_task_arena
from subquad.cli import app
from subquad.cli.arena_body import task_config
from subquad.mixers import MIXERS
from subquad.tasks import Batch, TaskModel
from subquad.tasks.scoring import score
from subquad.train import TrainConfig, TrainingError
from subquad.train.task import train_task

SMALL = {
    "task": "induction_heads",
    "settings": {"length": 16, "test_lengths": (32, 64)},
    "rows": ("gla", "softmax_attention"),
    "parameters": 40_000,
    "steps": 12,
    "batch_size": 4,
    "eval_every": 6,
    "test_sequences": 16,
    "quadratic_limit": 40,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("arena") / "induction"
    return run_task_arena(TaskArenaConfig(**SMALL), out), out


# ---- models and scores


def model_of(task, row="gla", **keywords) -> TaskModel:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32, "mixer": row}
    return TaskModel(task, **shape | keywords)


@pytest.mark.parametrize("row", MIXERS)
@pytest.mark.parametrize("name", ["mqar", "hippo"])
def test_a_score_in_pieces_is_the_score_of_one_pass(row, name):
    task = tasks.get(name)
    model, batches = model_of(task, row), [task.sample(3), task.sample(2, step=1)]
    whole = score(model, task, batches, chunk=10_000)
    pieces = score(model, task, batches, chunk=7)
    assert whole.answers == pieces.answers and whole.sequences == pieces.sequences == 5
    assert pieces.loss == pytest.approx(whole.loss, rel=1e-4)
    assert pieces.value == pytest.approx(whole.value, abs=1e-4)


class Oracle(TaskModel):
    """Answers as it is told, to check what is counted."""

    def __init__(self, task, batch, said):
        super().__init__(task, hidden_size=32, num_hidden_layers=1, mixer="gla")
        self.labels, self.said = batch.labels.flatten(), said

    def answer(self, hidden, where):
        return self.said(self.labels[where])


def test_a_score_counts_answers_sequences_and_scales():
    parity = tasks.get("parity", shortest=8, longest=8)
    batch = parity.sample(6)

    def all_but_the_first(due):
        right = torch.nn.functional.one_hot(due, 3).float() * 5
        right[0] = right[0].roll(1)
        return right

    found = score(Oracle(parity, batch, all_but_the_first), parity, [batch])
    assert found.accuracy == 47 / 48 and found.whole == 5 / 6
    assert found.value == pytest.approx((47 / 48 - 0.5) / 0.5)
    assert found.error == pytest.approx(math.sqrt(47 / 48 / 48 / 48))
    hippo = tasks.get("hippo")
    signal = hippo.sample(4)
    off = score(Oracle(hippo, signal, lambda due: due * 0.9), hippo, [signal])
    assert off.value == pytest.approx(0.01) and math.isnan(off.whole) and off.error is None
    with pytest.raises(ValueError, match=r"batches: got none with anything asked"):
        empty = Batch(batch.inputs, torch.full_like(batch.labels, -100))
        score(model_of(parity), parity, [empty])
    with pytest.raises(ValueError, match=r"chunk: got 0"):
        score(model_of(parity), parity, [batch], chunk=0)


def test_long_sequences_are_scored_in_the_memory_of_short_ones():
    """What is alive at once, beside the tokens, does not grow with the length."""
    task = tasks.get("induction_heads")
    model, peaks = model_of(task, "mamba2"), []
    for length in (1 << 10, 1 << 13):
        batch = task.replace(length=length).sample(1)
        most = 0

        def watch(module, args, output):
            nonlocal most
            if output.past_key_values is not None:  # the last piece keeps nothing
                alive = output.last_hidden_state.nbytes + output.past_key_values.nbytes
                most = max(most, alive)

        hook = model.body.register_forward_hook(watch)
        tracemalloc.start()
        kept = score(model, task, [batch], chunk=256)
        python = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        hook.remove()
        assert kept.answers == 1
        peaks.append((most, python))
    assert peaks[0][0] == peaks[1][0] > 0
    assert peaks[1][1] < 2 * peaks[0][1] + (1 << 20)


@pytest.mark.slow
def test_a_million_tokens_leave_the_process_as_small_as_it_was():
    resource = pytest.importorskip("resource")
    task = tasks.get("induction_heads")
    model = model_of(task, "mamba2")
    score(model, task, [task.replace(length=1 << 14).sample(1)])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    score(model, task, [task.replace(length=1 << 20).sample(1)])
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert (
        grown < 100e6
    )  # the tokens and labels themselves: 16 bytes each, 17 MB, and as much again


def test_signals_have_no_unused_embedding():
    model = model_of(tasks.get("hippo"))
    used = tasks.get("hippo").sample(2)
    model.loss(used.inputs, *used.answers()).backward()
    assert all(p.grad is not None for p in model.parameters())


# ---- training


def config_for(steps=8, **settings) -> TrainConfig:
    shape = {"mixer": "gla", "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32}
    given = {"steps": steps, "batch_size": 4, "eval_every": 4, "device": "cpu", **settings}
    return TrainConfig(model=shape, **given)


def test_training_twice_ends_in_the_same_weights_and_learns():
    task = tasks.get("copying", symbols=2, memory=2, pause=3)
    first, second = (train_task(task, config_for(120, lr=1e-2, eval_every=40)) for _ in range(2))
    for a, b in zip(first.model.parameters(), second.model.parameters()):
        assert torch.equal(a, b)
    losses = [r["loss"] for r in first.history if r["kind"] == "train"]
    assert losses[-1] < 0.5 * losses[0]
    assert first.history[-1]["kind"] == "test" and not first.interrupted


def test_training_stops_at_the_first_solved_test_unless_told_not_to():
    task = tasks.get("copying", symbols=2, memory=1, pause=1)
    config = config_for(400, lr=1e-2, eval_every=20)
    early = train_task(task, config, sequences=64)
    assert early.solved == early.step < 400 and not early.interrupted
    assert early.history[-1]["value"] >= task.solved
    full = train_task(task, config_for(100, lr=1e-2, eval_every=20), until_solved=False)
    assert full.step == 100


def test_a_loss_that_is_no_number_is_an_error_in_training_and_a_result_in_the_arena(monkeypatch):
    monkeypatch.setattr(TaskModel, "loss", lambda self, *given: self.head.weight.sum() * math.nan)
    with pytest.raises(TrainingError, match=r"step 4: the loss is nan"):  # before the first test
        train_task(tasks.get("copying"), config_for())
    results = run_task_arena(TaskArenaConfig(**SMALL | {"rows": ("gla",)}))
    (row,) = results.rows
    assert row.failure and row.value is None and row.solved is None
    assert html.escape(row.failure, quote=False) in render_task_html(results).replace("&#39;", "'")
    json.dumps(results.to_json(), allow_nan=False)


def test_weights_that_are_no_numbers_are_not_tested(monkeypatch, tmp_path):
    """A test between two looks at the loss would have written a value that JSON has not."""

    def forget(self):  # all that it has learnt
        with torch.no_grad():
            self.head.weight.fill_(math.nan)
        return self.head.weight.sum()

    monkeypatch.setattr(TaskModel, "loss", lambda self, *given: forget(self))
    given = {"task": "hippo", "rows": ("gla",), "parameters": 40_000, "steps": 12, "batch_size": 2}
    config = TaskArenaConfig(**given, eval_every=1, test_sequences=8, device="cpu")
    (row,) = run_task_arena(config, tmp_path / "arena").rows
    assert row.values == [] and "step 1: the loss is nan" in row.failure


def test_a_step_that_failed_leaves_no_gradient_to_the_next():
    """As the capture of a step may, for want of memory: what it leaves was never computed."""
    import subquad.train.task.loop as module

    task, config = tasks.get("copying"), config_for()
    batch = task.sample(4)
    norms = []
    for fails in (False, True):
        torch.manual_seed(0)
        run = module.TaskRun(task, config, torch.device("cpu"), module.Clock(None), list)
        if fails:
            step, run.optimizer.step = run.optimizer.step, lambda: 1 / 0
            with pytest.raises(ZeroDivisionError):
                run._update(batch.inputs, *batch.answers())
            run.optimizer.step = step
        run._update(batch.inputs, *batch.answers())
        norms.append(run.sums[1].item())
    assert norms[0] == norms[1] > 0


def test_a_captured_step_ends_with_the_training(monkeypatch):
    """Its graph has the memory of a step, which the next row is to have."""
    import gc

    import subquad.train.task.loop as module

    graphs, real = [], module.TaskRun.__init__

    def capture(run, *given):
        real(run, *given)
        run.update = partial(run._update)  # of a graph, too, a method of the run is a part
        graphs.append(weakref.ref(run.update))

    monkeypatch.setattr(module.TaskRun, "__init__", capture)
    gc.disable()
    try:
        train_task(tasks.get("copying"), config_for(2), sequences=4)
        assert graphs[0]() is None
    finally:
        gc.enable()


def test_the_callers_autocast_keeps_no_weights_as_they_were():
    task, config = tasks.get("copying"), config_for(12, precision="bf16")

    def losses():
        found = train_task(task, config, sequences=4).history
        return [record["loss"] for record in found]

    with torch.autocast("cpu", torch.bfloat16):
        within = losses()
    assert within == losses()


def test_the_clock_ends_training_with_a_test_and_the_cosine_with_it(monkeypatch):
    from types import SimpleNamespace

    import subquad.train.task.run as module

    ticks = iter(range(1000))
    monkeypatch.setattr(
        module,
        "time",
        SimpleNamespace(monotonic=lambda: next(ticks) / 10, perf_counter=lambda: 0.0),
    )
    config = config_for(4000, eval_every=1000, lr=1e-2, warmup_steps=3)
    cut = train_task(tasks.get("copying"), config, sequences=4, seconds=10.0)
    assert cut.cut and not cut.interrupted and 20 < cut.step < 60
    assert cut.history[-1]["kind"] == "test" and cut.history[-1]["step"] == cut.step
    rates = [r["lr"] for r in cut.history if r["kind"] == "train"]
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.3e-2


def test_records_of_losses_are_means_since_the_last():
    seen = []
    config = config_for(25, eval_every=25)
    every = train_task(tasks.get("copying"), config, sequences=4, on_event=seen.append)
    assert [r["step"] for r in every.history if r["kind"] == "train"] == [10, 20, 25]
    assert seen == every.history
    assert all(0.5 < r["loss"] < 5 and r["grad_norm"] > 0 for r in seen if r["kind"] == "train")


@pytest.mark.gpu
@pytest.mark.parametrize("row", MIXERS)
def test_captured_steps_are_the_steps(row, monkeypatch):
    """With batches of one shape a graph is replayed; where their shapes differ nothing is."""
    from subquad.train.captured import Captured

    graphs = []
    real = Captured._capture

    def kept(self, tensors):
        real(self, tensors)
        graphs.append(self.graph)

    monkeypatch.setattr(Captured, "_capture", kept)
    shape = {"mixer": row, "hidden_size": 64, "num_hidden_layers": 2}
    config = TrainConfig(
        model=shape,
        steps=30,
        batch_size=8,
        lr=3e-3,
        eval_every=30,
        device="cuda",
        precision="float32",
    )
    task = tasks.get("selective_copying", noise=16)
    replayed = train_task(task, config, sequences=8)
    assert len(graphs) == 1 and graphs[0] is not None
    monkeypatch.setattr(Captured, "_capture", lambda self, tensors: None)
    eager = train_task(task, config, sequences=8)
    for a, b in zip(replayed.history, eager.history):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    for a, b in zip(replayed.model.parameters(), eager.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


# ---- the arena


def test_rows_are_equally_large_and_deep_or_equally_wide():
    config = TaskArenaConfig(task="mqar", rows=tuple(MIXERS))
    plan = make_plan(config)
    for row, shape in plan.shapes.items():
        assert abs(shape.parameters - plan.parameters) <= 0.05 * plan.parameters, row
        assert shape.model["num_hidden_layers"] == 2
    wide = make_plan(TaskArenaConfig(task="mqar", hidden_size=32, layers=1, rows=("gla", "mamba")))
    assert wide.parameters is None
    for shape in wide.shapes.values():
        assert (shape.model["hidden_size"], shape.model["num_hidden_layers"]) == (32, 1)


def test_commas_in_brackets_and_quotes_are_an_options():
    config = TaskArenaConfig(task="mqar", rows="gla, mamba2:state_size=16,mamba2:state_size=32")
    assert config.rows == ("gla", "mamba2:state_size=16", "mamba2:state_size=32")
    assert split_rows('a:x=[1,2],b:y="p,q"') == ("a:x=[1,2]", 'b:y="p,q"')


def test_blanks_around_the_parts_of_a_row_are_none_of_it():
    """The folder is named without them; a result must be found again by the row's label."""
    row = "gla : num_heads = 2"
    assert Entrant.parse(row) == Entrant("gla:num_heads=2", "gla", {"num_heads": 2})
    config = TaskArenaConfig(**SMALL | {"rows": (row, " gla"), "steps": 1})
    assert config.rows == ("gla:num_heads=2", "gla")
    assert run_task_arena(config).missing == []
    for Config in (partial(TaskArenaConfig, task="parity"), ArenaConfig):
        with pytest.raises(ValueError, match="none twice"):
            Config(rows=(row, "gla:num_heads=2"))


def test_rows_may_have_options():
    entrant = Entrant.parse("deltanet:allow_negative_eigenvalues:num_heads=2")
    assert entrant.options == {"allow_negative_eigenvalues": True, "num_heads": 2}
    assert "/" not in entrant.folder and ":" not in entrant.folder
    plan = make_plan(TaskArenaConfig(task="parity", rows=(entrant.label, "deltanet")))
    model = TaskModel(tasks.get("parity"), **plan.shapes[entrant.label].model)
    assert model.body.layers[0].mixer.beta_scale == 2.0
    with pytest.raises(ValueError, match=r"deltanet has no shape .* num_heads: got 'many'"):
        make_plan(TaskArenaConfig(task="parity", rows=("deltanet:num_heads=many",)))
    with pytest.raises(ValueError, match=r"mixer_options\['gla'\]: got 'colour'; expected one of"):
        TaskArenaConfig(task="parity", rows=("gla:colour=1",))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"task": "mqa"}, r"task: got 'mqa'"),
        ({"rows": ("gal",)}, r"rows: got 'gal'; expected one of"),
        ({"rows": ("gla", "gla")}, r"rows: got"),
        ({"rows": ()}, r"rows: got"),
        ({"settings": {"pears": 3}}, r"pears: got no such setting"),
        ({"steps": 0}, r"steps: got 0"),
        ({"lr": -1.0}, r"lr: got -1.0"),
        ({"lr": "fast"}, r"lr: got 'fast'"),
        ({"until_solved": 1}, r"until_solved: got 1"),
        ({"settings": {"solved": 0.5}}, r"solved: got no such setting"),
        ({"parameters": 1000, "hidden_size": 32}, r"hidden_size: got 32, with parameters"),
        ({"preset": "huge"}, r"preset: got 'huge'"),
        ({"settings": {"name": "parity"}}, r"name: got no such setting"),
        ({"settings": {"test_sizes": [[8, 4]]}}, r"length: got 8; expected an even number"),
        ({"task": "hippo", "settings": {"test_lengths": [4]}}, r"band: got 3.0; expected .* 2"),
    ],
)
def test_questions_that_make_no_sense_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        TaskArenaConfig(**{"task": "mqar", **given})


def test_results_hold_curves_tests_and_what_was_left_out(finished):
    results, out = finished
    assert not results.missing
    for row in results.rows:
        assert row.steps == 12 and row.value_steps == [6, 12] and row.loss_steps == [6, 10, 12]
        names = [test.name for test in row.tests]
        assert names == ["length 16", "length 32", "length 64"]
        assert row.state_bytes > 0
    gla, attention = results.rows
    assert all(test.value is not None for test in gla.tests)
    assert attention.tests[2].value is None and "quadratic_limit" in attention.tests[2].reason
    stored = json.loads((out / "gla" / "result.json").read_text())
    assert stored["shape"]["model"]["mixer"] == "gla"
    again = TaskArenaResults.from_json(json.loads(json.dumps(results.to_json())))
    assert again == results


def test_a_finished_arena_is_read_back_and_another_question_refused(finished, monkeypatch):
    results, out = finished
    monkeypatch.setattr("subquad.arena.task.run.train_task", None)  # nothing is trained again
    assert run_task_arena(TaskArenaConfig(**SMALL), out).rows == results.rows
    named = TaskArenaConfig(**SMALL | {"device": "auto"})  # the device that it was, by another name
    assert run_task_arena(named, out).rows == results.rows
    with pytest.raises(ValueError, match=r"arena begun otherwise \(seed was 0, now 1"):
        run_task_arena(TaskArenaConfig(**SMALL, seed=1), out)
    recipe = replace(results.plan.recipe, lr=0.5)  # as if the task's had been changed since
    monkeypatch.setattr(TaskArenaConfig, "recipe", lambda self: recipe)
    with pytest.raises(ValueError, match=r"arena begun otherwise \(recipe's lr was .*, now 0.5\)"):
        run_task_arena(TaskArenaConfig(**SMALL), out)


def test_a_stopped_arena_goes_on_with_the_row_it_was_at(tmp_path, monkeypatch):
    import subquad.arena.task.run as run

    real = run.train_task

    def stopped(task, config, **options):
        result = real(task, config, **options)
        result.stopped_by = 2 if "softmax" in config.model_keywords["mixer"] else None
        return result

    monkeypatch.setattr(run, "train_task", stopped)
    half = run_task_arena(TaskArenaConfig(**SMALL), tmp_path / "a")
    assert [row.label for row in half.rows] == ["gla"] and half.missing == ["softmax_attention"]
    assert "Not finished" in render_task_html(half)
    monkeypatch.setattr(run, "train_task", real)
    assert not run_task_arena(TaskArenaConfig(**SMALL), tmp_path / "a").missing


def test_a_stopped_training_goes_on_bit_for_bit(tmp_path):
    import signal

    task, config = tasks.get("copying"), config_for(30, eval_every=6)
    whole = train_task(task, config, sequences=8, until_solved=False)
    events = []

    def press(record):
        events.append(record)
        if record["kind"] == "test" and record["step"] in (6, 18):
            signal.raise_signal(signal.SIGTERM if record["step"] == 6 else signal.SIGINT)

    options = {"sequences": 8, "until_solved": False, "keep": tmp_path / "kept"}
    first = train_task(task, config, on_event=press, **options)
    assert first.step == 6 and first.stopped_by == signal.SIGTERM
    second = train_task(task, config, on_event=press, **options)
    assert second.step == 18 and second.stopped_by == signal.SIGINT
    last = train_task(task, config, on_event=press, **options)
    assert last.step == 30 and last.stopped_by is None
    for a, b in zip(whole.model.parameters(), last.model.parameters()):
        assert torch.equal(a, b)
    untimed = [[{**r, "seconds": 0} for r in result.history] for result in (whole, last)]
    assert untimed[0] == untimed[1] and last.seconds > second.seconds > first.seconds
    said = [r["text"] for r in events if r["kind"] == "message"]
    assert said == ["continuing after step 6", "continuing after step 18"]
    again = train_task(task, config, **options)  # at its end, it is only read
    assert again.step == 30 and again.history == last.history
    with pytest.raises(ValueError, match="holds the training of another model or task"):
        train_task(task, replace(config, lr=0.5), **options)


def test_a_killed_row_goes_on_from_the_last_minute(tmp_path, monkeypatch):
    """The kill comes at no signal: what is there was written before."""
    import subquad.arena.task.run as run
    import subquad.train.task.loop as module

    monkeypatch.setattr(module, "_KEEP_EVERY", 0.0)
    step = module.TaskRun.train_step

    def die(self, question):
        if self.config.model_keywords["mixer"] == "softmax_attention" and self.step == 9:
            raise SystemError("killed")
        step(self, question)

    monkeypatch.setattr(module.TaskRun, "train_step", die)
    with pytest.raises(SystemError):
        run_task_arena(TaskArenaConfig(**SMALL), tmp_path / "a")
    monkeypatch.setattr(module.TaskRun, "train_step", step)
    steps = []
    results = run_task_arena(
        TaskArenaConfig(**SMALL), tmp_path / "a", lambda r: steps.append(r.get("step"))
    )
    assert min(s for s in steps if s is not None) == 9  # "continuing after step 9"
    expected = run_task_arena(TaskArenaConfig(**SMALL))
    for row, other in zip(results.rows, expected.rows):
        assert row.losses == other.losses and row.values == other.values
        assert row.loss_steps == other.loss_steps
    assert not list((tmp_path / "a").glob("*/unfinished"))
    monkeypatch.setattr(run, "train_task", None)
    assert run_task_arena(TaskArenaConfig(**SMALL), tmp_path / "a").rows == results.rows


def test_the_clock_of_a_training_that_goes_on_has_not_begun_anew(tmp_path):
    import signal

    task, config = tasks.get("copying"), config_for(10**6, eval_every=10**6)
    options = {"sequences": 4, "keep": tmp_path / "kept"}

    def press(record):
        if record["kind"] == "train" and record["step"] == 100:
            signal.raise_signal(signal.SIGINT)

    first = train_task(task, config, seconds=1e-3, on_event=press, **options)
    assert first.cut and first.step == 1  # out of time after a step
    assert train_task(task, config, seconds=1e-3, **options).step == 1


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"shape": 3}', "[" * 10**5])
def test_a_damaged_record_of_an_arena_is_one_clear_error(finished, tmp_path, content):
    for name in ("plan.json", "gla/result.json"):
        out = shutil.copytree(finished[1], tmp_path / name.replace("/", "-"))
        (out / name).write_text(content)
        with pytest.raises(ValueError, match=rf"{name} is damaged"):
            run_task_arena(TaskArenaConfig(**SMALL), out)


@pytest.mark.skipif(os.name == "nt", reason="names are UTF-16 there")
def test_a_place_that_is_not_utf8_is_refused_at_once(tmp_path):
    place = tmp_path / os.fsdecode(b"arena\xff")
    for run_it in (
        lambda: run_task_arena(TaskArenaConfig(**SMALL), place),
        lambda: run_arena(ArenaConfig(rows=("gla",), steps=1), place),
    ):
        with pytest.raises(ValueError, match=r"^out: got .*expected a path in UTF-8"):
            run_it()
    assert not list(tmp_path.iterdir())


def test_an_arena_stopped_while_testing_keeps_what_was_finished(tmp_path, monkeypatch):
    import subquad.arena.task.run as run

    real = run.score

    def stopped(model, task, batches):
        if model.body.config.mixer == "softmax_attention":
            raise KeyboardInterrupt
        return real(model, task, batches)

    monkeypatch.setattr(run, "score", stopped)
    half = run_task_arena(TaskArenaConfig(**SMALL), tmp_path / "a")
    assert [row.label for row in half.rows] == ["gla"] and half.missing == ["softmax_attention"]


class Outline(HTMLParser):
    def __init__(self):
        super().__init__()
        self.outside, self.svgs = [], 0

    def handle_starttag(self, tag, attributes):
        self.svgs += tag == "svg"
        for name, value in attributes:
            if name in ("src", "href") and value and not value.startswith("#"):
                self.outside.append(value)
        if tag in ("script", "link", "iframe"):
            self.outside.append(tag)


def test_the_page_stands_alone_and_the_table_fits_a_terminal(finished, tmp_path):
    results, _ = finished
    page = write_task_report(results, tmp_path).read_text()
    outline = Outline()
    outline.feed(page)
    assert not outline.outside and outline.svgs == 6
    assert "Gu and Dao 2023" in page and "not run" in page
    console = Console(width=80, record=True)
    console.print(task_table(results))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "softmax_attention" in text and "length" in text
    assert any("Not solved in 12 steps" in sentence for sentence in findings(results))


@pytest.mark.parametrize(
    ("values", "reach"),
    [
        ((1.0, 1.0, 1.0), "solved up to 64 positions; at 64 accuracy 1.000"),
        ((1.0, 0.5, 1.0), "solved up to 16 positions; at 64 accuracy 1.000"),
        ((1.0, 1.0, 0.5), "solved up to 32 positions; at 64 accuracy 0.500"),
    ],
)
def test_a_row_reaches_as_far_as_every_test_on_the_way_is_solved(finished, values, reach):
    results, _ = finished
    gla = results.rows[0]
    tests = [replace(test, value=value) for test, value in zip(gla.tests, values)]
    found = findings(replace(results, rows=[replace(gla, tests=tests)]))
    assert found[-1] == f"gla: {reach}."


def test_a_row_that_the_clock_cut_off_is_told_with_its_step(finished):
    results, _ = finished
    cut = replace(results.rows[0], cut=True, steps=7)
    told = TaskArenaResults(results.plan, [cut, *results.rows[1:]])
    assert f"Cut off by the clock, not solved: {cut.label} (step 7)." in findings(told)
    assert "cut off at 7" in render_task_html(told)
    before = replace(cut, solved=3)  # and trained on, to learn it at other lengths
    page = render_task_html(replace(told, rows=[before, *results.rows[1:]]))
    assert "cut off at 7" not in page and 'data-label="solved at step">3<' in page


def test_a_guess_is_told_in_the_units_of_the_metric(tmp_path):
    assert tasks.get("parity").guess == 0 and tasks.get("mqar").guess == 1 / 64
    config = {"task": "parity", "rows": ("gla",), "settings": {"test_lengths": [8]}}
    results = run_task_arena(TaskArenaConfig(**SMALL | config | {"steps": 1}))
    assert "A uniform guess has 0." in render_task_html(results)


def test_every_plot_shows_what_a_guess_would_have(finished):
    page = render_task_html(finished[0])
    drawings = re.findall(r"<svg .*?</svg>", page, re.S)
    assert len(drawings) == 6 and all(">guessing</text>" in svg for svg in drawings)
    labels = re.findall(r'aria-label="(.*?)"', page)
    wanted = (
        "steps",
        "seconds of training",
        "state of one sequence",
        "positions in a test sequence",
    )
    assert {label.removeprefix("accuracy against ") for label in labels} == set(wanted)


@pytest.mark.parametrize("name", list(tasks.TASKS))
def test_the_page_shows_one_example_of_the_task(name):
    if name == "digits":
        pytest.importorskip("sklearn")
    task = tasks.get(name)
    shown = example(task)
    assert 1 <= len(shown) <= 161 and shown[-1].due
    batch = task.sample(1, split="test")
    asked = batch.asked[0].nonzero()[:, 0].tolist()
    if name == "mqar":
        dues = [position.due for position in shown if position.due]
        assert dues == [str(batch.labels[0, at].item()) for at in asked]
    if name == "listops":  # an expression that anybody can check
        text = " ".join(position.read for position in shown)
        assert (
            re.fullmatch(r"(\[(MIN|MAX|MED|SM) |[0-9] |\] )*\]", text) and shown[-1].due.isdigit()
        )
    if name == "stories":
        assert set(re.findall("[a-z]+", " ".join(p.read for p in shown))) & {"anna", "attic", "key"}
    if name == "hippo":
        assert shown[0].read.startswith("(") and float(shown[-1].due) is not None


def test_a_long_example_is_cut_in_the_middle():
    task = tasks.get("induction_heads", length=500)
    shown = example(task)
    assert [p.read for p in shown].count("…") == 1 and len(shown) == 161 and shown[-1].due


def test_long_labels_are_cut_in_the_middle():
    assert short("softmax_attention") == "softmax_attention"
    cut = short("mamba2:head_dim=32:state_size=16")
    assert cut == "mamba2:head…tate_size=16" and len(cut) == 24


def test_the_command_line_of_a_report_asks_the_same_again():
    config = TaskArenaConfig(
        task="mqar",
        rows=("gla", "deltanet:num_heads=2"),
        settings={"pairs": 4, "test_sizes": []},
        steps=7,
        lr=1e-3,
        eval_every=3,
    )
    words = task_command_line(config).split()
    assert words[:4] == ["subquad", "arena", "--task", "mqar"]
    sets = [words[i + 1].strip("'") for i, word in enumerate(words) if word == "--set"]
    given = {"task": "mqar", "rows": "gla,deltanet:num_heads=2", "steps": 7, "lr": "1e-3"}
    assert "--steps 7" in " ".join(words)
    assert task_config(given, sets) == config


# ---- scaling


def test_a_slope_is_found_with_its_error():
    exact = fit_exponent([1, 2, 4, 8], [3 * x**1.5 for x in (1, 2, 4, 8)])
    assert exact.value == pytest.approx(1.5) and exact.error == pytest.approx(0, abs=1e-7)
    # By hand: log y = 0, 1, 1 over log x = 0, 1, 2 has slope 1/2, residuals 1/6, -1/3, 1/6.
    rough = fit_exponent([1, math.e, math.e**2], [1, math.e, math.e])
    assert rough.value == pytest.approx(0.5)
    assert rough.error == pytest.approx(math.sqrt((1 / 36 + 1 / 9 + 1 / 36) / 1 / 2))
    assert fit_exponent([1, 2], [1, 2]) is None


def test_bytes_kept_are_those_of_the_graph():
    layer = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    # The first product keeps its input, tanh its output, which the second product shares.
    assert kept_for_backward(layer, torch.randn(5, 8)) == 4 * 5 * (8 + 16)


def test_what_was_counted_is_given_back():
    outputs = []

    class Exponential(torch.nn.Module):
        def forward(self, x):
            y = x.exp()  # saved for its own gradient
            outputs.append(weakref.ref(y))
            return y, {}

    assert kept_for_backward(Exponential(), torch.randn(3, 4)) == 4 * 12
    assert outputs[0]() is None, "or the peak of the next point would count it, too"


def test_scaling_finds_what_is_exact_and_reports_it(tmp_path):
    config = ScalingConfig(
        rows=("softmax_attention", "mamba2", "gla"),
        tokens=(32, 64, 128),
        widths=(128, 256, 384),
        width=128,
        length=32,
        repeats=1,
        device="cpu",
    )
    record = run_scaling(config)
    rows = {row["row"]: row["exponents"] for row in record["rows"]}
    assert rows["softmax_attention"]["T"]["decode bytes"]["value"] == pytest.approx(1, abs=0.01)
    assert rows["mamba2"]["T"]["decode bytes"]["value"] == pytest.approx(0, abs=1e-9)
    assert rows["gla"]["T"]["train bytes"]["value"] == pytest.approx(1, abs=0.2)
    assert set(rows["gla"]["d"]) == set(QUANTITIES)
    assert record["rows"][0]["claimed"] == {"train": "O(T²·d)", "decode": "O(T·d)"}
    page = write_scaling(record, tmp_path).read_text()
    outline = Outline()
    outline.feed(page)
    assert not outline.outside and outline.svgs == 6
    for svg in re.findall(
        r"<svg .*?</svg>", page, re.S
    ):  # guides of slope 1 and 2, both axes named
        y, x = re.search(r'aria-label="(.*?)"', svg)[1].split(" against ")
        assert x in ("tokens T", "width d") and f">{x}<" in svg and f">{y}<" in svg
    assert page.count(">T²</text>") == 4 and page.count(">d²</text>") == 2
    console = Console(width=80, record=True)
    console.print(scaling_table(json.loads((tmp_path / "scaling.json").read_text()), "T"))
    text = console.export_text()
    assert "O(T²·d)" in text and "O(H·K·V)" in text and "…" not in text


def test_a_series_ends_where_memory_does_and_rows_are_kept_one_by_one(monkeypatch):
    from subquad.arena.scaling import run as scaling

    def measure(row, tokens, width, config):
        if (row, tokens) == ("gla", 64):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return scaling.Point(tokens, width, 0.1, 1, 0.1, 1)

    monkeypatch.setattr(scaling, "measure_point", measure)
    config = ScalingConfig(rows=("gla", "mamba"), tokens=(32, 64, 128), widths=(8, 16, 32))
    kept = []
    record = run_scaling(config, on_row=lambda record: kept.append(len(record["rows"])))
    assert kept == [1, 2]
    assert [len(row["in_tokens"]) for row in record["rows"]] == [1, 3]
    assert [len(row["in_width"]) for row in record["rows"]] == [3, 3]


def test_a_series_ends_where_it_takes_too_long():
    config = ScalingConfig(
        rows=("gla",), tokens=(16, 32, 64), widths=(32, 64, 128), length=16, seconds=1e-9, repeats=1
    )
    (row,) = run_scaling(config)["rows"]
    assert len(row["in_tokens"]) == len(row["in_width"]) == 1
    assert set(row["exponents"]["T"].values()) == {None}
    with pytest.raises(
        ValueError, match=r"rows: got \[\]; expected at least one row and none twice"
    ):
        ScalingConfig(rows=())
    with pytest.raises(ValueError, match=r"tokens: got \[8, 4, 2\]; expected three numbers"):
        ScalingConfig(tokens=(8, 4, 2))


# ---- the command line


def run(*words: str):
    return CliRunner().invoke(app, ["arena", *words])


def test_the_list_tells_of_every_task():
    text = run("--list-tasks").output
    assert all(name in text for name in tasks.TASKS)
    listed = json.loads(run("--list-tasks", "--json").output)
    assert [entry["task"] for entry in listed] == list(tasks.TASKS)
    for entry in listed:
        for told in (entry["measures"], entry["solved_by"], entry["from"]):
            assert told and told == told.strip()  # else a line was cut off in the source


@pytest.mark.parametrize("task", list(tasks.TASKS))
def test_the_list_tells_of_one_task_what_can_be_set(task):
    text = run("--list-tasks", "--task", task).output
    assert [name for name in tasks.TASKS if f"\n{name} " in text] == [task]
    shown = [line.removeprefix("--set ") for line in text.splitlines() if line.startswith("--set ")]
    small = tasks.get(task)
    assert task_config({"task": task}, shown).build() == small
    assert len(shown) == len(fields(small))
    (only,) = json.loads(run("--list-tasks", "--json", "--task", task).output)
    assert only["task"] == task


def test_the_command_trains_and_reports(tmp_path):
    words = "--task copying --rows gla --steps 4 --batch-size 2 --set memory=2 --set pause=4"
    more = "--set test_sequences=4 --set test_pauses=[8] --parameters 40k --device cpu"
    result = run(*words.split(), *more.split(), "--out", str(tmp_path / "run"))
    assert result.exit_code == 0, result.output
    assert "pause" in result.output and (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--task mqar --minutes 3", "--minutes: does not go with --task"),
        ("--preset published", "--preset: does not go with the arena on text"),
        ("--task mqar --set colour=red", "colour: got no such setting"),
        ("--task nothing", "task: got 'nothing'"),
        ("--list-tasks --task mqr", "task: got 'mqr'"),
        ("--list-tasks --rows gla", "--rows: does not go with --list-tasks"),
        ("--list-tasks --scaling", "--scaling: does not go with --list-tasks"),
        ("--scaling --task mqar", "--task: does not go with --scaling"),
        ("--scaling --set colour=1", "--set: got 'colour'; expected one of rows, tokens"),
        ("--scaling --set tokens=512", "tokens: got [512]; expected three numbers"),
        ("--scaling --set seconds=long", "seconds: got 'long'; expected a number above 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(words, message):
    result = run(*words.split())
    assert isinstance(result.exception, ValueError) and message in str(result.exception)
