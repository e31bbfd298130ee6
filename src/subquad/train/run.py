"""A run's directory: who may write to it, and what lies where.

RUN/config.json       which run it is, its resolved settings, and the versions it ran with
RUN/metrics.jsonl     one record per training step, per held-out evaluation, per change of settings
RUN/checkpoints/      see subquad.train.checkpoint
RUN/model/            the model as an ordinary Hugging Face folder, tokenizer beside it
"""

import json
import os
import platform
import secrets
from pathlib import Path
from typing import Any, BinaryIO

import torch

from subquad import __version__
from subquad.files import (
    check_path,
    read_json,
    remove,
    sync,
    sync_tree,
    take_lock,
    write_json,
    write_sums,
)
from subquad.models.folder import write_model
from subquad.train.checkpoint import CheckpointError
from subquad.train.config import TrainConfig
from subquad.train.metrics import read_metrics

_LOCK, _CONFIG = ".lock", "config.json"


class RunDirectory:
    """Holds the directory's lock while open; made by `create` or `reopen`."""

    def __init__(self, path: Path, identity: str | None = None) -> None:
        self.path = path
        self.identity = identity or secrets.token_hex(8)
        try:
            self._lock = take_lock(path / _LOCK)
        except OSError:
            raise ValueError(f"run_dir: another process is training in {path}") from None
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"
        self._metrics_path = path / "metrics.jsonl"
        self._metrics: BinaryIO | None = None

    @classmethod
    def create(cls, path: str | Path) -> "RunDirectory":
        """Make a new run directory. ValueError if `path` holds anything, or is not a directory."""
        path = Path(path)
        check_path("run_dir", path)
        if path.exists() and not path.is_dir():
            raise ValueError(f"run_dir: {path} is a file; expected a new or empty directory")
        if path.exists() and _holds_something(path):
            fix = "--resume continues it" if (path / _CONFIG).exists() else "it is no run"
            raise ValueError(f"run_dir: {path} is not empty ({fix}); give another directory")
        path.mkdir(parents=True, exist_ok=True)
        return cls(path)

    @classmethod
    def reopen(cls, path: str | Path, config: TrainConfig) -> "RunDirectory":
        """Open a run to continue it. ValueError if there is none or its settings were others."""
        path = Path(path)
        if not path.is_dir():
            raise ValueError(f"run_dir: there is no run at {path} to resume")
        # A run killed in its first instant has no config yet: then there is nothing to contradict.
        if not (path / _CONFIG).exists():
            if _holds_something(path):
                raise ValueError(f"run_dir: {path} has no config.json, so it is no run to resume")
            return cls(path)
        config.changes_since(TrainConfig.load(path), str(path))
        identity = read_json(path / _CONFIG).get("run")
        return cls(path, identity if isinstance(identity, str) else None)

    def start(self, config: TrainConfig) -> None:
        """Save the settings, and the versions they run with; from here on `record` works."""
        versions = {
            "subquad": __version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        }
        record = {"run": self.identity, "train": config.to_json(), "versions": versions}
        write_json(self.path / _CONFIG, record)
        self._metrics = self._metrics_path.open("ab")

    def check_place(self) -> None:
        """CheckpointError if the directory is no longer where it was: removed, renamed, replaced.

        A new one in its place would get the weights, while the metrics went on in the old one.
        """
        try:
            there = os.stat(self.path / _LOCK)
        except OSError:
            there = None
        if there is None or not os.path.samestat(there, os.fstat(self._lock)):
            raise CheckpointError(
                f"run_dir: {self.path} was removed or renamed while it was in training; its "
                "checkpoints are wherever it is now"
            )

    def record(self, record: dict[str, Any]) -> None:
        """Append one line to the metrics, at once visible to readers and safe from a kill."""
        assert self._metrics is not None, "not started"
        self.check_place()
        self._metrics.write(json.dumps(record).encode() + b"\n")
        self._metrics.flush()

    def sync_metrics(self) -> None:
        """Force the metrics to the disk: a checkpoint must not outlive the records before it."""
        assert self._metrics is not None, "not started"
        os.fsync(self._metrics.fileno())

    def rewind_metrics(self, step: int) -> list[dict[str, Any]]:
        """Drop the records after `step` (their steps are taken again) and return those before.

        One truncation of an ordered file: a kill during it leaves the old file or the new one.
        """
        if not self._metrics_path.exists():
            return []
        kept = [r for r in read_metrics(self._metrics_path) if r["step"] <= step]
        while kept and kept[-1]["kind"] == "change" and kept[-1]["step"] == step:
            kept.pop()  # it was made after the checkpoint that is gone back to
        with self._metrics_path.open("rb") as lines:
            end = sum(len(next(lines)) for _ in kept)
        os.truncate(self._metrics_path, end)
        return kept

    def export(self, model: Any, tokenizer: Any) -> None:
        """(Re)place RUN/model. A kill in between leaves the old folder, the new one, or none."""
        self.check_place()
        hidden = self.path / ".model-unfinished"
        remove(hidden)
        write_model(model, tokenizer, hidden)
        write_sums(hidden)
        sync_tree(hidden)
        remove(self.model)
        hidden.rename(self.model)
        sync(self.path)

    def withdraw_model(self) -> None:
        """Remove RUN/model, which is no longer the newest once training continues."""
        remove(self.model)

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._metrics is not None:
            self._metrics.close()
        os.close(self._lock)


def _holds_something(path: Path) -> bool:
    """More, that is, than a run killed in its first instant leaves."""
    return any(p.name != _LOCK and not p.name.startswith(f".{_CONFIG}.") for p in path.iterdir())
