"""What is seen while the arena runs: one line a row, each with the same steps to go."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from subquad.arena.drawing import count
from subquad.arena.text.results import Plan, Shape

_SMOOTHING = 0.9  # of the bits per byte shown: single batches jump


class RowBars:
    """A context manager: a bar for each row. Where no terminal draws bars, lines are printed."""

    def __init__(self, console: Console, note: str) -> None:
        self.console = console
        self.tasks: dict[str, TaskID] = {}
        self.progress = Progress(
            TextColumn("{task.description:17}"),
            BarColumn(bar_width=18),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(compact=True),
            console=console,
        )
        self.preparation = self.progress.add_task("preparing", total=None, note=note)

    def show_shapes(self, shapes: Mapping[str, Shape], steps: int) -> None:
        """Preparing is over: print the models and begin a bar for each."""
        self.progress.remove_task(self.preparation)
        for row, shape in shapes.items():
            self.console.print(
                f"  {row:17} {shape.parameters:>11,}  [dim]{shape.description}[/dim]"
            )
            self.tasks[row] = self.progress.add_task(row, total=steps, note="")

    def move(self, row: str, step: int, note: str) -> None:
        self.progress.update(self.tasks[row], completed=step, note=note)

    def note(self, row: str, note: str) -> None:
        self.progress.update(self.tasks.get(row, self.preparation), note=note)

    def finish(self, row: str, steps: int, note: str) -> None:
        self.progress.update(self.tasks[row], completed=steps, total=steps, note=note)
        if not self.console.is_terminal:
            self.console.print(f"{row:17} {note}")

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.progress.stop()


class ArenaProgress(RowBars):
    """`on_event` draws what `run_arena` tells."""

    def __init__(self, console: Console) -> None:
        super().__init__(console, "reading the text")
        self.steps = 0
        self.shown: dict[str, float] = {}

    def on_event(self, record: dict[str, Any]) -> None:
        kind = record["kind"]
        if kind == "plan":
            self._plan(record["plan"])
        elif kind == "measure":
            note = f"{record['row']}: {record['what']}"
            self.note(record["row"], note)
            if not self.console.is_terminal:
                self.console.print(f"measuring {note}")
        elif kind == "train":
            self._step(record)
        elif kind == "message":
            self.console.print(f"{record['row']}: {record['text']}")
        elif kind == "row":
            note = f"{record['result'].bits_per_byte:.3f} held-out bits per byte"
            self.finish(record["row"], self.steps, note)

    def _plan(self, plan: Plan) -> None:
        self.steps = plan.steps
        tokens = plan.steps * plan.config.batch_size * plan.config.seq_len
        self.console.print(
            f"Every row: {plan.steps} steps of {plan.config.batch_size} x {plan.config.seq_len} "
            f"tokens, {count(tokens)} in all. Parameters, the tied embedding counted once:"
        )
        self.show_shapes(plan.shapes, plan.steps)

    def _step(self, record: dict[str, Any]) -> None:
        row, now = record["row"], record["bits_per_byte"]
        shown = _SMOOTHING * self.shown.get(row, now) + (1 - _SMOOTHING) * now
        self.shown[row] = shown
        speed = count(record["tokens_per_second"])
        self.move(row, record["step"], f"{shown:.2f} bits/byte  {speed} tok/s")
