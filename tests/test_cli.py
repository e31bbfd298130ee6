"""The command line as it is seen: at 80 columns, with names in any case, without a reader."""

import json
import os
import re
import subprocess
import sys
from io import StringIO
from itertools import pairwise

import pytest
from numba import njit
from rich.console import Console
from typer.testing import CliRunner

from subquad.arena.columns import NumberTable
from subquad.arena.drawing import short
from subquad.arena.entrants import Entrant
from subquad.arena.records import Shape
from subquad.arena.scaling.results import ScalingConfig
from subquad.arena.text.progress import ArenaProgress
from subquad.cli import app, main
from subquad.cli.complete import complete_row, complete_rows
from subquad.cli.rows_body import explain_command, table_command
from subquad.cli.settle import settle
from subquad.cli.terminal import Lasting, command, printable, say, sidelines
from subquad.errors import nearest, pick
from subquad.mixers import MIXERS
from subquad.table import ROWS
from subquad.train import TrainConfig, train
from subquad.train.progress import Pace, duration, show_progress

NARROW, WIDE = 80, 4000
COMMANDS = ["", "table", "explain", "hippo", "train", "generate", "arena"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("".join(f"line {i}: {i * i} is the square of {i}\n" for i in range(500)))
    return path


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    """The directory of a run that was trained a little."""
    path = tmp_path_factory.mktemp("runs") / "first"
    model = {"mixer": "gla", "hidden_size": 16, "num_hidden_layers": 1}
    train(TrainConfig(model=model, data=str(text), steps=3, seq_len=16, device="cpu"), path)
    return path


@pytest.fixture
def subquad(monkeypatch, capfd):
    """Run the command line in this process: (exit status, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["subquad", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            main()
        output = capfd.readouterr()
        return exit.value.code, output.out, output.err

    return run


def words(page: str) -> set[str]:
    """What stands between blanks and lines of a frame."""
    return set(re.sub("[─│╭╮╰╯━╸╺]", " ", page).split())


def fits(page: str) -> bool:
    return max(len(line.rstrip()) for line in page.splitlines()) <= NARROW


# ---- 80 columns


@pytest.mark.parametrize("name", COMMANDS)
def test_help_at_80_columns_says_all_that_a_wide_one_says(name):
    pages = [
        CliRunner().invoke(app, [*name.split(), "--help"], env={"COLUMNS": str(width)}).output
        for width in (NARROW, WIDE)
    ]
    assert fits(pages[0]) and "…" not in pages[0]
    assert words(pages[1]) <= words(pages[0])
    for paragraph in pages[1].split("\n\n"):  # each on one line, where there is room for it
        assert "│" in paragraph or paragraph.strip().count("\n") == 0, paragraph


def test_the_table_shows_what_its_help_promises(capsys, monkeypatch):
    """Recurrence, state, costs, paper, and whether it runs, of every row, at any width."""
    for width in (60, NARROW, 120, 200):
        monkeypatch.setenv("COLUMNS", str(width))
        table_command(as_json=False)
        shown = words(capsys.readouterr().out)
        for name, row in ROWS.items():
            facts = (row.write, row.state, row.train, row.decode, row.paper.rsplit(", ", 1)[0])
            assert {word for fact in (name, *facts) for word in fact.split()} <= {
                w.rstrip(",") for w in shown
            } | shown, (width, name)


@pytest.mark.parametrize("name", ["gla", "mlstm"])
def test_explain_fits(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(WIDE))
    explain_command(name, 64, 100, 1, "cpu", as_json=False)
    wide = capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", str(NARROW))
    explain_command(name, 64, 100, 1, "cpu", as_json=False)
    narrow = capsys.readouterr().out
    assert fits(narrow)
    changing = re.compile(r"\d+\.\d\d")  # milliseconds
    assert words(changing.sub("", wide)) <= words(changing.sub("", narrow))


@pytest.mark.parametrize("label", ["gla", "sliding_window_attention", "deltanet:" + "x" * 42])
def test_no_number_is_cut_off_however_long_a_label_is(label):
    from rich.text import Text

    numbers = [f"{k}234.56" for k in range(9)]
    table = NumberTable(
        "\nrow", [f"head\n@{k}" for k in range(9)], [(label, [*map(Text, numbers)])]
    )
    console = Console(width=NARROW, file=StringIO(), record=True)
    console.print(table)
    page = console.export_text()
    assert fits(page) and {label, *numbers} <= words(page)


@pytest.mark.parametrize("title", ["gla", "sliding_window_attention"])
def test_a_bar_shows_every_number_at_80_columns(title):
    file = StringIO()
    console = Console(width=NARROW, file=file, force_terminal=True, color_system=None)
    with show_progress(title, console) as on_event:
        on_event(
            {"kind": "start", "step": 0, "steps": 12_345, "parameters": 12_345_678, "device": "cpu",
             "train_tokens": 123_456_789, "heldout_tokens": 12_345_678}
        )  # fmt: skip
        numbers = {"loss": 12.345, "bits_per_byte": 17.809, "tokens_per_second": 123_456.7}
        for step in (1, 12_344):
            on_event({"kind": "train", "step": step, **numbers})
    shown = file.getvalue()
    assert "…" not in shown
    for number in ("12344/12345", "12.345", "17.809", "123,457", "12.35M", "123,456,789"):
        assert number in shown, number


def test_arena_bars_show_every_number_at_80_columns():
    file = StringIO()
    console = Console(width=NARROW, file=file, force_terminal=True, color_system=None)
    rows = ("sliding_window_attention", "mamba2:state_size=16:head_dim=32:[bold]")
    shape = {"num_hidden_layers": 8, "hidden_size": 128, "intermediate_size": 368}
    with ArenaProgress(console) as progress:
        progress.steps = 500
        progress.show_shapes({row: Shape(row, 1_006_272, 9, shape) for row in rows}, 500)
        for row in rows:
            for step in (1, 499):
                record = {"bits_per_byte": 12.3, "tokens_per_second": 123_456.7}
                progress.on_event({"kind": "train", "row": row, "step": step, **record})
                progress.progress.refresh()
            progress.finish(row, 500, "12.345 held-out bits per byte")
        progress.on_event({"kind": "message", "row": rows[1], "text": "[/x] gave up"})
    shown = file.getvalue()
    for number in ("12.30 bits/byte  123k tok/s", "12.345 held-out bits per byte", "1,006,272"):
        assert number in shown, number
    assert all(row in shown and short(row) in shown for row in rows)
    assert "[/x] gave up" in shown


def test_what_is_said_is_wrapped_between_words():
    file = StringIO()
    path = "/" + "p" * 100
    say(Console(file=file, width=NARROW), f"{'a word ' * 30}{path} and [/x] {'more ' * 20}")
    lines = file.getvalue().splitlines()
    assert path in lines and max(len(line) for line in lines if line != path) <= NARROW
    assert words(file.getvalue()) == {"a", "word", path, "and", "[/x]", "more"}


# ---- names


def test_names_are_meant_in_any_case():
    for written, meant in {
        "GLA": "gla",
        "Mamba-2": "mamba2",
        "Gated-DeltaNet": "gated_deltanet",
        "softmax attention": "softmax_attention",
        "rwkv7": "rwkv7",
    }.items():
        assert pick("row", written, ROWS) == meant
    assert nearest("MAMBO", ROWS)[0] == "mamba"
    with pytest.raises(ValueError, match=r"^row: got 'GLLA'; .* Fix: perhaps 'gla'"):
        pick("row", "GLLA", ROWS)


def test_rows_are_meant_in_any_case_wherever_one_is_named(capsys):
    assert TrainConfig(model="GLA").model == {"mixer": "gla"}
    assert TrainConfig(model={"layers": ["Mamba-2", "GLA"]}).model == {"layers": ["mamba2", "gla"]}
    config = settle(None, {}, {"layers": "GLA,Mamba2"}, [])
    assert config.model["layers"] == ["gla", "mamba2"]
    assert settle(None, {}, {"mixer": "RetNet"}, []).model["mixer"] == "retnet"
    assert settle(None, {}, {}, ["model.mixer=RetNet"]).model["mixer"] == "retnet"
    assert Entrant.parse("Mamba2:state_size=16").label == "mamba2:state_size=16"
    assert ScalingConfig(rows=("GLA",)).rows == ("gla",)
    explain_command("RWKV-7", 64, 8, 1, "cpu", as_json=True)
    assert json.loads(capsys.readouterr().out)["name"] == "rwkv7"
    assert not [name for name in MIXERS if pick("row", name.upper(), MIXERS) != name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "x/glaa", "--mixer", "glaa"], "--mixer: got 'glaa'; "),
        (["train", "x/y", "--layers", "gla,glaa"], "--layers: got 'glaa'; "),
        (["train", "x/y", "--set", "model.mixer=glaa"], "mixer: got 'glaa'; "),
        (["explain", "glaa"], "row: got 'glaa'; "),
        (["arena", "--rows", "gla,glaa"], "rows: got 'glaa'; "),
        (["arena", "--scaling", "--rows", "glaa"], "rows: got 'glaa'; "),
    ],
)
def test_did_you_mean(arguments, message, subquad, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    status, _, errors = subquad(*arguments)
    assert status == 1 and message in errors and "Fix: perhaps 'gla'" in errors
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments", [["mamba"], ["runs/mamba"], ["MAMBA"], ["mamba", "--mixer", "gla"], ["gla"]]
)
def test_a_runs_name_that_is_a_rows_name_is_not_taken_for_the_row(
    arguments, subquad, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    status, _, errors = subquad("train", *arguments)
    named = arguments[0].rpartition("/")[2].lower()
    assert status == 1 and "the name of a row" in errors and f"Fix: --mixer {named}" in errors
    assert not list(tmp_path.iterdir())


def test_a_run_may_be_named_after_the_row_that_it_trains(text, subquad, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    size = ("--hidden-size", 16, "--layers", 1, "--seq-len", 16, "--steps", 1, "--data", text)
    for name in ("gla", "runs/gla"):
        status, _, said = subquad("train", name, "--mixer", "GLA", *size)
        assert status == 0, said
        assert (tmp_path / name / "model").is_dir()


def test_an_arenas_folder_offers_the_models_inside(run, subquad, tmp_path):
    for place in ("gla", "mamba/lr=0.001"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).symlink_to(run)
    status, said, errors = subquad("generate", tmp_path)
    assert status == 1 and said == ""
    assert "expected a model inside: gla, mamba/lr=0.001. Fix: " in errors


def test_the_tab_key_completes_rows_and_is_installed(monkeypatch):
    assert complete_row("GATED") == ["gated_retention", "gated_rfa", "gated_deltanet"]
    assert complete_rows("gla,ret") == ["gla,retnet"]
    result = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"})
    assert "--install-completion" in result.output
    code = (
        "import sys; sys.argv = ['subquad']; from subquad.cli import app; app(prog_name='subquad')"
    )
    words = {"_SUBQUAD_COMPLETE": "complete_bash", "COMP_WORDS": "subquad train --mixer gated_d"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env={**os.environ, **words, "COMP_CWORD": "3"},
    )  # fmt: skip
    assert done.stdout.strip() == "gated_deltanet", done.stderr


# ---- progress


def test_the_time_left_is_steady_although_steps_are_not():
    """Steps of 0.1 and 0.5 s in turn: what is left falls with the clock, within a tenth."""
    pace, now = Pace(), 0.0
    left = []
    for step in range(1, 400):
        pace.move(step, now)
        left.append((now, pace.left(1000)))
        now += 0.1 if step % 2 else 0.5
    assert left[0][1] is None
    settled = left[20:]
    for (a, first), (b, second) in pairwise(settled):
        assert abs(second - (first - (b - a))) < 0.1 * first
    now, last = left[-1]
    assert last == pytest.approx(0.3 * (1000 - 399), rel=0.05)


def test_the_time_left_follows_a_machine_that_has_become_slower():
    pace, now = Pace(), 0.0
    for step in range(1000):
        pace.move(step, now)
        now += 0.1 if step < 500 else 1.0
    assert pace.left(2000) == pytest.approx(1001 * 1.0, rel=0.05)


def test_the_first_step_in_which_kernels_compile_does_not_count():
    pace = Pace()
    for step, now in ((1, 60.0), (2, 61.0), (3, 62.0)):
        pace.move(step, now)
    assert pace.left(10) == pytest.approx(7.0)
    assert [duration(s) for s in (5, 185.4, 3723)] == ["0:05", "3:05", "1:02:03"]


@njit
def add_one(x):
    return x + 1


def test_the_first_compilation_is_announced(text, tmp_path, subquad, monkeypatch):
    """numba's own event, which does not occur where its cache has the kernel."""
    import subquad.train.session as session

    real, fresh = session.Session.train_step, add_one

    def compile_and_step(self):
        fresh(self.step)  # an int: compiled once, at the first step
        real(self)

    monkeypatch.setattr(session.Session, "train_step", compile_and_step)
    size = ("--hidden-size", 16, "--layers", 1, "--seq-len", 16, "--steps", 2, "--data", text)
    status, _, said = subquad("train", tmp_path / "run", *size)
    assert status == 0 and said.count("compiling kernels for this machine") == 1
    status, _, said = subquad("train", tmp_path / "again", *size)
    assert status == 0 and "compiling" not in said


# ---- starting from weights


def test_training_starts_from_the_weights_and_the_model_of_another_run(
    run, text, tmp_path, subquad
):
    import torch

    from subquad.generate import load

    options = ("--data", text, "--seq-len", 16, "--steps", 1, "--set", "warmup_steps=1000000")
    status, _, said = subquad("train", tmp_path / "tuned", "--from", run, *options)
    assert status == 0, said
    config = TrainConfig.load(tmp_path / "tuned")
    assert config.init_from == str(run) and config.model["hidden_size"] == 16
    (a, _), (b, _) = load(run), load(tmp_path / "tuned")
    assert a.config.rows == b.config.rows == ["gla"]
    for one, other in zip(a.parameters(), b.parameters()):
        assert torch.allclose(one, other, atol=1e-6)  # a step of next to no size
    assert subquad("train", tmp_path / "tuned", "--resume", "--steps", 2)[0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mixer", "retnet"], "layers: got ['retnet'], where the model in"),
        (["--hidden-size", "32"], "hidden_size: got 32, where the model in"),
        (["--layers", "2"], "layers: got ['gla', 'gla'], where the model in"),
        (["--set", "model.norm_eps=0.1"], "norm_eps: got 0.1, where the model in"),
        (["--resume"], "--from: a resumed run keeps its own settings"),
    ],
)
def test_options_that_contradict_the_weights_are_refused(options, message, run, subquad, tmp_path):
    status, _, errors = subquad("train", tmp_path / "x", "--from", run, *options)
    assert status == 1 and message in errors
    assert not (tmp_path / "x").exists()


def test_options_that_agree_with_the_weights_are_not(run, text):
    model = {"mixer": "GLA", "layers": "1", "hidden_size": 16}
    assert settle(None, {"data": str(text)}, model, [], run).init_from == str(run)


# ---- readers that go away


class Broken(StringIO):
    """A pipe whose reader has gone."""

    writes = 0

    def write(self, text):
        self.writes += 1
        raise BrokenPipeError(32, "Broken pipe")


def test_a_stream_that_nobody_reads_goes_silent():
    stream = Broken()
    console = Console(file=Lasting(stream), force_terminal=True)
    for _ in range(3):
        console.print("still here")
    assert stream.writes


def test_a_stream_that_the_shell_has_closed_is_none(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    say(sidelines(), "to nobody")


def test_a_diverged_run_says_how_to_go_on(text, tmp_path, subquad):
    size = ("--hidden-size", 16, "--layers", 1, "--seq-len", 16, "--steps", 30, "--data", text)
    wild = ("--lr", 3e30, "--set", "warmup_steps=0", "--set", "grad_clip=0", "--eval-every", 100)
    status, _, errors = subquad("train", tmp_path / "run 1", *size, *wild)
    again = command("subquad", "train", tmp_path / "run 1", "--resume", "--lr", "1e+30")
    assert status == 1 and "the loss is" in errors and again in errors
    tame = ("--lr", 1e-3, "--set", "grad_clip=1")
    status, _, said = subquad("train", tmp_path / "run 1", "--resume", *tame)
    assert status == 0, said  # from the start, as there is no checkpoint yet


def test_a_lost_reader_of_stderr_costs_no_training(text, tmp_path):
    arguments = ("train", tmp_path / "run", "--data", text, "--hidden-size", 16, "--layers", 1)
    code = "import subquad.train.progress as p; p._PLAIN_SECONDS = 0; from subquad.cli import main"
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"{code}; main()",
            *map(str, arguments),
            "--seq-len",
            "16",
            "--steps",
            "30",
        ],
        stderr=subprocess.PIPE,
    )
    process.stderr.readline()
    process.stderr.close()
    assert process.wait(120) == 0
    assert (tmp_path / "run" / "model").is_dir()


def test_ctrl_c_before_the_training_is_a_shells_status_and_no_traceback(
    subquad, monkeypatch, tmp_path
):
    def press(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("subquad.cli.train_body.train", press)
    assert subquad("train", tmp_path / "run") == (130, "", "")


def test_a_terminal_finds_no_commands_in_what_a_model_says():
    assert printable("a\tb\n\x1b[31mé\x07\x9b2J") == "a\tb\n\ufffd[31mé\ufffd\ufffd2J"


def test_a_command_can_be_copied():
    expected = "subquad generate 'data dir é/run 1'"
    assert os.name == "nt" or command("subquad", "generate", "data dir é/run 1") == expected
