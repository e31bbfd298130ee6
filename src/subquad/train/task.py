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
from subquad.train.captured import Captured
from subquad.train.config import TrainConfig
from subquad.train.optimizer import learning_rate, make_optimizer
from subquad.train.session import Record, TrainingError
from subquad.train.signals import stop_on_signals

# Steps between looks at the loss: each look waits for a GPU, and is a record of the history.
_LEAST, _MOST, _LOOKS = 10, 100, 200

Question = tuple[Tensor, Tensor, Tensor]  # inputs, places of the answers, what is due there


@dataclass
class TaskResult:
    """What `train_task` hands back.

    history: records of kind "train" (step, loss, lr, grad_norm, seconds; losses are means over the
        steps since the record before) and "test" (step, value, accuracy, whole, loss).
    solved: the step of the first test that counts as solved, None if none does.
    stopped_by: the signal that ended it early, None if none did.
    cut: the time was over before the steps were done.
    """

    model: TaskModel
    history: list[Record]
    step: int
    seconds: float
    solved: int | None
    stopped_by: int | None
    cut: bool = False

    @property
    def interrupted(self) -> bool:
        return self.stopped_by is not None


def train_task(
    task: Task,
    config: TrainConfig,
    *,
    sequences: int = 256,
    until_solved: bool = True,
    seconds: float | None = None,
    on_event: Callable[[Record], None] = lambda record: None,
) -> TaskResult:
    """Train a row on a task; the same arguments on the same machine end in the same weights,
    unless the clock ends it.

    On a GPU steps are replayed from a captured graph where all batches are of one shape.

    Args:
        task: draws training batches from `config.seed` and tests from its test split.
        config: the model, the optimiser, steps, batch_size, device, precision, and `eval_every`,
            the steps between tests. What it says of text (data, seq_len), of checkpoints and
            of `accumulate` is not used.
        sequences: in each test.
        until_solved: stop at the first test that counts as solved.
        seconds: of wall clock, after which training ends with a last test. The learning rate then
            falls by the clock wherever that is further on than the steps.
        on_event: called with every record of the history.

    Raises:
        ValueError: a model that does not fit.
        TrainingError: the loss or the gradient is not finite.
    """
    clock = _Clock(seconds)
    device = pick_device(config.device)
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        torch.manual_seed(config.seed)
        # A caller's autocast has copies of weights that would outlive the step that changes them.
        stack.enter_context(torch.autocast(device.type, enabled=False, cache_enabled=False))
        run = _Run(task, config, device, clock, on_event)
        stack.callback(run.release)
        stop = stack.enter_context(stop_on_signals())
        stream = task.stream(config.batch_size, seed=config.seed)
        questions = stack.enter_context(_Ahead(stream, pin=device.type == "cuda"))
        while run.step < config.steps and not stop:
            run.train_step(next(questions))
            late = clock.part >= 1
            if run.step % config.eval_every == 0 or run.step == config.steps or late:
                run.test(sequences)
            if late or (until_solved and run.solved is not None):
                break
    solved = until_solved and run.solved is not None
    cut = not solved and run.step < config.steps and clock.part >= 1
    ended = run.step == config.steps or solved or cut
    stopped_by = None if ended else stop.signal
    return TaskResult(run.model, run.history, run.step, run.seconds, run.solved, stopped_by, cut)


class _Clock:
    """How much of the time is over; none ever where no end is set."""

    def __init__(self, seconds: float | None) -> None:
        self.began, self.seconds = time.monotonic(), seconds or math.inf

    @property
    def part(self) -> float:
        return (time.monotonic() - self.began) / self.seconds


class _Run:
    """The moving parts, and how a step and a test move them."""

    def __init__(
        self,
        task: Task,
        config: TrainConfig,
        device: torch.device,
        clock: _Clock,
        on_event: Callable[[Record], None],
    ) -> None:
        self.task, self.config, self.device, self.on_event = task, config, device, on_event
        self.clock = clock
        self.model = TaskModel(task, **config.model_keywords).to(device).train()
        self.optimizer = make_optimizer(self.model, config)
        self.dtype = autocast_dtype(config, device)
        self.step, self.seconds, self.lr = 0, 0.0, config.lr
        self.solved: int | None = None
        self.history: list[Record] = []
        # Of losses and gradient norms since the last look, and the step of that.
        self.sums, self.looked = torch.zeros(2, dtype=torch.float64, device=device), 0
        self.update: Callable[..., None] = self._update
        if device.type == "cuda":
            for group in self.optimizer.param_groups:
                lr = torch.tensor(config.lr, device=device)  # which a graph reads
                group.update(lr=lr, capturable=True, fused=True)
            self.update = Captured(self._update, device)

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


class _Ahead:
    """Draws the next batch in a thread while the model is busy with this one."""

    def __init__(self, batches: Iterator[Batch], pin: bool) -> None:
        self.batches, self.pin = batches, pin
        self.thread = ThreadPoolExecutor(1)

    def __enter__(self) -> "_Ahead":
        self.coming = self.thread.submit(self._draw)
        return self

    def __exit__(self, *error: object) -> None:
        self.thread.shutdown(cancel_futures=True)

    def __next__(self) -> Question:
        question = self.coming.result()
        self.coming = self.thread.submit(self._draw)
        return question

    def _draw(self) -> Question:
        """Here it is known how many answers there are, for which a GPU would have to be asked."""
        batch = next(self.batches)
        where, due = batch.answers()
        if self.pin:
            return batch.inputs.pin_memory(), where.pin_memory(), due.pin_memory()
        return batch.inputs, where, due
