"""Training on a synthetic task: streamed batches, regular tests, and a stop once it is solved."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from subquad.models.device import pick_device
from subquad.tasks import Batch, Task
from subquad.tasks.model import TaskModel
from subquad.train.config import TrainConfig
from subquad.train.session import Record
from subquad.train.signals import stop_on_signals
from subquad.train.task.run import Clock, Question, TaskRun
from subquad.train.task.state import load_run, save_run

_KEEP_EVERY = 60.0  # seconds of training that a kill costs at most


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
    keep: Path | None = None,
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
        keep: a folder in which the training is kept every minute, when a signal stops it, and at
            its end; the same call continues from there, on the CPU bit for bit. The caller removes
            it once it has the result.
        on_event: called with every record of the history, and with kind "message".

    Raises:
        ValueError: a model that does not fit.
        TrainingError: the loss or the gradient is not finite.
    """
    clock = Clock(seconds)
    device = pick_device(config.device)
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        torch.manual_seed(config.seed)
        # A caller's autocast has copies of weights that would outlive the step that changes them.
        stack.enter_context(torch.autocast(device.type, enabled=False, cache_enabled=False))
        run = TaskRun(task, config, device, clock, on_event)
        stack.callback(run.release)
        if keep is not None:
            load_run(keep, run, run.say)
        stop = stack.enter_context(stop_on_signals())
        stream = task.stream(config.batch_size, seed=config.seed, step=run.step)
        questions = stack.enter_context(_Ahead(stream, pin=device.type == "cuda"))
        kept = time.monotonic()
        while not stop and not run.is_over(until_solved):
            run.train_step(next(questions))
            run.late = clock.part >= 1
            if run.step % config.eval_every == 0 or run.step == config.steps or run.late:
                run.test(sequences)
            if keep is not None and time.monotonic() - kept > _KEEP_EVERY:
                save_run(keep, run)
                kept = time.monotonic()
        if keep is not None:
            save_run(keep, run)
    over = run.is_over(until_solved)
    solved = until_solved and run.solved is not None
    cut = over and not solved and run.step < config.steps
    stopped_by = None if over else stop.signal
    return TaskResult(run.model, run.history, run.step, run.seconds, run.solved, stopped_by, cut)


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
