"""One example of a task, as a reader sees it: what is read, and what is due where."""

from dataclasses import dataclass

from subquad.tasks import Batch, Task

_MOST = 160  # positions that are shown
_BEGINNING = 40  # of them from the beginning, where a longer example is cut


@dataclass(frozen=True)
class Position:
    """What stands at one position; `due` is "" where nothing is asked."""

    read: str
    due: str


def example(task: Task) -> list[Position]:
    """A test sequence, without its padding. The middle of a long one is left out."""
    batch = task.sample(1, split="test")
    asked = batch.asked[0].nonzero()[:, 0].tolist()
    last = asked[-1]
    wanted = range(last + 1)
    if len(wanted) <= _MOST:
        return [_position(task, batch, at) for at in wanted]
    begin = [_position(task, batch, at) for at in wanted[:_BEGINNING]]
    end = [_position(task, batch, at) for at in wanted[_BEGINNING - _MOST :]]
    return [*begin, Position("…", ""), *end]


def _position(task: Task, batch: Batch, at: int) -> Position:
    read, label = batch.inputs[0, at], batch.labels[0, at]
    asked = bool(batch.asked[0, at])
    if task.channels:
        numbers = " ".join(f"{value:.2f}" for value in read.tolist())
        return Position(f"({numbers})", f"{label.item():.2f}" if asked else "")
    return Position(task.spell(int(read)), task.spell(int(label)) if asked else "")
