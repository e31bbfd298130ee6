"""What a person sees of a run: a live bar in a terminal, plain lines in a log."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Record = dict[str, Any]
_PLAIN_SECONDS = 10.0  # a log gets a line this often, and whenever held-out text was scored


@contextmanager
def show_progress(title: str, console: Console | None = None) -> Iterator[Callable[[Record], None]]:
    """Yields the `on_event` that `train` wants: a bar if the console is a terminal, else lines."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(title, console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, expand=True) as progress:
        yield _Bar(title, progress)


class _Bar:
    def __init__(self, title: str, progress: Progress) -> None:
        self.title, self.progress = title, progress
        self.task = progress.add_task(title, total=None, numbers="")

    def __call__(self, record: Record) -> None:
        kind = record["kind"]
        if kind == "start":
            self.progress.console.print(_start_line(self.title, record), highlight=False)
            self.progress.update(self.task, total=record["steps"], completed=record["step"])
        elif kind == "train":
            self.progress.update(
                self.task, completed=record["step"], numbers=_train_numbers(record)
            )
        elif text := _sentence(record):
            self.progress.console.print(text, highlight=False, markup=False, soft_wrap=True)


class _Lines:
    def __init__(self, title: str, console: Console) -> None:
        self.title, self.console = title, console
        self.steps = 0
        self.printed = time.monotonic()
        self.began: tuple[float, int] | None = None

    def __call__(self, record: Record) -> None:
        kind = record["kind"]
        if kind == "start":
            self.steps = record["steps"]
            self._print(_start_line(self.title, record))
        elif kind == "train":
            now = time.monotonic()
            self.began = self.began or (now, record["step"])
            if now - self.printed >= _PLAIN_SECONDS or record["step"] == self.steps:
                place = f"step {record['step']}/{self.steps}"
                self._print(
                    f"{place}  {_train_numbers(record)}{self._remaining(now, record['step'])}"
                )
        elif text := _sentence(record):
            self._print(text)

    def _remaining(self, now: float, step: int) -> str:
        assert self.began is not None
        since, first = self.began
        if step == first:
            return ""
        seconds = round((now - since) / (step - first) * (self.steps - step))
        return f"  {seconds // 60}:{seconds % 60:02d} left"

    def _print(self, text: str) -> None:
        self.printed = time.monotonic()
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def _start_line(title: str, record: Record) -> str:
    return (
        f"{title}: {record['parameters'] / 1e6:.2f}M parameters on {record['device']}, "
        f"{record['train_tokens']:,} tokens to train on, {record['heldout_tokens']:,} held out"
    )


def _train_numbers(record: Record) -> str:
    return (
        f"loss {record['loss']:.3f}  {record['bits_per_byte']:.3f} bits/byte  "
        f"{record['tokens_per_second']:,.0f} tokens/s"
    )


def _sentence(record: Record) -> str | None:
    """Records that deserve a line of their own; None for the rest."""
    if record["kind"] == "eval":
        return f"step {record['step']}: held-out {record['bits_per_byte']:.4f} bits/byte"
    return record["text"] if record["kind"] == "message" else None
