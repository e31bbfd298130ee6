"""The arena: rows of the table trained alike, and compared in quality, speed and memory.

From Python:

    from subquad.arena import ArenaConfig, run_arena, write_report

    results = run_arena(ArenaConfig(rows=("mamba2", "gla"), steps=200), Path("runs/arena"))
    write_report(results, Path("runs/arena"))
"""

from subquad.arena.equalise import equal_shape
from subquad.arena.records import Shape
from subquad.arena.text.report import render_html, terminal_table, write_report
from subquad.arena.text.results import ArenaConfig, ArenaResults, RowResult
from subquad.arena.text.run import run_arena

__all__ = [
    "ArenaConfig",
    "ArenaResults",
    "RowResult",
    "Shape",
    "equal_shape",
    "render_html",
    "run_arena",
    "terminal_table",
    "write_report",
]
