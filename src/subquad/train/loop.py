"""`train`: one function to read from top to bottom; what it names lies in session.py."""

import math
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from subquad.models.device import pick_device
from subquad.train.build import build_model, load_weights
from subquad.train.config import TrainConfig
from subquad.train.data import Corpus, load_corpus
from subquad.train.run import RunDirectory
from subquad.train.session import Record, Session
from subquad.train.signals import stop_on_signals


@dataclass
class TrainResult:
    """What `train` hands back. `history` holds every record of the run, resumed parts included.

    `stopped_by` is the signal that ended it before its last step, None if none did.
    """

    config: TrainConfig
    model: Any
    tokenizer: Any
    history: list[Record]
    step: int
    stopped_by: int | None
    run_dir: Path | None

    @property
    def interrupted(self) -> bool:
        return self.stopped_by is not None

    @property
    def losses(self) -> list[float]:
        """Training loss of every step, nats per token."""
        return [r["loss"] for r in self.history if r["kind"] == "train"]

    @property
    def bits_per_byte(self) -> float:
        """Held-out bits per byte at the last evaluation; NaN before the first."""
        evaluations = [r["bits_per_byte"] for r in self.history if r["kind"] == "eval"]
        return evaluations[-1] if evaluations else math.nan

    @property
    def tokens_per_second(self) -> float:
        """Median training speed over the steps, evaluation and saving not counted; NaN if none."""
        speeds = [r["tokens_per_second"] for r in self.history if r["kind"] == "train"]
        return statistics.median(speeds) if speeds else math.nan

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


def train(
    config: TrainConfig,
    run_dir: str | Path | None = None,
    *,
    resume: bool = False,
    on_event: Callable[[Record], None] | None = None,
    corpus: Corpus | None = None,
) -> TrainResult:
    """Train the model that `config` describes; the same config on the same machine ends the same.

    Args:
        config: see TrainConfig.
        run_dir: where metrics, checkpoints and the final model go; None writes nothing.
        resume: continue the run in `run_dir` from its newest undamaged checkpoint. Bitwise on the
            CPU: losses and weights are those of a run that was never interrupted.
        on_event: called with every record: kind "train" and "eval" (which are the lines of
            metrics.jsonl), "start", "checkpoint" and "message".
        corpus: `load_corpus(config.data, tokenizer=config.tokenizer)`, to share it between runs.

    Raises ValueError (bad config, data or directory), CheckpointError, TrainingError.
    On SIGINT, SIGTERM or SIGHUP the step is finished and saved, and the result says `interrupted`.
    """
    emit = on_event or (lambda record: None)
    if resume and run_dir is None:
        raise ValueError("resume: needs a run_dir to continue")
    if corpus is None:
        corpus = load_corpus(config.data, tokenizer=config.tokenizer)
    corpus.check(config.seq_len)
    device = pick_device(config.device)
    with ExitStack() as stack:
        # The caller's random numbers are none of our business, and ours none of theirs.
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        torch.manual_seed(config.seed)
        # Nor is their autocast, whose copies of weights would outlive the step that changes them.
        stack.enter_context(torch.autocast(device.type, enabled=False, cache_enabled=False))
        model = build_model(config, corpus.tokenizer).to(device)
        if config.init_from is not None and not resume:
            load_weights(model, config.init_from)
        run = None
        if run_dir is not None:
            run = RunDirectory.reopen(run_dir, config) if resume else RunDirectory.create(run_dir)
            stack.enter_context(run)
        session = Session(config, model, corpus, device, run, emit)
        stack.callback(session.release)
        session.begin(resume)
        stop = stack.enter_context(stop_on_signals())
        while session.step < config.steps and not stop:
            session.train_step()
            if session.due(config.eval_every):
                session.evaluate()
            if session.due(config.checkpoint_every):
                session.save()
        if session.step != session.saved_step:  # stopped between two checkpoints
            session.save()
        stopped_by = stop.signal if session.step < config.steps else None
        if stopped_by is None:
            session.finish()
    path = None if run_dir is None else Path(run_dir)
    return TrainResult(
        config, model, corpus.tokenizer, session.history, session.step, stopped_by, path
    )
