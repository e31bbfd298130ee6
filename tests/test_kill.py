"""kill -9 at any moment costs at most the steps since the last checkpoint, and never a checkpoint.

A fork server that has imported torch once starts every victim, so that a kill costs well under a
second. Victims die at random moments, or at a chosen system call inside a save: Python reports each
file it opens, renames or removes to an audit hook, and the hook can make that the last thing done.
"""

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from subquad.train import TrainConfig, checkpoint, train
from subquad.train.metrics import read_metrics

if not hasattr(signal, "SIGKILL"):
    pytest.skip("this system has no SIGKILL", allow_module_level=True)

EVERY = 2  # steps between checkpoints: a large part of the time goes into saving


def config_for(text: Path, steps: int) -> TrainConfig:
    return TrainConfig(
        model={"mixer": "gla", "hidden_size": 16, "num_hidden_layers": 1},
        data=str(text),
        steps=steps,
        batch_size=2,
        seq_len=16,
        eval_every=5,
        eval_tokens=64,
        checkpoint_every=EVERY,
        keep=2,
        device="cpu",
    )


def victim(config: TrainConfig, run: Path, log: Path, fatal_event: int | None) -> None:
    """Start or continue the run, noting every step; die at the `fatal_event`-th file event."""
    torch.set_num_threads(1)
    with log.open("ab", buffering=0) as notes:

        def note(record):
            if record["kind"] in ("train", "checkpoint"):
                notes.write(f"{record['kind']} {record['step']}\n".encode())

        if fatal_event is not None:
            die_at_file_event(fatal_event, str(run))
        train(config, run, resume=run.exists(), on_event=note)


def die_at_file_event(number: int, inside: str) -> None:
    seen = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event in FILE_EVENTS and str(arguments[0]).startswith(inside):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


FILE_EVENTS = {
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.truncate",
    "shutil.rmtree",
}


@pytest.fixture(scope="module")
def fork_server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["subquad.train", "subquad.models"])
    return context


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("".join(f"line {i}: {i * i} is the square of {i}\n" for i in range(500)))
    return path


def noted(log: Path, kind: str) -> int:
    """The last step that the log has of this kind; 0 if none."""
    lines = log.read_text().splitlines() if log.exists() else []
    return max((int(line.split()[1]) for line in lines if line.startswith(kind)), default=0)


def check_wreck(run: Path, log: Path) -> int:
    """What every kill must leave behind. Returns the step to resume from."""
    saved = checkpoint.checkpoints(run / "checkpoints")
    for path in saved:
        checkpoint.verify(path)
    newest = checkpoint.step_of(saved[-1]) if saved else 0
    assert newest >= noted(log, "checkpoint")
    assert newest >= noted(log, "train") - EVERY
    metrics = run / "metrics.jsonl"
    records = read_metrics(metrics) if metrics.exists() else []
    steps = [r["step"] for r in records if r["kind"] == "train"]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= newest
    return newest


def finish_and_compare(config: TrainConfig, run: Path, reference: Path) -> None:
    torch.set_num_threads(1)
    result = train(config, run, resume=True)
    expected = train(config, reference)
    assert result.losses == expected.losses and len(result.losses) == config.steps
    wanted, got = (load_file(d / "model" / "model.safetensors") for d in (reference, run))
    assert wanted.keys() == got.keys()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    assert without_times(run) == without_times(reference)


def without_times(run: Path) -> list[dict]:
    timing = {"seconds", "tokens_per_second"}
    records = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k not in timing} for r in records]


def kill_at_random_moments(fork_server, text, folder, kills: int) -> None:
    chance = random.Random(kills)
    config, run, log = config_for(text, steps=8 * kills), folder / "run", folder / "log"
    during_save = 0
    for _ in range(kills):
        process = fork_server.Process(target=victim, args=(config, run, log, None))
        process.start()
        target = noted(log, "train") + chance.randint(1, 6)
        deadline = time.monotonic() + 60
        while process.is_alive() and noted(log, "train") < target:
            assert time.monotonic() < deadline, "the victim makes no progress"
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.03))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        check_wreck(run, log)
        during_save += any((run / "checkpoints").glob(".unfinished-*"))
        log.unlink()  # the next victim takes some of these steps again
    print(f"{during_save} of {kills} kills came during a save")
    finish_and_compare(config, run, folder / "reference")


def test_five_kills(fork_server, text, tmp_path):
    kill_at_random_moments(fork_server, text, tmp_path, kills=5)


@pytest.mark.slow
def test_fifty_kills(fork_server, text, tmp_path):
    kill_at_random_moments(fork_server, text, tmp_path, kills=50)


def test_kills_at_chosen_moments_of_a_save(fork_server, text, tmp_path):
    """Later and later in the life of a process, from its first file to surviving to the end."""
    chance = random.Random(0)
    config, run, log = config_for(text, steps=60), tmp_path / "run", tmp_path / "log"
    survived, during_save = False, 0
    for number in range(1, 1000, 6):
        process = fork_server.Process(
            target=victim, args=(config, run, log, number + chance.randint(0, 5))
        )
        process.start()
        process.join(60)
        if process.exitcode == 0:
            survived = True
            break
        assert process.exitcode == -signal.SIGKILL
        if run.exists():
            check_wreck(run, log)
            during_save += any((run / "checkpoints").glob(".unfinished-*"))
        log.unlink(missing_ok=True)
    print(f"{during_save} of {number // 6} kills came during a save")
    assert survived, "no victim ever got through"
    finish_and_compare(config, run, tmp_path / "reference")
