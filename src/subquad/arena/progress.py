"""What is seen while the arena runs: one line a row, each with the same steps to go."""

from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from subquad.arena.records import Shape


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
