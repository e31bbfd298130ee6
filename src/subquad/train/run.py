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
from typing import Any, BinaryIO

import torch

from subquad import __version__
from subquad.files import sync, sync_tree, write_sums
from subquad.models.folder import write_model
from subquad.train.config import RESUMABLE, TrainConfig

_LOCK, _UNFINISHED_CONFIG = ".lock", ".config-unfinished"


class RunDirectory:
    """Holds the directory's lock while open; made by `create` or `reopen`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = _lock(path)
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"
        self._metrics_path = path / "metrics.jsonl"
        self._metrics: BinaryIO | None = None

    @classmethod
    def create(cls, path: str | Path) -> "RunDirectory":
        """Make a new run directory. ValueError if `path` holds anything, or is not a directory."""
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise ValueError(f"run_dir: {path} is a file; expected a new or empty directory")
        if path.exists() and _holds_something(path):
            fix = "--resume continues it" if (path / "config.json").exists() else "it is no run"
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
        if (path / "config.json").exists():
            changed = config.differences(TrainConfig.load(path))
            refused = {name: pair for name, pair in changed.items() if name not in RESUMABLE}
            if refused:
                told = ", ".join(
                    f"{name} was {old!r}, now {new!r}" for name, (new, old) in refused.items()
                )
                raise ValueError(f"resume: {path} began with other settings: {told}")
        elif _holds_something(path):
            raise ValueError(f"run_dir: {path} has no config.json, so it is no run to resume")
        return cls(path)

    def start(self, config: TrainConfig) -> None:
        """Save the settings, and the versions they run with; from here on `record` works."""
        versions = {
            "subquad": __version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        }
        text = json.dumps({"train": config.to_json(), "versions": versions}, indent=1)
        hidden = self.path / _UNFINISHED_CONFIG
        hidden.write_text(text + "\n", encoding="utf-8")
        sync(hidden)
        hidden.rename(self.path / "config.json")
        self._metrics = self._metrics_path.open("ab")

    def record(self, record: dict[str, Any]) -> None:
        """Append one line to the metrics, at once visible to readers and safe from a kill."""
        assert self._metrics is not None, "not started"
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
        with self._metrics_path.open("rb") as lines:
            end = sum(len(next(lines)) for _ in kept)
        os.truncate(self._metrics_path, end)
        return kept

    def export(self, model: Any, tokenizer: Any) -> None:
        """(Re)place RUN/model. A kill in between leaves the old folder, the new one, or none."""
        hidden = self.path / ".model-unfinished"
        shutil.rmtree(hidden, ignore_errors=True)
        write_model(model, tokenizer, hidden)
        write_sums(hidden)
        sync_tree(hidden)
        if self.model.exists():
            shutil.rmtree(self.model)
        hidden.rename(self.model)
        sync(self.path)

    def withdraw_model(self) -> None:
        """Remove RUN/model, which is no longer the newest once training goes on."""
        shutil.rmtree(self.model, ignore_errors=True)

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._metrics is not None:
            self._metrics.close()
        os.close(self._lock)


def _holds_something(path: Path) -> bool:
    """More, that is, than a run killed in its first instant leaves."""
    return any(p.name not in (_LOCK, _UNFINISHED_CONFIG) for p in path.iterdir())


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, in order; a last line torn by a kill is left out.

    Raises ValueError naming the line if one is no record.
    """
    records = []
    with Path(path).open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is damaged: {error}") from None
    return records


def _lock(path: Path) -> int:
    """Lock the directory for this process; the system frees the lock however the process ends."""
    descriptor = os.open(path / _LOCK, os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(f"run_dir: another process is training in {path}") from None
    return descriptor
