"""Training on a synthetic task: streamed batches, regular tests, and a stop once it is solved."""

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from subquad.models.device import pick_device
from subquad.tasks import Batch, Task
from subquad.tasks.model import TaskModel
from subquad.tasks.scoring import Score, score
from subquad.train.build import autocast_dtype
from subquad.train.config import TrainConfig
from subquad.train.optimizer import learning_rate, make_optimizer
from subquad.train.session import Record, TrainingError
from subquad.train.signals import stop_on_signals

_LOG = 10  # steps between looks at the loss: each look waits for a GPU


@dataclass
class TaskResult:
    """What `train_task` hands back.

    history: records of kind "train" (step, loss, lr, grad_norm, seconds; losses are means over the
        steps since the record before) and "test" (step, value, accuracy, whole, loss).
    solved: the step of the first test that counts as solved, None if none does.
    """

    model: TaskModel
    history: list[Record]
    step: int
    seconds: float
    solved: int | None
    interrupted: bool


def train_task(
    task: Task,
    config: TrainConfig,
    *,
    sequences: int = 256,
    until_solved: bool = True,
    on_event: Callable[[Record], None] = lambda record: None,
) -> TaskResult:
    """Train a row on a task; the same arguments on the same machine end in the same weights.

    Args:
        task: draws training batches from `config.seed` and tests from its test split.
        config: the model, the optimiser, steps, batch_size, device, precision, and `eval_every`,
            the steps between tests. What it says of text (data, seq_len) is not used.
        sequences: in each test.
        until_solved: stop at the first test that counts as solved.
        on_event: called with every record of the history.

    Raises:
        ValueError: a model that does not fit.
        TrainingError: the loss or the gradient is not finite.
    """
    device = pick_device(config.device)
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        torch.manual_seed(config.seed)
        run = _Run(task, config, device, on_event)
        stop = stack.enter_context(stop_on_signals())
        batches = stack.enter_context(_Ahead(task.stream(config.batch_size, seed=config.seed)))
        while run.step < config.steps and not stop:
            run.train_step(next(batches))
            if run.step % config.eval_every == 0 or run.step == config.steps:
                run.test(sequences)
                if until_solved and run.solved is not None:
                    break
    ended = run.step == config.steps or (until_solved and run.solved is not None)
    return TaskResult(run.model, run.history, run.step, run.seconds, run.solved, not ended)


class _Run:
    """The moving parts, and how a step and a test move them."""

    def __init__(
        self,
        task: Task,
        config: TrainConfig,
        device: torch.device,
        on_event: Callable[[Record], None],
    ) -> None:
        self.task, self.config, self.device, self.on_event = task, config, device, on_event
        self.model = TaskModel(task, **config.model_keywords).to(device)
        self.optimizer = make_optimizer(self.model, config)
        self.dtype = autocast_dtype(config, device)
        self.step, self.seconds = 0, 0.0
        self.solved: int | None = None
        self.history: list[Record] = []
        self.pending: list[tuple[Tensor, Tensor]] = []  # losses and norms not yet looked at

    def train_step(self, batch: Batch) -> None:
        began = time.perf_counter()
        config = self.config
        lr = learning_rate(self.step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with self._autocast():
            loss = self.model.train().loss(batch.to(self.device))
        torch.autograd.backward(loss)
        limit = config.grad_clip or math.inf
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.pending.append((loss.detach(), norm.detach()))
        if self.step % _LOG == 0 or self.step == config.steps:
            loss_value, norm_value = self._look()
            self.seconds += time.perf_counter() - began
            self._record("train", loss=loss_value, grad_norm=norm_value, lr=lr)
        else:
            self.seconds += time.perf_counter() - began

    def _look(self) -> tuple[float, float]:
        """Means of the losses and gradient norms since the last look."""
        loss, norm = torch.tensor(self.pending, dtype=torch.float64).mean(0).tolist()
        self.pending.clear()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(
                f"step {self.step}: the loss is {loss} and the gradient's norm {norm}; "
                f"a smaller lr than {self.config.lr} or a longer warmup may help"
            )
        return loss, norm

    def test(self, sequences: int) -> None:
        with self._autocast():
            found: Score = score(self.model, self.task, self.task.test_batches(sequences))
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


class _Ahead:
    """Draws the next batch in a thread while the model is busy with this one."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self.batches = batches
        self.thread = ThreadPoolExecutor(1)

    def __enter__(self) -> "_Ahead":
        self.coming = self.thread.submit(next, self.batches)
        return self

    def __exit__(self, *error: object) -> None:
        self.thread.shutdown(cancel_futures=True)

    def __next__(self) -> Batch:
        batch = self.coming.result()
        self.coming = self.thread.submit(next, self.batches)
        return batch
