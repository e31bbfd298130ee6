"""A run's directory: who may write to it, and what lies where.

RUN/config.json       the resolved settings and the versions they ran with
RUN/metrics.jsonl     one record per training step and per held-out evaluation
RUN/checkpoints/      see subquad.train.checkpoint
RUN/model/            the model as an ordinary Hugging Face folder, tokenizer beside it
"""

import fcntl
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from subquad import __version__
from subquad.train.checkpoint import sync, sync_tree
from subquad.train.config import RESUMABLE, TrainConfig


class RunDirectory:
    """Holds the directory's lock while open; made by `create` or `reopen`."""

    def __init__(self, path: Path, config: TrainConfig) -> None:
        self.path = path
        self._lock = _lock(path)
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"
        self._write_config(config)
        self._metrics_path = path / "metrics.jsonl"
        self._metrics = self._metrics_path.open("ab")

    @classmethod
    def create(cls, path: str | Path, config: TrainConfig) -> "RunDirectory":
        """Make a new run directory. ValueError if `path` holds anything, or is not a directory."""
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise ValueError(f"run_dir: {path} is a file; expected a new or empty directory")
        if path.exists() and any(path.iterdir()):
            fix = "--resume continues it" if (path / "config.json").exists() else "it is not a run"
            raise ValueError(f"run_dir: {path} is not empty ({fix}); give another directory")
        path.mkdir(parents=True, exist_ok=True)
        return cls(path, config)

    @classmethod
    def reopen(cls, path: str | Path, config: TrainConfig) -> "RunDirectory":
        """Open an existing run to continue it. ValueError if there is none or it was different."""
        path = Path(path)
        if not path.is_dir():
            raise ValueError(f"run_dir: there is no run at {path} to resume")
        # A run killed in its first instant has no config yet: then there is nothing to contradict.
        if (path / "config.json").exists():
            changed = config.differences(TrainConfig.load(path))
            refused = {name: pair for name, pair in changed.items() if name not in RESUMABLE}
            if refused:
                told = ", ".join(
                    f"{name} was {old!r}, now {new!r}" for name, (new, old) in refused.items()
                )
                raise ValueError(f"resume: {path} began with other settings: {told}")
        elif any(not p.name.startswith(".") for p in path.iterdir()):
            raise ValueError(f"run_dir: {path} has no config.json, so it is no run to resume")
        return cls(path, config)

    def record(self, record: dict[str, Any]) -> None:
        """Append one line to the metrics, at once visible to readers and safe from a kill."""
        self._metrics.write(json.dumps(record).encode() + b"\n")
        self._metrics.flush()

    def sync_metrics(self) -> None:
        """Force the metrics to the disk: a checkpoint must not outlive the records before it."""
        os.fsync(self._metrics.fileno())

    def rewind_metrics(self, step: int) -> list[dict[str, Any]]:
        """Drop the records after `step` (their steps are taken again) and return those before.

        One truncation of an ordered file: a kill during it leaves the old file or the new one.
        """
        records: list[dict[str, Any]] = []
        end = 0
        with self._metrics_path.open("rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):  # torn by a kill
                    break
                record = json.loads(line)
                if record["step"] > step:
                    break
                records.append(record)
                end += len(line)
        os.truncate(self._metrics_path, end)
        return records

    def export(self, model: Any, tokenizer: Any) -> None:
        """(Re)place RUN/model. A kill in between leaves the old folder, the new one, or none."""
        hidden = self.path / ".model-unfinished"
        shutil.rmtree(hidden, ignore_errors=True)
        save_model_folder(model, tokenizer, hidden)
        sync_tree(hidden)
        if self.model.exists():
            shutil.rmtree(self.model)
        hidden.rename(self.model)
        sync(self.path)

    def _write_config(self, config: TrainConfig) -> None:
        versions = {
            "subquad": __version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        }
        text = json.dumps({"train": config.to_json(), "versions": versions}, indent=1)
        hidden = self.path / ".config-unfinished"
        hidden.write_text(text + "\n", encoding="utf-8")
        sync(hidden)
        hidden.rename(self.path / "config.json")

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *exc: object) -> None:
        self._metrics.close()
        os.close(self._lock)


def save_model_folder(model: Any, tokenizer: Any, folder: Path) -> None:
    """An ordinary Hugging Face folder, written without transformers' own progress bar."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    finally:
        if shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _lock(path: Path) -> int:
    """Lock the directory for this process; the system frees the lock however the process ends."""
    descriptor = os.open(path / ".lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(f"run_dir: another process is training in {path}") from None
    return descriptor
