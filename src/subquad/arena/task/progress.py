"""What is seen while rows train on a task: one line a row, with what it scores so far."""

from typing import Any

from rich.console import Console

from subquad.arena.progress import RowBars
from subquad.arena.task.results import TaskPlan


class TaskProgress(RowBars):
    """A context manager whose `on_event` draws what `run_task_arena` reports."""

    def __init__(self, console: Console) -> None:
        super().__init__(console, "choosing shapes")
        self.metric = ""
        self.steps = 0
        self.scores: dict[str, str] = {}

    def on_event(self, record: dict[str, Any]) -> None:
        kind = record["kind"]
        if kind == "plan":
            self._plan(record["plan"])
        elif kind == "compiling":
            self.compiling()
        elif kind == "train":
            score = self.scores.get(record["row"], "")
            note = f"loss {record['loss']:.3f}  {score}"
            self.move(record["row"], record["step"], note, self.steps)
        elif kind == "test":
            self.scores[record["row"]] = f"{self.metric} {record['value']:.3f}"
        elif kind == "measure":
            self.note(record["row"], f"testing {record['what']}")
        elif kind == "message":
            self.say(f"{record['row']}: {record['text']}")
        elif kind == "row":
            result = record["result"]
            score = "failed" if result.value is None else f"{self.metric} {result.value:.3f}"
            if result.solved:
                score += f", solved at step {result.solved:,}"
            self.finish(record["row"], result.steps, score)

    def _plan(self, plan: TaskPlan) -> None:
        task, recipe = plan.config.build(), plan.recipe
        self.metric, self.steps = task.metric, recipe.steps
        self.say(
            f"{task.name}: {task.measures}.\nEvery row: up to {recipe.steps} steps of "
            f"{recipe.batch_size} sequences, {recipe.layers} layers. Parameters:"
        )
        self.show_shapes(plan.shapes, recipe.steps)
