"""The moving parts of one run, and how a step, an evaluation and a checkpoint move them."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor, nn

from subquad.files import read_json
from subquad.models.folder import write_model
from subquad.train import checkpoint
from subquad.train.build import autocast_dtype, load_weights
from subquad.train.captured import Captured
from subquad.train.config import TrainConfig
from subquad.train.data import Batches, Corpus
from subquad.train.metrics import lost_steps
from subquad.train.optimizer import (
    learning_rate,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
)
from subquad.train.rng import rng_state, set_rng_state
from subquad.train.run import RunDirectory
from subquad.train.score import bits_per_byte, evaluate, token_losses

Record = dict[str, Any]


class TrainingError(RuntimeError):
    """Training cannot sensibly continue, as when the loss is not a number."""


class Session:
    """The moving parts of one run: everything that a step changes and a checkpoint holds."""

    def __init__(
        self,
        config: TrainConfig,
        model: Any,
        corpus: Corpus,
        device: torch.device,
        run: RunDirectory | None,
        emit: Callable[[Record], None],
    ) -> None:
        self.config, self.model, self.corpus, self.device = config, model, corpus, device
        self.run, self.emit = run, emit
        self.optimizer = make_optimizer(model, config)
        self.batches = Batches(
            corpus.train, batch_size=config.batch_size, seq_len=config.seq_len, seed=config.seed
        )
        self.autocast = autocast_dtype(config, device)
        self.step = self.saved_step = 0
        self.seconds = 0.0  # spent in training steps; evaluation and saving not counted
        self.history: list[Record] = []
        self.captured = Captured(self._gradients, device) if device.type == "cuda" else None

    def due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.steps

    def train_step(self) -> None:
        """One optimizer step. Raises TrainingError, before the weights change, if loss or gradient
        is not finite."""
        began = time.perf_counter()
        config = self.config
        lr = learning_rate(self.step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        inputs, targets, n_bytes = self.batches.batch(self.step)
        found, gradients = (self.captured or self._gradients)(inputs, targets)
        loss, norm = found.tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(
                f"step {self.step + 1}: the loss is {loss} and the gradient's norm {norm}; "
                f"a smaller lr than {config.lr} or a longer warmup may help, also when resuming"
            )
        for parameter, gradient in zip(self.model.parameters(), gradients):
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        seconds = time.perf_counter() - began
        self.seconds += seconds
        self._record(
            {
                "kind": "train",
                "step": self.step,
                "loss": loss,
                "bits_per_byte": bits_per_byte(loss * targets.numel(), n_bytes),
                "lr": lr,
                "grad_norm": norm,
                "tokens": self.step * targets.numel(),
                "seconds": round(self.seconds, 4),
                "tokens_per_second": round(targets.numel() / seconds, 1),
            }
        )

    def _gradients(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """Of the batch's mean loss, for all parameters, clipped.

        Before them that loss, nats per token, and their norm, [2]: nothing waits for it here, so
        that on a GPU all of this can be captured.
        """
        self.optimizer.zero_grad(set_to_none=True)  # what a capture that failed has left
        total = torch.zeros((), device=self.device)
        parts = self.config.accumulate
        for x, y in zip(inputs.chunk(parts), targets.chunk(parts)):
            with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
                loss = token_losses(self.model, x.to(self.device), y.to(self.device)).mean() / parts
            torch.autograd.backward(loss)
            total += loss.detach()
        parameters = list(self.model.parameters())
        norm = nn.utils.clip_grad_norm_(parameters, self.config.grad_clip or math.inf)
        return torch.stack((total, norm.float())), [p.grad for p in parameters]

    def evaluate(self) -> None:
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            scores = evaluate(
                self.model,
                self.corpus.heldout,
                seq_len=self.config.seq_len,
                batch_size=self.config.batch_size // self.config.accumulate,
                tokens=self.config.eval_tokens,
            )
        self._record({"kind": "eval", "step": self.step, **scores})

    def begin(self, resume: bool) -> None:
        """From the start or the newest checkpoint; only then do new settings replace old ones."""
        changes = self._restore() if resume else {}
        if self.run is not None:
            self.run.start(self.config)
            if changes:
                self._record({"kind": "change", "step": self.step, "settings": changes})
            if self.step < self.config.steps:
                self.run.withdraw_model()
        self.emit(
            {
                "kind": "start",
                "step": self.step,
                "steps": self.config.steps,
                "parameters": sum(p.numel() for p in self.model.parameters()),
                "train_tokens": len(self.corpus.train),
                "heldout_tokens": len(self.corpus.heldout),
                "device": str(self.device),
            }
        )

    def save(self) -> None:
        if self.run is None:
            return
        self.run.check_place()
        self.run.sync_metrics()
        path = checkpoint.save(self.run.checkpoints, self.step, self._write, keep=self.config.keep)
        self.saved_step = self.step
        self.emit({"kind": "checkpoint", "step": self.step, "path": str(path)})

    def _write(self, folder: Path) -> None:
        """A checkpoint is a Hugging Face folder with the rest of the training state beside it."""
        write_model(self.model, self.corpus.tokenizer, folder)
        save_file(optimizer_tensors(self.model, self.optimizer), folder / "optimizer.safetensors")
        assert self.run is not None
        state = {
            "run": self.run.identity,
            "config": self.config.to_json(),
            "step": self.step,
            "seconds": self.seconds,
            "data": self.corpus.fingerprint,
            "rng": rng_state(self.device),
        }
        (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")

    def _restore(self) -> dict[str, list[Any]]:
        """Go back to the newest undamaged checkpoint, or to the start if none was ever written.

        Returns the settings that are others from here on.
        """
        assert self.run is not None
        checkpoint.clean(self.run.checkpoints)
        path = checkpoint.newest_good(self.run.checkpoints, self._say)
        changes = {}
        if path is not None:
            changes = self._load(path)
        elif self.config.init_from is not None:
            load_weights(self.model, self.config.init_from)
        self.history = self.run.rewind_metrics(self.step)
        if lost := lost_steps(self.history, self.step):
            self._say(lost)
        self._say(f"resuming after step {self.step}")
        for name, (was, now) in changes.items():
            self._say(f"{name} was {was}, from here on {now}")
        return changes

    def _load(self, path: Path) -> dict[str, list[Any]]:
        """Become what a checkpoint holds. ValueError if it is of another run, or of other data."""
        assert self.run is not None
        state = read_json(path / "state.json")
        if state.get("run", self.run.identity) != self.run.identity:
            raise ValueError(f"resume: {path} is a checkpoint of another run; move it elsewhere")
        if state["data"] != self.corpus.fingerprint:
            raise ValueError(f"data: {self.corpus.source} is not what {path} was trained on")
        if state["step"] > self.config.steps:
            raise ValueError(f"steps: got {self.config.steps}, but {path} is already beyond it")
        before = TrainConfig.from_json(state["config"]) if "config" in state else self.config
        changes = self.config.changes_since(before, str(path))
        load_model(self.model, path / "model.safetensors", device=str(self.device))
        tensors = load_file(path / "optimizer.safetensors")
        load_optimizer_tensors(self.model, self.optimizer, tensors)
        set_rng_state(state["rng"], self.device)
        self.step = self.saved_step = state["step"]
        self.seconds = state["seconds"]
        return changes

    def release(self) -> None:
        """Give back the memory of a captured step."""
        self.captured = None

    def finish(self) -> None:
        if self.run is not None:
            self.run.export(self.model, self.corpus.tokenizer)

    def _record(self, record: Record) -> None:
        self.history.append(record)
        if self.run is not None:
            self.run.record(record)
        self.emit(record)

    def _say(self, text: str) -> None:
        self.emit({"kind": "message", "step": self.step, "text": text})
