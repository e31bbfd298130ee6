"""Training on a task, kept while it lasts: a row that is stopped or killed is not begun anew."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_file, save_model

from subquad.files import read_json
from subquad.train import checkpoint
from subquad.train.optimizer import load_optimizer_tensors, optimizer_tensors
from subquad.train.rng import rng_state, set_rng_state
from subquad.train.task.run import TaskRun

_KEPT = 2  # one may be damaged


def save_run(root: Path, run: TaskRun) -> None:
    """Write everything that the next step depends on, wholly or not at all."""

    def write(folder: Path) -> None:
        save_model(run.model, str(folder / "model.safetensors"))
        save_file(optimizer_tensors(run.model, run.optimizer), folder / "optimizer.safetensors")
        state = {
            "asked": _asked(run),
            "step": run.step,
            "seconds": run.seconds,
            "clock": run.clock.passed,
            "late": run.late,
            "solved": run.solved,
            "looked": run.looked,
            "sums": run.sums.tolist(),
            "history": run.history,
            "rng": rng_state(run.device),
        }
        (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")

    checkpoint.save(root, run.step, write, keep=_KEPT)


def load_run(root: Path, run: TaskRun, say: Callable[[str], None]) -> None:
    """Make `run` what was kept in `root`, if anything was.

    Raises ValueError if that was the training of something else.
    """
    if not root.exists():
        return
    checkpoint.clean(root)
    folder = checkpoint.newest_good(root, say)
    if folder is None:
        return
    state = read_json(folder / "state.json", most=1 << 30)
    if state["asked"] != _asked(run):
        raise ValueError(f"{root} holds the training of another model or task; delete it")
    load_model(run.model, folder / "model.safetensors", device=str(run.device))
    tensors = load_file(folder / "optimizer.safetensors")
    load_optimizer_tensors(run.model, run.optimizer, tensors)
    set_rng_state(state["rng"], run.device)
    run.step, run.seconds = state["step"], state["seconds"]
    run.clock.passed = state["clock"]
    run.late, run.solved, run.looked = state["late"], state["solved"], state["looked"]
    run.sums.copy_(torch.tensor(state["sums"], dtype=torch.float64))
    run.history[:] = state["history"]
    say(f"continuing after step {run.step}")


def _asked(run: TaskRun) -> Any:
    """The task and the settings, as JSON has them."""
    asked = {"task": run.task.name, "settings": asdict(run.task), "config": run.config.to_json()}
    return json.loads(json.dumps(asked))
