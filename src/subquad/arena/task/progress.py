"""What is seen while rows train on a task: one line a row, with what it scores so far."""

from typing import Any

from rich.console import Console

from subquad.arena.progress import RowBars
from subquad.arena.task.results import TaskPlan


class TaskProgress(RowBars):
    """A context manager whose `on_event` draws what `run_task_arena` tells."""

    def __init__(self, console: Console) -> None:
        super().__init__(console, "choosing shapes")
        self.metric = ""
        self.scores: dict[str, str] = {}

    def on_event(self, record: dict[str, Any]) -> None:
        kind = record["kind"]
        if kind == "plan":
            self._plan(record["plan"])
        elif kind == "train":
            said = self.scores.get(record["row"], "")
            self.move(record["row"], record["step"], f"loss {record['loss']:.3f}  {said}")
        elif kind == "test":
            self.scores[record["row"]] = f"{self.metric} {record['value']:.3f}"
        elif kind == "measure":
            self.note(record["row"], f"testing {record['what']}")
        elif kind == "row":
            result = record["result"]
            said = "failed" if result.value is None else f"{self.metric} {result.value:.3f}"
            if result.solved:
                said += f", solved at step {result.solved:,}"
            self.finish(record["row"], result.steps, said)

    def _plan(self, plan: TaskPlan) -> None:
        task, recipe = plan.config.build(), plan.recipe
        self.metric = task.metric
        self.console.print(
            f"[bold]{task.name}[/bold]: {task.measures}.\nEvery row: up to {recipe.steps} steps of "
            f"{recipe.batch_size} sequences, {recipe.layers} layers. Parameters:"
        )
        self.show_shapes(plan.shapes, recipe.steps)
