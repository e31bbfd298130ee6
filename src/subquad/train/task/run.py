"""The moving parts of one training on a task, and how a step, a look and a test move them."""

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from subquad.tasks import Task
from subquad.tasks.model import TaskModel
from subquad.tasks.scoring import Score, score
from subquad.train.build import autocast_dtype
from subquad.train.captured import Captured
from subquad.train.config import TrainConfig
from subquad.train.optimizer import learning_rate, make_optimizer
from subquad.train.session import Record, TrainingError

# Steps between looks at the loss: each look waits for a GPU, and is a record of the history.
_LEAST, _MOST, _LOOKS = 10, 100, 200

Question = tuple[Tensor, Tensor, Tensor]  # inputs, places of the answers, what is due there


class Clock:
    """How much of the time is over; none ever where no end is set."""

    def __init__(self, seconds: float | None) -> None:
        self.began, self.seconds = time.monotonic(), seconds or math.inf

    @property
    def passed(self) -> float:
        """Seconds; of a resumed training, those of before included."""
        return time.monotonic() - self.began

    @passed.setter
    def passed(self, seconds: float) -> None:
        self.began = time.monotonic() - seconds

    @property
    def part(self) -> float:
        return self.passed / self.seconds


class TaskRun:
    """The moving parts, and how a step and a test move them."""

    def __init__(
        self,
        task: Task,
        config: TrainConfig,
        device: torch.device,
        clock: Clock,
        on_event: Callable[[Record], None],
    ) -> None:
        self.task, self.config, self.device, self.on_event = task, config, device, on_event
        self.clock = clock
        self.model = TaskModel(task, **config.model_keywords).to(device).train()
        self.optimizer = make_optimizer(self.model, config)
        self.dtype = autocast_dtype(config, device)
        self.step, self.seconds, self.lr = 0, 0.0, config.lr
        self.solved: int | None = None
        self.late = False  # the time was over at the last step
        self.history: list[Record] = []
        # Of losses and gradient norms since the last look, and the step of that.
        self.sums, self.looked = torch.zeros(2, dtype=torch.float64, device=device), 0
        self.update: Callable[..., None] = self._update
        if device.type == "cuda":
            for group in self.optimizer.param_groups:
                lr = torch.tensor(config.lr, device=device)  # which a graph reads
                group.update(lr=lr, capturable=True, fused=True)
            self.update = Captured(self._update, device)

    def is_over(self, until_solved: bool) -> bool:
        """Whether no step is left: taken, not needed any more, or out of time."""
        solved = until_solved and self.solved is not None
        return self.step == self.config.steps or solved or self.late

    def say(self, text: str) -> None:
        self.on_event({"kind": "message", "step": self.step, "text": text})

    def train_step(self, question: Question) -> None:
        began = time.perf_counter()
        self.lr = self._learning_rate()
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(self.lr)
            else:
                group["lr"] = self.lr
        self.update(*question)
        self.step += 1
        self.seconds += time.perf_counter() - began
        steps = self.config.steps
        if self.step % min(_MOST, max(_LEAST, steps // _LOOKS)) == 0 or self.step == steps:
            self._look()

    def _learning_rate(self) -> float:
        """Of the step; of the part of the time that is over, where that is less."""
        steps = self.config.steps
        late = max(self.step, int(min(1.0, self.clock.part) * steps))
        return min(learning_rate(self.step, self.config), learning_rate(late, self.config))

    def _update(self, inputs: Tensor, where: Tensor, due: Tensor) -> None:
        """Everything of a step that runs on the device, which never has to be waited for."""
        try:
            with self._autocast():
                loss = self.model.loss(inputs, where, due)
            torch.autograd.backward(loss)
            limit = self.config.grad_clip or math.inf
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
            self.optimizer.step()
            self.sums += torch.stack((loss.detach(), norm.detach()))
        finally:  # a capture that failed leaves gradients that nothing has computed
            self.optimizer.zero_grad(set_to_none=True)

    def release(self) -> None:
        """Give back the memory of a captured step; Python would look for the cycle much later."""
        self.update = self._update

    def _look(self) -> None:
        """Record the means of the losses and gradient norms since the last look, if any."""
        if self.step == self.looked:
            return
        began = time.perf_counter()
        loss, norm = (self.sums / (self.step - self.looked)).tolist()
        self.seconds += time.perf_counter() - began  # a GPU had steps to catch up with
        self.sums.zero_()
        self.looked = self.step
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(
                f"step {self.step}: the loss is {loss} and the gradient's norm {norm}; "
                f"a smaller lr than {self.config.lr} or a longer warmup may help"
            )
        self._record("train", loss=loss, grad_norm=norm, lr=self.lr)

    def test(self, sequences: int) -> None:
        """After a look: weights that are no numbers have no value, and end the training."""
        self._look()
        with self._autocast():
            found: Score = score(self.model, self.task, self.task.test_batches(sequences))
        self.model.train()
        if self.solved is None and self.task.is_solved(found.value):
            self.solved = self.step
        whole = None if math.isnan(found.whole) else found.whole  # JSON has no NaN
        self._record(
            "test", value=found.value, accuracy=found.accuracy, whole=whole, loss=found.loss
        )

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def _record(self, kind: str, **values: float | None) -> None:
        record = {"kind": kind, "step": self.step, "seconds": round(self.seconds, 3), **values}
        self.history.append(record)
        self.on_event(record)
