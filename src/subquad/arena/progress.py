"""What is seen while the arena runs: one line a row, each with the same steps to go."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from subquad.arena.drawing import short
from subquad.arena.records import Shape
from subquad.train.progress import COMPILING, Pace

_NOTE = 46  # columns for what is said of a row beside its bar, and for the time that is left


class RowBars:
    """A context manager: a bar for each row. Where no terminal draws bars, lines are printed.

    Labels may hold anything, so nothing is read as markup; long ones are cut beside a bar, for
    they have been printed in full with their shapes.
    """

    def __init__(self, console: Console, note: str) -> None:
        self.console = console
        self.tasks: dict[str, TaskID] = {}
        self.paces: dict[str, Pace] = {}
        self.bar = BarColumn(bar_width=18)
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            self.bar,
            TextColumn("{task.fields[note]}", markup=False),
            TextColumn("{task.fields[left]}", markup=False),
            console=console,
        )
        self.preparation = self.progress.add_task("preparing", total=None, note=note, left="")

    def say(self, text: str) -> None:
        """A line of its own, wrapped between words."""
        self.console.print(Text(text))

    def show_shapes(self, shapes: Mapping[str, Shape], steps: int) -> None:
        """Preparing is over: print the models and begin a bar for each."""
        self.progress.remove_task(self.preparation)
        longest = max(map(len, shapes))
        self.bar.bar_width = max(4, min(18, self.console.width - len(short("x" * longest)) - _NOTE))
        for row, shape in shapes.items():
            line = Text(f"  {row:{longest}} {shape.parameters:>11,}  ")
            line.append(shape.description, style="dim")
            self.console.print(line)
            self.tasks[row] = self.progress.add_task(short(row), total=steps, note="", left="")

    def move(self, row: str, step: int, note: str, steps: int) -> None:
        pace = self.paces.setdefault(row, Pace())
        if pace.last is not None and step < pace.last[1]:  # at its next learning rate
            pace = self.paces[row] = Pace()
        pace.move(step)
        left = pace.text(steps) if step < steps else ""
        self.progress.update(self.tasks[row], completed=step, note=note, left=left)

    def note(self, row: str, note: str) -> None:
        self.progress.update(self.tasks.get(row, self.preparation), note=note, left="")

    def compiling(self) -> None:
        self.say(COMPILING)

    def finish(self, row: str, steps: int, note: str) -> None:
        self.progress.update(self.tasks[row], completed=steps, total=steps, note=note, left="")
        if not self.console.is_terminal:
            self.say(f"{row} {note}")

    def on_event(self, record: dict[str, Any]) -> None:
        """Draw what an arena says of its work."""
        raise NotImplementedError

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
