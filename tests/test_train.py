"""Training: it learns, it repeats itself exactly, and it refuses what it cannot do."""

import dataclasses
import json
import math
import os
import shutil
import signal
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from subquad import files
from subquad.mixers import MIXERS
from subquad.train import CheckpointError, TrainConfig, TrainingError, load_corpus, train
from subquad.train.metrics import read_metrics
from subquad.train.optimizer import learning_rate, make_optimizer
from subquad.train.rng import rng_state, set_rng_state
from subquad.train.run import RunDirectory

GLA = {"mixer": "gla", "hidden_size": 16, "num_hidden_layers": 1}
HYBRID = {"layers": ["mamba2", "softmax_attention", "gated_deltanet"], "hidden_size": 32}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("".join(f"line {i}: {i * i} is the square of {i}\n" for i in range(500)))
    return path


@pytest.fixture
def config(text):
    return TrainConfig(
        model=GLA,
        data=str(text),
        steps=8,
        batch_size=4,
        seq_len=32,
        eval_every=3,
        eval_tokens=256,
        checkpoint_every=3,
        device="cpu",
    )


def interrupt_after(step, number=signal.SIGINT):
    """An `on_event` that presses Ctrl-C while `step` is being reported."""

    def on_event(record):
        if record["kind"] == "train" and record["step"] == step:
            signal.raise_signal(number)

    return on_event


def untimed(records):
    return [
        {k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second")} for r in records
    ]


def assert_same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- what it learns and reports


def test_it_learns(config):
    result = train(dataclasses.replace(config, steps=120, lr=1e-2))
    assert result.losses[0] > 5
    assert result.bits_per_byte < 2.5  # 8 to begin with; the letters' own entropy is about 3.4
    assert result.tokens_per_second > 0 and not result.interrupted and result.run_dir is None


def test_records_and_result_agree(config, tmp_path):
    events = []
    result = train(config, tmp_path / "run", on_event=events.append)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert lines == result.history == [e for e in events if e["kind"] in ("train", "eval")]
    assert [r["step"] for r in lines if r["kind"] == "train"] == list(range(1, 9))
    assert [r["step"] for r in lines if r["kind"] == "eval"] == [3, 6, 8]
    assert [e["step"] for e in events if e["kind"] == "checkpoint"] == [3, 6, 8]
    assert result.bits_per_byte == lines[-1]["bits_per_byte"]
    assert (
        result.parameters
        == events[0]["parameters"]
        == sum(p.numel() for p in result.model.parameters())
    )


def test_bits_per_byte_of_byte_tokens_is_the_loss_in_bits(config):
    record = train(dataclasses.replace(config, steps=1)).history[0]  # one document: no separators
    assert record["bits_per_byte"] == pytest.approx(record["loss"] / math.log(2))


def test_bits_per_byte_counts_bytes_whatever_the_tokenizer(config, text, tmp_path):
    from tokenizers import Tokenizer, models, trainers

    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False)
    tokenizer.train_from_iterator([text.read_text()], trainer)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    result = train(dataclasses.replace(config, steps=1, tokenizer=str(path), eval_tokens=1 << 20))
    score = result.history[-1]
    corpus = load_corpus(str(text), tokenizer=str(path))
    assert len(corpus.heldout) < 0.6 * corpus.heldout.byte_counts.sum()
    assert score["bytes"] > score["tokens"] / 0.6
    assert score["bits_per_byte"] == pytest.approx(
        score["loss"] * score["tokens"] / math.log(2) / score["bytes"]
    )


def test_accumulation_changes_the_memory_not_the_step(config):
    whole = train(dataclasses.replace(config, steps=3))
    parts = train(dataclasses.replace(config, steps=3, accumulate=4))
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)


def test_bf16_autocast_keeps_float32_weights(config):
    result = train(dataclasses.replace(config, steps=3, precision="bf16"))
    exact = train(dataclasses.replace(config, steps=3))
    assert result.losses != exact.losses
    assert result.losses == pytest.approx(exact.losses, rel=0.02)
    assert {p.dtype for p in result.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_the_callers_autocast_keeps_no_weights_as_they_were(config, precision):
    config = dataclasses.replace(config, precision=precision)
    with torch.autocast("cpu", torch.bfloat16):
        within = train(config)
    assert within.losses == train(config).losses


def test_rows_see_the_same_batches(config, monkeypatch):
    from subquad.train.data import Batches

    seen = {}
    batch = Batches.batch

    def spy(self, step):
        seen.setdefault(row, []).append(batch(self, step)[0])
        return batch(self, step)

    monkeypatch.setattr(Batches, "batch", spy)
    for row in ("gla", "deltanet"):
        train(dataclasses.replace(config, model={**GLA, "mixer": row}, steps=4))
    assert all(torch.equal(a, b) for a, b in zip(seen["gla"], seen["deltanet"]))


def test_the_model_may_be_a_subquad_config_or_a_row(config):
    from subquad import SubquadConfig

    small = SubquadConfig(**GLA)
    a = train(dataclasses.replace(config, model=small, steps=2))
    b = train(dataclasses.replace(config, model=GLA, steps=2))
    assert a.losses == b.losses
    assert TrainConfig(model="gla") == TrainConfig(model={"mixer": "gla"})


def test_the_final_model_is_an_ordinary_hugging_face_folder(config, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = train(config, tmp_path / "run")
    folder = tmp_path / "run" / "model"
    model, tokenizer = (
        cls.from_pretrained(folder) for cls in (AutoModelForCausalLM, AutoTokenizer)
    )
    ids = tokenizer("line 7: 49", return_tensors="pt").input_ids
    assert ids.tolist() == [list(b"line 7: 49")]
    assert_same_weights(model, result.model)
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, result.model.eval()(ids).logits)
    assert [p.name for p in (tmp_path / "run").iterdir() if "unfinished" in p.name] == []


# ---- optimizer


def test_only_matrices_decay(config):
    from subquad import SubquadConfig, SubquadForCausalLM

    rows = ["mamba2", "gated_deltanet"]
    model = SubquadForCausalLM(SubquadConfig(layers=rows, hidden_size=32))
    decaying, exempt = make_optimizer(model, config).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    assert decaying["weight_decay"] == 0.1 and exempt["weight_decay"] == 0
    assert len(decaying["params"]) + len(exempt["params"]) == len(names)
    assert all(p.ndim >= 2 for p in decaying["params"])
    free = {names[id(p)].rsplit(".", 1)[-1] for p in exempt["params"]}
    assert {"A_log", "dt_bias", "D"} <= free
    matrix = torch.nn.Linear(2, 2, bias=False)
    matrix.weight._no_weight_decay = True
    (only,) = make_optimizer(matrix, config).param_groups
    assert only["weight_decay"] == 0


def test_schedule_warms_up_and_falls():
    config = TrainConfig(steps=100, warmup_steps=10, lr=1.0, min_lr_ratio=0.1)
    rates = [learning_rate(step, config) for step in range(101)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert (
        rates[10] == 1.0 and rates[55] == pytest.approx(0.55) and rates[100] == pytest.approx(0.1)
    )
    assert all(a > b for a, b in pairwise(rates[10:]))


# ---- resuming


@pytest.mark.parametrize("row", [*MIXERS, "hybrid"])
def test_resume_is_bitwise(config, tmp_path, row):
    """Stopped twice, once between checkpoints, once by SIGTERM: the same records and weights."""
    one = {"mixer": row, "hidden_size": 32, "num_hidden_layers": 1}
    config = dataclasses.replace(config, model=HYBRID if row == "hybrid" else one)
    expected = train(config, tmp_path / "whole")
    first = train(config, tmp_path / "cut", on_event=interrupt_after(2))
    assert first.interrupted and first.step == 2
    second = train(
        config, tmp_path / "cut", resume=True, on_event=interrupt_after(6, signal.SIGTERM)
    )
    assert second.interrupted and second.step == 6
    last = train(config, tmp_path / "cut", resume=True)
    assert not last.interrupted and last.step == 8
    assert_same_weights(last.model, expected.model)
    assert untimed(last.history) == untimed(expected.history)
    assert last.history == read_metrics(tmp_path / "cut" / "metrics.jsonl")


def test_resuming_a_finished_run_changes_nothing(config, tmp_path):
    done = train(config, tmp_path / "run")
    again = train(config, tmp_path / "run", resume=True)
    assert again.history == done.history
    assert_same_weights(again.model, done.model)


def test_more_steps_continue_a_finished_run(config, tmp_path):
    done = train(config, tmp_path / "run")
    longer = dataclasses.replace(config, steps=12)
    train(longer, tmp_path / "run", resume=True, on_event=interrupt_after(10))
    assert not (tmp_path / "run" / "model").exists()  # it would be the old one
    more = train(longer, tmp_path / "run", resume=True)
    assert more.step == 12 and more.losses[:8] == done.losses and len(more.losses) == 12
    assert TrainConfig.load(tmp_path / "run").steps == 12
    with pytest.raises(ValueError, match=r"steps: got 8, but .* already beyond"):
        train(config, tmp_path / "run", resume=True)
    assert TrainConfig.load(tmp_path / "run").steps == 12


def test_a_damaged_checkpoint_is_told_and_the_previous_one_used(config, tmp_path):
    expected = train(config, tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "step-00000008" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)
    load_file(file)  # safetensors itself does not notice
    events = []
    result = train(config, tmp_path / "run", resume=True, on_event=events.append)
    said = [e["text"] for e in events if e["kind"] == "message"]
    assert "step-00000008/model.safetensors is damaged" in said[0]
    assert said[1] == "resuming after step 6"
    assert_same_weights(result.model, expected.model)
    assert untimed(result.history) == untimed(expected.history)


def test_metrics_torn_by_a_kill_are_mended_and_damaged_ones_named(config, tmp_path):
    train(config, tmp_path / "run", on_event=interrupt_after(4))
    metrics = tmp_path / "run" / "metrics.jsonl"
    whole = metrics.read_bytes()
    metrics.write_bytes(whole + b'{"kind": "train", "st')
    assert len(read_metrics(metrics)) == whole.count(b"\n")
    train(config, tmp_path / "run", resume=True)
    assert [r["step"] for r in read_metrics(metrics)] == [1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 8]
    for damage in (
        b"\x00",
        b"3\n",
        b"{}\n",
        b'{"kind": "train", "step": 1}\n',
        b"[" * 10**5 + b"\n",
    ):
        metrics.write_bytes(damage + whole)
        with pytest.raises(ValueError, match=r"line 1 is damaged: .* Fix: delete the file"):
            train(config, tmp_path / "run", resume=True)


def test_lost_metrics_are_reported(config, tmp_path):
    train(config, tmp_path / "run", on_event=interrupt_after(5))
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_bytes(b"".join(metrics.read_bytes().splitlines(keepends=True)[:2]))
    events = []
    result = train(config, tmp_path / "run", resume=True, on_event=events.append)
    said = [e["text"] for e in events if e["kind"] == "message"]
    assert said[0] == "metrics.jsonl has lost 3 records, of steps 3 to 5"
    assert len(result.losses) == 5 and result.step == 8


def test_random_state_goes_there_and_back():
    device = torch.device("cpu")
    state = json.loads(json.dumps(rng_state(device)))
    drawn = torch.rand(5)
    set_rng_state(state, device)
    assert torch.equal(torch.rand(5), drawn)


def test_the_callers_random_numbers_and_signals_are_left_alone(config):
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    state = torch.get_rng_state()
    train(dataclasses.replace(config, steps=1, seed=5))
    assert torch.equal(torch.get_rng_state(), state)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_second_ctrl_c_insists(config, tmp_path):
    def twice(record):
        if record["kind"] == "train" and record["step"] == 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run", on_event=twice)


# ---- what it refuses


def test_a_directory_with_something_in_it_is_left_alone(config, tmp_path):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(ValueError, match="is not empty"):
        train(config, tmp_path)
    with pytest.raises(ValueError, match="no run to resume"):
        train(config, tmp_path, resume=True)
    with pytest.raises(ValueError, match="is a file"):
        train(config, tmp_path / "mine")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("mine", "precious")]


def test_an_existing_run_is_neither_overwritten_nor_contradicted(config, text, tmp_path):
    train(dataclasses.replace(config, steps=1), tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="--resume continues it"):
        train(config, tmp_path / "run")
    with pytest.raises(ValueError, match=r"other settings: seed was 0, now 5"):
        train(dataclasses.replace(config, seed=5), tmp_path / "run", resume=True)
    other = tmp_path / "other.txt"
    other.write_text(text.read_text().replace("square", "SQUARE"))
    text_before = text.read_text()
    try:
        text.write_text(other.read_text())
        with pytest.raises(ValueError, match=r"is not what .* was trained on"):
            train(config, tmp_path / "run", resume=True)
    finally:
        text.write_text(text_before)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_two_processes_cannot_train_in_one_directory(config, tmp_path):
    with (
        RunDirectory.create(tmp_path / "run"),
        pytest.raises(ValueError, match="another process is training"),
    ):
        train(config, tmp_path / "run", resume=True)
    train(config, tmp_path / "run", resume=True)  # never began: starts at the beginning


def test_the_schedule_may_change_on_resume_and_that_is_said_and_recorded(config, tmp_path):
    train(config, tmp_path / "run", on_event=interrupt_after(4))
    slower = dataclasses.replace(config, lr=1e-3, weight_decay=0.0)
    events = []
    for stopped_at in (5, None):  # before there is a checkpoint with the new rate, and to the end
        stop = interrupt_after(stopped_at) if stopped_at else lambda record: None

        def listen(record, stop=stop):
            events.append(record)
            stop(record)

        result = train(slower, tmp_path / "run", resume=True, on_event=listen)
    said = [e["text"] for e in events if e["kind"] == "message"]
    assert "lr was 0.003, from here on 0.001" in said
    assert "weight_decay was 0.1, from here on 0.0" in said
    assert sum("from here on" in text for text in said) == 2  # the next checkpoint knows it
    changes = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "change"]
    settings = {"lr": [0.003, 0.001], "weight_decay": [0.1, 0.0]}
    assert changes == [{"kind": "change", "step": 4, "settings": settings}]
    rates = {r["step"]: r["lr"] for r in result.history if r["kind"] == "train"}
    assert rates[4] == learning_rate(3, config) and rates[6] == learning_rate(5, slower)


def test_a_diverged_run_goes_on_at_a_smaller_rate(config, tmp_path):
    wild = dataclasses.replace(config, lr=1e30, warmup_steps=2, grad_clip=0.0, checkpoint_every=1)
    with pytest.raises(TrainingError, match="also when resuming"):
        train(wild, tmp_path / "run")
    tame = dataclasses.replace(wild, lr=1e-3, grad_clip=1.0)
    if not list((tmp_path / "run" / "checkpoints").glob("step-*")):
        assert train(tame, tmp_path / "run", resume=True).step == 8
    else:  # the weights have had a step of that size
        with pytest.raises(TrainingError):
            train(tame, tmp_path / "run", resume=True)


def test_an_edited_config_is_not_believed_and_a_foreign_checkpoint_refused(config, tmp_path):
    """What a checkpoint was trained with, it knows itself."""
    for name in ("run", "other"):
        train(config, tmp_path / name, on_event=interrupt_after(4))
    file = tmp_path / "run" / "config.json"
    record = json.loads(file.read_text())
    for field, value in (("seed", 7), ("batch_size", 2)):
        file.write_text(json.dumps(record | {"train": record["train"] | {field: value}}))
        with pytest.raises(ValueError, match=rf"resume: .*step-00000004 began .* {field} was"):
            train(TrainConfig.load(tmp_path / "run"), tmp_path / "run", resume=True)
    file.write_text(json.dumps(record | {"train": record["train"] | {"lr": 0.5}}))
    said = []
    train(
        TrainConfig.load(tmp_path / "run"), tmp_path / "run", resume=True,
        on_event=lambda r: said.append(r.get("text")),
    )  # fmt: skip
    assert "lr was 0.003, from here on 0.5" in said
    file.write_text(json.dumps(record))
    ours, theirs = (tmp_path / n / "checkpoints" / "step-00000004" for n in ("run", "other"))
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        shutil.rmtree(checkpoint)
    shutil.copytree(theirs, ours)
    with pytest.raises(ValueError, match=r"resume: .*step-00000004 is a checkpoint of another run"):
        train(config, tmp_path / "run", resume=True)


@pytest.mark.parametrize("what", ["removed", "renamed", "replaced"])
def test_a_directory_that_goes_away_ends_the_training_and_is_not_made_anew(config, tmp_path, what):
    run, moved = tmp_path / "run", tmp_path / "moved"

    def vanish(record):
        if record["kind"] == "train" and record["step"] == 4:
            shutil.rmtree(run) if what == "removed" else run.rename(moved)
            if what == "replaced":
                RunDirectory.create(run).__exit__()

    with pytest.raises(CheckpointError, match=r"was removed or renamed while it was in training"):
        train(config, run, on_event=vanish)
    assert run.exists() == (what == "replaced")
    if what != "removed":  # where it went it can be resumed
        assert train(config, moved, resume=True).step == 8


@pytest.mark.parametrize("damage", ["a directory", "a dangling link", "unreadable", "a file"])
def test_a_checkpoint_that_cannot_be_read_is_passed_over(config, tmp_path, damage, monkeypatch):
    expected = train(config, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step-00000008"
    file = newest / "optimizer.safetensors"
    if damage == "a file":
        shutil.rmtree(newest)
        newest.write_text("no folder")
    elif damage == "unreadable":
        real = files._sum

        def refuse(path):
            if path == file:
                raise OSError(5, "Input/output error")
            return real(path)

        monkeypatch.setattr(files, "_sum", refuse)
    else:
        file.unlink()
        file.mkdir() if damage == "a directory" else file.symlink_to(tmp_path / "nowhere")
    (tmp_path / "run" / "checkpoints" / ".unfinished-9").write_text("stray")
    (tmp_path / "run" / ".model-unfinished").write_text("stray")
    said = []
    result = train(
        config, tmp_path / "run", resume=True, on_event=lambda r: said.append(r.get("text") or "")
    )
    assert "step-00000008" in said[0] and "resuming after step 6" in said
    assert_same_weights(result.model, expected.model)


@pytest.mark.skipif(os.name == "nt", reason="names are UTF-16 there")
def test_a_path_that_is_not_utf8_is_refused_before_anything_is_trained(config, tmp_path):
    place = tmp_path / os.fsdecode(b"run\xff")
    with pytest.raises(ValueError, match=r"^run_dir: got .*expected a path in UTF-8"):
        train(config, place)
    assert not list(tmp_path.iterdir())


def test_a_run_inside_its_own_data_can_be_resumed(config, text, tmp_path):
    (tmp_path / "text.txt").write_text(text.read_text())
    inside = dataclasses.replace(config, data=str(tmp_path))
    train(inside, tmp_path / "runs" / "gla", on_event=interrupt_after(4))
    assert train(inside, tmp_path / "runs" / "gla", resume=True).step == 8


def test_resume_needs_a_run(config, tmp_path):
    with pytest.raises(ValueError, match="there is no run at"):
        train(config, tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match="needs a run_dir"):
        train(config, resume=True)


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(config, tmp_path):
    wild = dataclasses.replace(config, lr=1e30, warmup_steps=0, grad_clip=0.0, checkpoint_every=1)
    with pytest.raises(TrainingError, match=r"step \d: the loss is .* a smaller lr"):
        train(wild, tmp_path / "run")


def test_a_full_disk_is_one_clear_error_and_costs_no_checkpoint(config, tmp_path, monkeypatch):
    """Writing fails at the second checkpoint; what was saved before resumes to the same end."""
    expected = train(config, tmp_path / "whole")

    def full(model, tokenizer, folder):
        raise OSError(28, "No space left on device")

    def fill_disk(record):
        if record["kind"] == "checkpoint":
            monkeypatch.setattr("subquad.train.session.write_model", full)

    with pytest.raises(CheckpointError, match=r"No space left.*step-00000003"):
        train(config, tmp_path / "run", on_event=fill_disk)
    monkeypatch.undo()
    result = train(config, tmp_path / "run", resume=True)
    assert_same_weights(result.model, expected.model)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch_size", -1),
        ("seq_len", 2.5),
        ("lr", 0.0),
        ("lr", math.nan),
        ("lr", 1e38),
        ("weight_decay", 1e300),
        ("min_lr_ratio", 2.0),
        ("warmup_steps", -1),
        ("weight_decay", -0.1),
        ("betas", (0.9, 1.0)),
        ("betas", (0.9,)),
        ("betas", 0.9),
        ("grad_clip", -1.0),
        ("precision", "fp8"),
        ("accumulate", 3),
        ("seed", -1),
        ("keep", 0),
        ("model", 3),
        ("steps", "many"),
        ("lr", "fast"),
        ("data", 3),
        ("eval_every", True),
    ],
)
def test_bad_settings_are_named(field, value):
    with pytest.raises(ValueError, match=f"^{field}: got"):
        TrainConfig(**{field: value})


def test_bad_models_and_devices_are_named(config):
    with pytest.raises(ValueError, match="mixer"):
        train(dataclasses.replace(config, model="gpt5"))
    with pytest.raises(ValueError, match="vocab_size is 100"):
        train(dataclasses.replace(config, model={**GLA, "vocab_size": 100}))
    with pytest.raises(ValueError, match="device: got 'abacus'"):
        train(dataclasses.replace(config, device="abacus"))


def test_config_goes_to_json_and_back(config, tmp_path):
    train(dataclasses.replace(config, steps=1), tmp_path / "run")
    assert TrainConfig.load(tmp_path / "run") == dataclasses.replace(config, steps=1)
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["versions"]["torch"] == torch.__version__
    with pytest.raises(ValueError, match=r"unknown training settings \['stpes'\]"):
        TrainConfig.from_json({"stpes": 3})
    with pytest.raises(ValueError, match="no training run"):
        TrainConfig.load(tmp_path)
    for content in ("[1]", "{", '{"train": 3}', '{"steps": [[' + "[" * 10**5):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match="not a training config"):
            TrainConfig.load(tmp_path)
