"""Training on a synthetic task instead of text."""

from subquad.train.task.loop import TaskResult, train_task

__all__ = ["TaskResult", "train_task"]
