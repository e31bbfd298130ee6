"""What a person sees of a run: a live bar in a terminal, plain lines in a log."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

Record = dict[str, Any]
COMPILING = "compiling kernels for this machine, which takes up to a minute, once ..."
_PLAIN_SECONDS = 10.0  # a log gets a line this often, and whenever held-out text was scored
_HALF_LIFE = 60.0  # seconds after which a step counts half for the time that is left


class Pace:
    """How long it still takes, steadily: from steps of the last minutes, not from the last one.

    Everything between two steps is in it (evaluation, saving), but not the first step, in which
    kernels compile.
    """

    def __init__(self) -> None:
        self.last: tuple[float, int] | None = None  # when, and the step
        self.seconds = self.steps = 0.0  # of the past, the more recent the more

    def move(self, step: int, now: float | None = None) -> None:
        now = time.monotonic() if now is None else now
        if self.last is not None and step > self.last[1]:
            passed = now - self.last[0]
            fading = 0.5 ** (passed / _HALF_LIFE)
            self.seconds = fading * self.seconds + passed
            self.steps = fading * self.steps + step - self.last[1]
        self.last = (now, step)

    def left(self, steps: int) -> float | None:
        """Seconds until step `steps`; None before the second step."""
        if self.last is None or not self.steps:
            return None
        return self.seconds / self.steps * (steps - self.last[1])

    def text(self, steps: int) -> str:
        """`1:23 left`, or nothing yet."""
        seconds = self.left(steps)
        return "" if seconds is None else f"{duration(seconds)} left"


def duration(seconds: float) -> str:
    """3:05, or 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


@contextmanager
def show_progress(title: str, console: Console | None = None) -> Iterator[Callable[[Record], None]]:
    """Yields the `on_event` that `train` wants: a bar if the console is a terminal, else lines."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(title, console)
        return
    columns = (
        MofNCompleteColumn(),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[numbers]}", markup=False),
        TextColumn("{task.fields[left]}", markup=False),
    )
    with Progress(*columns, console=console, expand=True) as progress:
        yield _Bar(title, progress)


class _Bar:
    """One line: what fits 80 columns beside a bar. The row's name stands above it."""

    def __init__(self, title: str, progress: Progress) -> None:
        self.title, self.progress, self.pace = title, progress, Pace()
        self.steps = 0
        self.task = progress.add_task(title, total=None, numbers="reading the text", left="")

    def __call__(self, record: Record) -> None:
        kind, step = record["kind"], record.get("step")
        if kind == "start":
            self.steps = record["steps"]
            _print(self.progress.console, _start_text(self.title, record))
            self.progress.update(self.task, total=self.steps, completed=step, numbers="first step")
        elif kind == "compiling":
            self.progress.update(self.task, numbers="compiling kernels, once ...")
        elif kind == "train":
            self.pace.move(record["step"])
            left = self.pace.text(self.steps)
            numbers = _train_numbers(record)
            self.progress.update(self.task, completed=step, numbers=numbers, left=left)
        elif text := _sentence(record):
            _print(self.progress.console, text)


class _Lines:
    def __init__(self, title: str, console: Console) -> None:
        self.title, self.console, self.pace = title, console, Pace()
        self.steps = 0
        self.printed = time.monotonic()

    def __call__(self, record: Record) -> None:
        kind = record["kind"]
        if kind == "start":
            self.steps = record["steps"]
            self._print(_start_text(self.title, record))
        elif kind == "compiling":
            self._print(COMPILING)
        elif kind == "train":
            self.pace.move(record["step"])
            if time.monotonic() - self.printed >= _PLAIN_SECONDS or record["step"] == self.steps:
                left = "" if record["step"] == self.steps else self.pace.text(self.steps)
                place = f"step {record['step']}/{self.steps}"
                self._print(f"{place}  {_train_numbers(record)}  {left}".rstrip())
        elif text := _sentence(record):
            self._print(text)

    def _print(self, text: str) -> None:
        self.printed = time.monotonic()
        _print(self.console, text)


def _print(console: Console, text: str) -> None:
    """Text as it is, wrapped between words on a terminal, and not at all in a log."""
    console.print(Text(text), soft_wrap=not console.is_terminal)


def _start_text(title: str, record: Record) -> str:
    return (
        f"{title}: {record['parameters'] / 1e6:.2f}M parameters on {record['device']}\n"
        f"{record['train_tokens']:,} tokens to train on, {record['heldout_tokens']:,} held out"
    )


def _train_numbers(record: Record) -> str:
    return (
        f"loss {record['loss']:.3f}  {record['bits_per_byte']:.3f} bits/byte  "
        f"{record['tokens_per_second']:,.0f} tok/s"
    )


def _sentence(record: Record) -> str | None:
    """Records that deserve a line of their own; None for the rest."""
    if record["kind"] == "eval":
        return f"step {record['step']}: held-out {record['bits_per_byte']:.4f} bits/byte"
    return record["text"] if record["kind"] == "message" else None
