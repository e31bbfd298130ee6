"""What is seen while rows train on text: one line a row, with its bits per byte so far."""

from typing import Any

from rich.console import Console

from subquad.arena.drawing import count
from subquad.arena.progress import RowBars
from subquad.arena.text.results import Plan

_SMOOTHING = 0.9  # of the bits per byte shown: single batches jump


class ArenaProgress(RowBars):
    """`on_event` draws what `run_arena` reports."""

    def __init__(self, console: Console) -> None:
        super().__init__(console, "reading the text")
        self.steps = 0
        self.shown: dict[str, float] = {}

    def on_event(self, record: dict[str, Any]) -> None:
        kind = record["kind"]
        if kind == "plan":
            self._plan(record["plan"])
        elif kind == "compiling":
            self.compiling()
        elif kind == "measure":
            note = f"{record['row']}: {record['what']}"
            self.note(record["row"], note)
            if not self.console.is_terminal:
                self.say(f"measuring {note}")
        elif kind == "train":
            self._step(record)
        elif kind == "message":
            self.say(f"{record['row']}: {record['text']}")
        elif kind == "row":
            note = f"{record['result'].bits_per_byte:.3f} held-out bits per byte"
            self.finish(record["row"], self.steps, note)

    def _plan(self, plan: Plan) -> None:
        self.steps = plan.steps
        tokens = plan.steps * plan.config.batch_size * plan.config.seq_len
        self.say(
            f"Every row: {plan.steps} steps of {plan.config.batch_size} x {plan.config.seq_len} "
            f"tokens, {count(tokens)} in all. Parameters, the tied embedding counted once:"
        )
        self.show_shapes(plan.shapes, plan.steps)

    def _step(self, record: dict[str, Any]) -> None:
        row, now = record["row"], record["bits_per_byte"]
        shown = _SMOOTHING * self.shown.get(row, now) + (1 - _SMOOTHING) * now
        self.shown[row] = shown
        speed = count(record["tokens_per_second"])
        self.move(row, record["step"], f"{shown:.2f} bits/byte  {speed} tok/s", self.steps)
