"""What `subquad train` does with its arguments: settle the config, train, say where things are."""

from pathlib import Path
from typing import Any

from subquad.cli.compiling import watch_compiler
from subquad.cli.settle import row_name, settle
from subquad.cli.terminal import command, say, show_command, show_path, sidelines
from subquad.errors import fail
from subquad.table import ROWS
from subquad.train.config import TrainConfig
from subquad.train.loop import train
from subquad.train.progress import show_progress
from subquad.train.session import TrainingError


def train_command(
    run_dir: Path | None,
    *,
    given: dict[str, Any],
    model: dict[str, Any],
    settings: list[str],
    base: Path | None,
    start: Path | None,
    resume: bool,
) -> int:
    """Train as the command line says; the exit status, which is a signal's if one stopped it.

    `given` and `model` hold the options that were written.
    """
    if resume and run_dir is None:
        raise ValueError("--resume: name the run directory to continue, as in: train RUN --resume")
    for option, value in (("--config", base), ("--from", start)):
        if resume and value is not None:
            raise ValueError(f"{option}: a resumed run keeps its own settings; leave {option} out")
    chosen = bool(model or base or start or resume)
    config = settle(base or (run_dir if resume else None), given, model, settings, start)
    if run_dir is not None:
        _check_name(run_dir, config, chosen)
    title = row_name(config)
    run_dir = run_dir or Path("runs") / title
    console = sidelines()
    with (
        show_progress(title, console) as on_event,
        watch_compiler(lambda: on_event({"kind": "compiling"})),
    ):
        try:
            result = train(config, run_dir, resume=resume, on_event=on_event)
        except TrainingError as error:
            again = command("subquad", "train", run_dir, "--resume", "--lr", f"{config.lr / 3:.2g}")
            raise TrainingError(f"{error}: {again}") from error
    if result.stopped_by is not None:
        say(console, f"stopped and saved after step {result.step}; to continue:")
        show_command(console, "subquad", "train", run_dir, "--resume")
        return 128 + result.stopped_by
    score = f"{result.bits_per_byte:.4f} held-out bits/byte after {result.step} steps"
    say(console, f"done: {score}; to generate from it:")
    show_command(console, "subquad", "generate", run_dir)
    show_path(console, "Model", run_dir / "model")
    return 0


def _check_name(run_dir: Path, config: TrainConfig, chosen: bool) -> None:
    """Refuse a new run that has a row's name and trains another, or has it where a row was meant.

    `subquad train mamba` would train the default row, into ./mamba.
    """
    named = run_dir.name.lower()
    if named not in ROWS or (run_dir / "config.json").exists():
        return
    keywords = config.model_keywords
    trained = keywords.get("layers") or [keywords.get("mixer")]
    if named not in trained or not (chosen or run_dir.parent.name):
        got = f"{str(run_dir)!r}, the name of a row, for a run of {row_name(config)}"
        expected = "a run directory; the row is an option"
        raise fail("run_dir", got, expected, f"--mixer {named}, or another name")
