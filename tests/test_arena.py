"""The arena: equal sizes, honest measurements, runs that go on, a page that stands alone."""

import json
import os
import re
import signal
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from subquad.arena import (
    ArenaConfig,
    ArenaResults,
    equal_shape,
    render_html,
    run_arena,
    terminal_table,
    write_report,
)
from subquad.arena.drawing import byte_count, count, looks, smooth, spread
from subquad.arena.equalise import count_parameters
from subquad.arena.measure import decode_timings, heldout_windows
from subquad.arena.records import Shape
from subquad.arena.text.rates import BEST
from subquad.arena.text.report import command_line
from subquad.arena.text.results import RowResult, Training, difference
from subquad.cli import app, parse
from subquad.cli.arena_body import arena_command, show, task_command
from subquad.cli.terminal import screen
from subquad.mixers import MIXERS
from subquad.models import SubquadConfig, SubquadForCausalLM
from subquad.table import ROWS as ROWS_OF_THE_TABLE
from subquad.train import TrainConfig, TrainingError, evaluate, load_corpus, train
from subquad.train.session import Session
from subquad.train.task.run import TaskRun

ROWS = ("softmax_attention", "gla")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("data") / "text.txt"
    file.write_text("".join(f"{n} squared is {n * n}.\n" for n in range(3000)))
    return str(file)


@pytest.fixture(scope="module")
def config(text) -> ArenaConfig:
    return ArenaConfig(
        rows=ROWS,
        parameters=60_000,
        data=text,
        steps=6,
        seq_len=32,
        batch_size=2,
        contexts=(16, 64, 128),
        heldout_tokens=640,
        sample_tokens=12,
        lr=2e-3,
        device="cpu",
    )


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory) -> tuple[ArenaResults, Path]:
    out = tmp_path_factory.mktemp("arena")
    return run_arena(config, out), out


# ---- equal sizes


@pytest.mark.parametrize("row", MIXERS)
@pytest.mark.parametrize("parameters", [300_000, 1_000_000])
def test_every_row_comes_within_two_percent(row, parameters):
    shape = equal_shape(row, parameters, vocab_size=259)
    model = SubquadForCausalLM(SubquadConfig(vocab_size=259, **shape.model))
    storages = {p.data_ptr(): p.numel() for p in model.parameters()}
    assert shape.parameters == sum(storages.values())  # tied weights once
    assert abs(shape.parameters - parameters) <= 0.02 * parameters
    assert shape.embedding_parameters == 259 * shape.model["hidden_size"]
    assert 8 <= shape.model["hidden_size"] / shape.model["num_hidden_layers"] <= 120


def test_rows_that_mix_channels_get_layers_instead_of_an_mlp():
    attention = equal_shape("softmax_attention", 1_000_000, 259).model
    mamba2 = equal_shape("mamba2", 1_000_000, 259).model
    assert "intermediate_size" not in mamba2
    assert mamba2["num_hidden_layers"] >= 1.5 * attention["num_hidden_layers"]


def test_a_size_or_row_that_cannot_be_had_is_refused():
    with pytest.raises(ValueError, match=r"parameters: gla has no shape within 2% of 500 "):
        equal_shape("gla", 500, 259)
    with pytest.raises(ValueError, match=r"rows: got 'gals'; expected one of .*gla"):
        equal_shape("gals", 1_000_000, 259)


def test_a_row_takes_part_twice_with_other_options(config, tmp_path):
    rows = ("linear_attention", "linear_attention:num_heads=4")
    results = run_arena(replace(config, rows=rows, steps=2, sample_tokens=2), tmp_path)
    assert [result.name for result in results.rows] == list(rows)
    assert results.missing == []
    options = [result.shape.model.get("mixer_options") for result in results.rows]
    assert options == [None, {"linear_attention": {"num_heads": 4}}]
    assert rows[1] in write_report(results, tmp_path).read_text("utf-8")
    again = run_arena(results.config, tmp_path)  # reads back what is finished
    assert again == results


def test_of_several_learning_rates_each_row_is_shown_at_its_best(config, tmp_path):
    rates = (1e-6, 1e-2, 1e30)  # one does nothing, one learns, one breaks
    results = run_arena(replace(config, rows=("gla",), lr=rates, steps=20), tmp_path)
    (result,) = results.rows
    assert result.lr == 1e-2
    ends = {attempt.lr: attempt.bits_per_byte for attempt in result.attempts}
    assert list(ends) == list(rates) and ends[1e-2] < ends[1e-6] and ends[1e30] is None
    steady = result.training.bits_per_byte[-2:]  # the last tenth of 20 steps
    assert ends[1e-2] == pytest.approx(sum(steady) / 2)
    assert (tmp_path / "gla" / "lr=0.01" / "config.json").exists()
    page = write_report(results, tmp_path).read_text("utf-8")
    assert f"gla 0.01 (1e-06: {ends[1e-6]:.3f}, 0.01: {ends[1e-2]:.3f}, 1e+30: broke off)" in page
    assert "--lr 1e-06,0.01,1e+30" in page
    assert run_arena(results.config, tmp_path) == results
    assert ArenaResults.from_json(json.loads(json.dumps(results.to_json()))) == results


def test_each_row_of_the_demo_trains_at_its_own_best_rate_of_the_committed_sweep(config, tmp_path):
    """The baseline like its rivals, at rates that are no end of the range that was tried."""
    file = Path(__file__).parents[1] / "docs" / "results" / "demo-sweep.json"
    rows = json.loads(file.read_text())["rows"]
    assert {row: record["best"] for row, record in rows.items()} == BEST
    assert set(BEST) == set(ArenaConfig().rows)
    for row, record in rows.items():
        ends = {float(rate): bits for rate, bits in record["bits_per_byte"].items()}
        assert min(ends, key=ends.get) == BEST[row] and min(ends) < BEST[row] < max(ends)
    asked = replace(config, lr=None, rows=("softmax_attention", "gla:num_heads=2", "deltanet"))
    results = run_arena(replace(asked, steps=2, sample_tokens=2), tmp_path)
    rates = {result.name: result.lr for result in results.rows}
    assert rates == {"softmax_attention": 1e-3, "gla:num_heads=2": 2e-3, "deltanet": 2e-3}
    page = write_report(results, tmp_path).read_text("utf-8")
    assert "softmax_attention 0.001, gla:num_heads=2 0.002" in page and "--lr" not in page
    assert run_arena(results.config, tmp_path) == results


def test_a_row_whose_training_breaks_off_does_not_keep_the_others_from_theirs(
    config, tmp_path, monkeypatch
):
    def break_off(settings, *args, **kwargs):
        if settings.model["mixer"] == "softmax_attention" and args:  # not while calibrating
            raise TrainingError("step 3: the loss is nan")
        return train(settings, *args, **kwargs)

    monkeypatch.setattr("subquad.arena.text.run.train", break_off)
    results = run_arena(replace(config, steps=2, sample_tokens=2), tmp_path)
    assert [result.name for result in results.rows] == ["gla"]
    assert results.failures == {"softmax_attention": "step 3: the loss is nan"}
    assert results.missing == []
    assert ArenaResults.from_json(json.loads(json.dumps(results.to_json()))) == results
    page = write_report(results, tmp_path).read_text("utf-8")
    assert "softmax_attention gave up" in page and "the loss is nan" in page


# ---- measurements


def small_model(row: str) -> SubquadForCausalLM:
    torch.manual_seed(0)
    return SubquadForCausalLM(
        SubquadConfig(hidden_size=32, num_hidden_layers=2, mixer=row, intermediate_size=32)
    )


def test_the_cache_is_weighed_with_exactly_that_many_tokens_in_it():
    """Keys and values are counted by hand, so a token too many or too few would show."""
    timings = decode_timings(small_model("softmax_attention"), torch.arange(50), (16, 700, 800))
    assert [t.context for t in timings] == [16, 700, 800]
    lengths = 2 * 8  # one int64 a layer
    for timing in timings:
        assert timing.cache_bytes - lengths == 2 * 2 * timing.context * 32 * 4
        assert 0 < timing.low <= timing.seconds_per_token <= timing.high
    prefills = [t.prefill_seconds for t in timings]
    assert prefills == sorted(prefills) and prefills[0] > 0


def test_timing_leaves_the_context_that_was_really_read():
    """After timing, the cache has read the text to the context and then its own choices."""
    model, read = small_model("gla"), []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(args[0]), with_kwargs=True
    )
    text = torch.arange(100, 160)
    decode_timings(model, text, (16, 200))
    hook.remove()
    widths = [ids.shape[1] for ids in read]
    assert widths == [16, *[1] * 45, 200 - 61, *[1] * 45]
    assert torch.equal(read[0][0], text[:16])
    assert torch.equal(read[46][0], text.repeat(4)[61:200])


def test_contexts_too_close_to_time_are_refused():
    with pytest.raises(ValueError, match=r"contexts must lie more than 45 tokens apart"):
        decode_timings(small_model("gla"), torch.arange(50), (16, 40))


def test_held_out_windows_add_up_to_what_training_reports(text):
    corpus = load_corpus(text)
    settings = TrainConfig(model="gla", seq_len=32, batch_size=3, device="cpu")
    model = small_model("gla")
    bits, sizes = heldout_windows(model, corpus.heldout, settings, 640)
    expected = evaluate(model, corpus.heldout, seq_len=32, batch_size=3, tokens=640)
    assert len(bits) == len(sizes) == 20
    assert sum(sizes) == expected["bytes"]
    assert sum(bits) / sum(sizes) == pytest.approx(expected["bits_per_byte"], rel=1e-6)


def result_with(bits: list[float]) -> RowResult:
    shape = Shape("gla", 1, 1, {"mixer": "gla", "hidden_size": 8, "num_hidden_layers": 1})
    return RowResult(shape, Training([1.0], [1.0], 8), bits, [8] * len(bits), [], "")


def test_windows_are_compared_in_pairs():
    """What makes a window hard for both rows must not count as uncertainty of their difference."""
    hardness = [10.0, 30.0, 20.0, 60.0]
    row = result_with([h + e for h, e in zip(hardness, (2.0, 3.0, 2.0, 3.0))])
    gap, error = difference(row, result_with(hardness))
    assert gap == pytest.approx(2.5 / 8)
    assert error == pytest.approx((4 * 0.25 / 3) ** 0.5 / 2 / 8)  # deviation / sqrt(4), in bytes


def test_speed_is_that_of_the_median_step():
    assert Training([0.0] * 5, [1.0, 1.0, 2.0, 4.0, 900.0], 8).tokens_per_second == 4.0


# ---- a run


def test_rows_are_trained_alike(finished, config):
    results, out = finished
    assert [result.row for result in results.rows] == list(ROWS)
    assert results.missing == []
    settings = [json.loads((out / row / "config.json").read_text())["train"] for row in ROWS]
    differing = {name for name in settings[0] if settings[0][name] != settings[1][name]}
    assert differing == {"model"}
    for result in results.rows:
        assert len(result.training.bits_per_byte) == config.steps
        assert sum(result.heldout_bytes) == 640
        assert 0 < len(result.sample) <= 12
        model = SubquadForCausalLM.from_pretrained(out / result.row / "model")
        assert count_parameters(model) == result.shape.parameters


def test_a_finished_arena_is_read_back_not_trained_again(finished, config):
    results, out = finished
    kinds = []
    again = run_arena(config, out, lambda record: kinds.append(record["kind"]))
    assert again == results
    assert set(kinds) == {"plan", "row"}


def test_ctrl_c_keeps_what_is_done_and_the_same_call_goes_on(finished, config, tmp_path):
    def press_ctrl_c(record):
        if record["kind"] == "train" and (record["row"], record["step"]) == ("gla", 3):
            signal.raise_signal(signal.SIGINT)

    stopped = run_arena(config, tmp_path / "arena", press_ctrl_c)
    assert stopped.missing == ["gla"]
    assert "stopped before\n<code>gla</code>" in render_html(stopped)

    steps = []
    done = run_arena(config, tmp_path / "arena", lambda r: steps.append((r["kind"], r.get("step"))))
    assert [step for kind, step in steps if kind == "train"] == [4, 5, 6]
    whole = finished[0]
    for result, expected in zip(done.rows, whole.rows):
        assert result.heldout_bits == expected.heldout_bits
        assert result.training.bits_per_byte == expected.training.bits_per_byte
        assert result.sample == expected.sample


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("on_task", [False, True])
def test_the_signal_that_stops_an_arena_is_its_exit_status(
    config, tmp_path, monkeypatch, capsys, name, on_task
):
    number = getattr(signal, name)
    step = (TaskRun if on_task else Session).train_step

    def step_and_signal(self, *args):
        step(self, *args)
        if on_task or self.run is not None:  # not while calibrating
            signal.raise_signal(number)

    monkeypatch.setattr(TaskRun if on_task else Session, "train_step", step_and_signal)
    if on_task:
        given = {"task": "copying", "rows": "gla", "steps": 5, "batch_size": 2, "device": "cpu"}
        status = task_command(tmp_path / "a", given, ["memory=2", "pause=4"])
    else:
        given = {**vars(config), "rows": "gla", "parameters": "60k", "lr": "0.002"}
        status = arena_command(tmp_path / "a", given)
    assert status == 128 + number
    assert "Stopped before: gla. The same command continues." in capsys.readouterr().out


def test_another_arena_in_the_same_place_is_refused(finished, text, tmp_path):
    _, out = finished
    other = ArenaConfig(rows=ROWS, parameters=60_000, data=text, steps=7, device="cpu")
    with pytest.raises(ValueError, match=r"out: .* begun otherwise \(.*steps was 6, now 7.*--out"):
        run_arena(other, out)
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match=r"out: .* is not empty and no arena"):
        run_arena(other, tmp_path)


def test_an_arena_begun_elsewhere_is_not_finished_here(finished, config, tmp_path):
    """Half of the rows on another machine would be no comparison."""
    plan = json.loads((finished[1] / "plan.json").read_text())
    plan["environment"]["threads"] += 1
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(ValueError, match=r"threads was \d+, now \d+"):
        run_arena(config, tmp_path)


def test_a_time_budget_becomes_one_number_of_steps_for_all_rows(config, tmp_path):
    budget = ArenaConfig(**{**vars(config), "steps": None, "minutes": 0.001, "rows": ("gla",)})
    results = run_arena(budget, tmp_path / "arena")
    assert results.plan.steps == 20  # the least that means anything
    assert "--steps 20" in command_line(budget, results.plan.steps)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rows": ()}, r"rows: got \[\]; expected at least one row"),
        ({"rows": ("gla", "gla")}, "none twice"),
        ({"parameters": 0}, "parameters must be positive, got 0"),
        ({"steps": -1}, "steps must be positive, got -1"),
        ({"minutes": float("nan")}, "minutes must be positive, got nan"),
        ({"contexts": (0, 5)}, "contexts must be positive"),
        ({"prompt": ""}, "prompt must not be empty"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ArenaConfig(**wrong)


# ---- the report


class Page(HTMLParser):
    """Collects what the page would load, and checks that elements are closed in order."""

    VOID = {"meta", "br", "link", "img", "input", "hr"}

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attributes:
            if tag in ("script", "link") or (name in ("src", "href") and value[0] != "#"):
                self.loads.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_stands_alone(finished):
    html = render_html(finished[0])
    page = Page(html)
    assert page.open == []
    assert page.loads == []
    assert "@import" not in html and not re.search(r"url\((?!#)", html)
    assert html.count("<svg") == 6 and html.count('role="img"') == 6
    assert not re.search(r"#01f[23]", html), "a placeholder colour was left"
    clips = re.findall(r'<clipPath id="([^"]+)"', html)
    assert clips and len(set(clips)) == len(clips), "drawings would clip each other"


def test_the_page_shows_the_numbers_and_escapes_the_samples(finished):
    results = finished[0]
    rows = [
        RowResult(**{**vars(row), "sample": "<script>alert('&')</script>"}) for row in results.rows
    ]
    html = render_html(ArenaResults(results.plan, rows))
    assert "<script" not in html and "&lt;script&gt;" in html
    for result in rows:
        assert f"{result.bits_per_byte:.3f}" in html
        assert f"{result.shape.parameters:,}" in html
        for timing in result.decode:
            assert byte_count(timing.cache_bytes) in html
    growth = rows[0].decode[-1].cache_bytes / rows[0].decode[0].cache_bytes
    assert f"the cache of softmax_attention grows {growth:.3g} times" in html
    assert "the cache does not grow for gla" in html


def test_json_goes_there_and_back(finished, tmp_path):
    results = finished[0]
    assert write_report(results, tmp_path) == tmp_path / "report.html"
    record = json.loads((tmp_path / "results.json").read_text())
    assert ArenaResults.from_json(record) == results
    assert record["summary"][0]["heldout_bits_per_byte"] == results.rows[0].bits_per_byte
    environment = record["plan"]["environment"]
    assert {"torch", "subquad", "threads", "date", "processor"} <= environment.keys()


def test_nothing_finished_gives_no_page(finished, tmp_path):
    nothing = ArenaResults(finished[0].plan, [])
    with pytest.raises(ValueError, match="no finished row"):
        render_html(nothing)
    write_report(nothing, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_the_table_fits_a_terminal(finished):
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(terminal_table(finished[0]))
    printed = console.export_text()
    assert "…" not in printed
    for result in finished[0].rows:
        assert re.search(rf"{result.row} .*{result.bits_per_byte:.3f}", printed)


def test_every_axis_says_what_it_counts(finished):
    html = render_html(finished[0])
    drawings = re.findall(r'<svg .*?aria-label="(.*?)".*?</svg>', html, re.S)
    assert len(drawings) == 6
    for what in drawings:
        y, x = what.split(" against ")
        assert html.count(f">{x}</text>") and html.count(f">{y}</text>"), what
    assert {
        f"bits per byte against {x}" for x in ("seconds of training", "state of one sequence")
    } <= {*drawings}


def test_a_row_has_its_colour_on_every_page(finished):
    demo = looks(ArenaConfig().rows)
    alone = {row: looks([row])[row] for row in demo}
    assert demo == alone and len({look.colour for look in demo.values()}) == len(demo)
    every = looks(ROWS_OF_THE_TABLE)
    assert len(set(every.values())) == len(every), "two rows cannot be told apart"
    twice = looks(["gla", "gla:num_heads=2"])
    assert twice["gla"] == every["gla"] != twice["gla:num_heads=2"]
    assert twice["gla:num_heads=2"].colour == every["gla"].colour
    page = render_html(finished[0])
    for row, look in every.items():
        if row in ROWS:
            assert f'var(--series-{look.colour})"></span><code>{row}</code>' in page


@pytest.mark.parametrize("label", ["gla:" + "x" * 200, "gla:[/x]", "gla:$x_1$ & <b>"])
def test_labels_may_hold_anything(finished, label, capsys):
    results = finished[0]
    rows = [replace(row, label=label) if row.row == "gla" else row for row in results.rows]
    changed = ArenaResults(replace(results.plan, config=results.config), rows)
    page = Page(render_html(changed))
    assert page.open == [] and page.loads == []
    show(changed, screen())
    shown = capsys.readouterr().out
    assert label in shown or shown.count("x") >= 200


def test_a_report_that_cannot_be_drawn_loses_no_result(config, tmp_path, monkeypatch, capsys):
    def fail(results):
        raise RuntimeError("no drawing [/x] today")

    monkeypatch.setattr("subquad.arena.text.report.render_html", fail)
    given = {**vars(config), "rows": "gla", "parameters": "60k", "lr": "0.002", "steps": 2}
    status = arena_command(tmp_path / "[/x]" / "out", given)
    said = capsys.readouterr().out
    assert status == 1 and "no drawing [/x] today" in said and "gla" in said
    record = json.loads((tmp_path / "[/x]" / "out" / "results.json").read_text())
    assert record["summary"][0]["row"] == "gla"


@given(st.lists(st.floats(0, 300), min_size=1, max_size=12))
def test_labels_keep_their_order_and_their_distance(wishes):
    placed = spread(wishes, 17, 0, 300)
    order = sorted(range(len(wishes)), key=wishes.__getitem__)
    heights = [placed[i] for i in order]
    assert all(b - a >= 17 - 1e-9 for a, b in pairwise(heights))
    assert min(heights) >= -1e-9 and max(heights) <= 300 + 1e-9
    if all(b - a >= 17 for a, b in pairwise(sorted(wishes))):
        assert placed == pytest.approx(wishes)


@given(st.lists(st.floats(-9, 9), min_size=1, max_size=30), st.integers(1, 10))
def test_smoothing_is_a_mean_of_neighbours(values, window):
    means = smooth(values, window)
    window = min(window, len(values))
    expected = [sum(values[i : i + window]) / window for i in range(len(values) - window + 1)]
    assert means == pytest.approx(expected, abs=1e-9)


def test_numbers_as_people_write_them():
    assert [count(n) for n in (128, 998, 2048, 16384, 10**6)] == ["128", "998", "2k", "16k", "1M"]
    assert [byte_count(n) for n in (16, 983_040, 72 << 20)] == ["16 B", "960 KiB", "72 MiB"]
    assert [parse.count(n) for n in ("300k", "1.5M", "2500")] == [300_000, 1_500_000, 2500]
    for wrong in ("", "M", "lots", "1e999"):
        with pytest.raises(ValueError, match="parameters: got"):
            parse.count(wrong)


def test_the_command_runs_and_says_where_the_report_is(config, tmp_path):
    options = [f"--data={config.data}", "--rows=gla", "--parameters=60k", "--steps=2"]
    options += ["--seq-len=32", "--batch-size=2", "--device=cpu", f"--out={tmp_path / 'a'}"]
    outcome = CliRunner().invoke(app, ["arena", *options])
    assert outcome.exit_code == 0, outcome.output
    assert "gla continues 'def read'" in outcome.output
    assert str(tmp_path / "a" / "report.html") in outcome.output.replace("\n", "")
    assert (tmp_path / "a" / "report.html").exists()
