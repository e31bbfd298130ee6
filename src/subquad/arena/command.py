"""The body of `subquad arena`."""

from pathlib import Path
from typing import Any

from rich.console import Console

from subquad.arena.progress import ArenaProgress
from subquad.arena.report import terminal_table, write_report
from subquad.arena.results import ArenaConfig, ArenaResults
from subquad.arena.run import run_arena


def arena_command(out: Path, given: dict[str, Any]) -> int:
    """Run the arena of the given settings and show it; the exit status: 0, or 130 if stopped.

    `given`: fields of ArenaConfig as the user wrote them; `rows` and `parameters` as text.
    """
    if "rows" in given:
        given["rows"] = tuple(row.strip() for row in given["rows"].split(",") if row.strip())
    if "parameters" in given:
        given["parameters"] = parse_count(given["parameters"])
    config = ArenaConfig(**given)
    console = Console()
    with ArenaProgress(console) as progress:
        results = run_arena(config, out, progress.on_event)
    page = write_report(results, out)
    if results.rows:
        show(results, console)
    console.print(f"\n[bold]Report[/bold]  {page}", highlight=False, soft_wrap=True)
    if results.missing:
        console.print(f"Stopped before: {', '.join(results.missing)}. The same command continues.")
        return 130
    return 0


def parse_count(text: str) -> int:
    """`1M` -> 1000000; k, M and G (or B) are thousands, millions and thousand millions."""
    units = {"k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9}
    unit = units.get(text[-1:].lower())
    try:
        return round(float(text[:-1]) * unit) if unit else round(float(text))
    except (ValueError, OverflowError):
        raise ValueError(
            f"parameters: got {text!r}; expected a number such as 300k, 1M or 2500000"
        ) from None


def show(results: ArenaResults, console: Console) -> None:
    """The samples, then the table, which is what one wants to have on the screen in the end."""
    for result in results.rows:
        console.rule(f"[bold]{result.row}[/bold] continues {results.config.prompt!r}", align="left")
        console.print(results.config.prompt, style="dim", end="", highlight=False, markup=False)
        console.print(result.sample, highlight=False, markup=False)
    console.rule()
    console.print(terminal_table(results))
    console.print(
        "bits/byte: held-out text, lower is better; tok/s and cache: decoding one sequence",
        style="dim",
    )
