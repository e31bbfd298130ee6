"""What is seen while the arena runs: one line a row, each with the same steps to go."""

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from subquad.arena.drawing import count
from subquad.arena.results import Plan

_SMOOTHING = 0.9  # of the bits per byte shown: single batches jump


class ArenaProgress:
    """A context manager whose `on_event` draws what `run_arena` tells."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.tasks: dict[str, TaskID] = {}
        self.steps = 0
        self.progress = Progress(
            TextColumn("{task.description:17}"),
            BarColumn(bar_width=18),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(compact=True),
            console=console,
        )
        self.preparation = self.progress.add_task("preparing", total=None, note="reading the text")

    def on_event(self, record: dict[str, Any]) -> None:
        kind = record["kind"]
        if kind == "plan":
            self._plan(record["plan"])
        elif kind == "measure":
            note = f"{record['row']}: {record['what']}"
            self.progress.update(self.tasks.get(record["row"], self.preparation), note=note)
            if not self.console.is_terminal:
                self.console.print(f"measuring {note}")
        elif kind == "train":
            self._step(record)
        elif kind == "message":
            self.console.print(f"{record['row']}: {record['text']}")
        elif kind == "row":
            result = record["result"]
            note = f"{result.bits_per_byte:.3f} held-out bits per byte"
            self.progress.update(self.tasks[record["row"]], completed=self.steps, note=note)
            if not self.console.is_terminal:
                self.console.print(f"{record['row']:17} {note}")

    def _plan(self, plan: Plan) -> None:
        self.progress.remove_task(self.preparation)
        self.steps = plan.steps
        tokens = plan.steps * plan.config.batch_size * plan.config.seq_len
        self.console.print(
            f"Every row: {plan.steps} steps of {plan.config.batch_size} x {plan.config.seq_len} "
            f"tokens, {count(tokens)} in all. Parameters, the tied embedding counted once:"
        )
        for row, shape in plan.shapes.items():
            self.console.print(
                f"  {row:17} {shape.parameters:>11,}  [dim]{shape.description}[/dim]"
            )
            self.tasks[row] = self.progress.add_task(row, total=plan.steps, note="")

    def _step(self, record: dict[str, Any]) -> None:
        task = self.progress.tasks[self.progress.task_ids.index(self.tasks[record["row"]])]
        shown = task.fields.get("shown", record["bits_per_byte"])
        shown = _SMOOTHING * shown + (1 - _SMOOTHING) * record["bits_per_byte"]
        note = f"{shown:.2f} bits/byte  {count(record['tokens_per_second'])} tok/s"
        self.progress.update(task.id, completed=record["step"], note=note, shown=shown)

    def __enter__(self) -> "ArenaProgress":
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.progress.stop()
