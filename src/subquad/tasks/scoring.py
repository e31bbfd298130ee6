"""How well a model does a task, at any length, in the memory of one chunk and the state."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from subquad.models import SubquadCache
from subquad.tasks.base import Batch, Task
from subquad.tasks.model import TaskModel, losses

CHUNK = 2048


@dataclass(frozen=True)
class Score:
    """What a model got on some batches. `value` is the task's metric; see `Task.metric`.

    accuracy: of the answers, each by itself; of a signal 1 - NMSE.
    whole: sequences in which every answer was right, as a part of all; of a signal NaN.
    loss: mean cross entropy (nats) or squared error of the answers.
    """

    value: float
    accuracy: float
    whole: float
    loss: float
    answers: int
    sequences: int

    @property
    def error(self) -> float | None:
        """The standard error of `accuracy` if answers were independent; None of a signal, whose
        answers are not right or wrong."""
        if math.isnan(self.whole):
            return None
        spread = self.accuracy * (1 - self.accuracy)
        return math.sqrt(spread / self.answers)


@torch.inference_mode()
def score(model: TaskModel, task: Task, batches: Iterable[Batch], *, chunk: int = CHUNK) -> Score:
    """Score the model on these batches.

    Sequences longer than `chunk` go through the model piece by piece, the state carried from one to
    the next: what is alive is a chunk's activations and the cache, however long the sequence. The
    result is that of one pass.

    Args:
        model: put in eval mode.
        task: whose metric is wanted.
        batches: on any device.
        chunk: positions at once, at least 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk: got {chunk}; expected at least 1")
    model.eval()
    device = next(model.parameters()).device
    total = _Total()
    for batch in batches:
        _read(model, batch, chunk, device, total)
    return total.score(task)


def _read(model: TaskModel, batch: Batch, chunk: int, device: torch.device, total: _Total) -> None:
    cache: SubquadCache | None = None
    length = batch.inputs.shape[1]
    wrong = torch.zeros(len(batch), dtype=torch.long, device=device)
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        piece = Batch(batch.inputs[:, start:stop], batch.labels[:, start:stop])
        where, due = (tensor.to(device) for tensor in piece.answers())
        hidden, cache = model.hidden(piece.inputs.to(device), cache, keep=stop < length)
        if len(where):
            missed = total.add(model.answer(hidden, where), due)
            wrong.index_add_(0, where // (stop - start), missed.long())
    total.sequences += len(batch)
    total.whole += int((wrong == 0).sum())


class _Total:
    """Sums over answers; kept as Python numbers, so that nothing of a chunk stays alive."""

    def __init__(self) -> None:
        self.answers = self.right = self.sequences = self.whole = 0
        self.loss = self.power = 0.0

    def add(self, said: Tensor, due: Tensor) -> Tensor:
        """Count some answers; returns which were wrong, [n] bool."""
        self.answers += len(due)
        self.loss += losses(said, due).double().sum().item()
        if due.is_floating_point():
            self.power += due.double().square().sum().item()
            return torch.zeros_like(due, dtype=torch.bool)
        missed = said.argmax(-1) != due
        self.right += len(due) - int(missed.sum())
        return missed

    def score(self, task: Task) -> Score:
        if not self.answers:
            raise ValueError("batches: got none with anything asked; expected at least one answer")
        loss, whole = self.loss / self.answers, self.whole / self.sequences
        accuracy = self.right / self.answers
        value = accuracy
        if task.metric == "NMSE":
            value = self.loss / self.power
            accuracy, whole = 1 - value, math.nan
        elif task.metric == "scaled accuracy":
            value = (accuracy - task.chance) / (1 - task.chance)
        return Score(value, accuracy, whole, loss, self.answers, self.sequences)
