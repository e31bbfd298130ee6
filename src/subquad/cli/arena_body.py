"""The body of `subquad arena`: rows compared on text, on a task, or by how their costs grow."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.console import Console

from subquad.arena.entrants import split_rows
from subquad.arena.scaling.report import scaling_table, write_scaling
from subquad.arena.scaling.results import ScalingConfig
from subquad.arena.scaling.run import run_scaling
from subquad.arena.task.progress import TaskProgress
from subquad.arena.task.report import task_table, write_task_report
from subquad.arena.task.results import TaskArenaConfig
from subquad.arena.task.run import run_task_arena
from subquad.arena.text.progress import ArenaProgress
from subquad.arena.text.report import learning_rates, terminal_table, write_report
from subquad.arena.text.results import ArenaConfig, ArenaResults
from subquad.arena.text.run import run_arena
from subquad.cli import parse
from subquad.cli.compiling import watch_compiler
from subquad.cli.terminal import printable, say, screen, show_path
from subquad.errors import choose, fail
from subquad.files import write_json


def arena_command(out: Path, given: dict[str, Any]) -> int:
    """Run the arena of the given settings and show it.

    The exit status: 0, a signal's if one stopped it, 1 if the training of a row broke off.

    `given`: fields of ArenaConfig as the user wrote them; `rows` and `parameters` as text.
    """
    config = ArenaConfig(**_read(given))
    console = screen()
    with (
        ArenaProgress(console) as progress,
        watch_compiler(lambda: progress.on_event({"kind": "compiling"})),
    ):
        results = run_arena(config, out, progress.on_event)
    page, undrawn = _report(out, lambda: write_report(results, out))
    if results.rows:
        show(results, console)
    for row, reason in results.failures.items():
        say(console, f"{row} gave up: {reason}")
    return _end(console, page, undrawn, results.missing, results.stopped_by, results.failures)


def task_command(out: Path | None, given: dict[str, Any], settings: list[str]) -> int:
    """Run the arena on a task and show it; the exit status as of `arena_command`.

    `given`: fields of TaskArenaConfig as the user wrote them. `settings`: name=value, of the task
    or else of TaskArenaConfig.
    """
    config = task_config(given, settings)
    out = out or Path("runs") / f"arena-{config.task}"
    console = screen()
    with (
        TaskProgress(console) as progress,
        watch_compiler(lambda: progress.on_event({"kind": "compiling"})),
    ):
        results = run_task_arena(config, out, progress.on_event)
    page, undrawn = _report(out, lambda: write_task_report(results, out))
    if results.rows:
        console.rule()
        console.print(task_table(results))
        task = config.build()
        better = "lower" if task.metric == "NMSE" else "higher"
        note = (
            f"{task.metric} on new sequences, {better} is better, bold: solved; a uniform guess "
            f"has {task.guess:.3g}; state: bytes kept of one sequence"
        )
        say(console, note, style="dim")
    return _end(console, page, undrawn, results.missing, results.stopped_by, {})


def task_config(given: dict[str, Any], settings: list[str]) -> TaskArenaConfig:
    """The config that the command line means."""
    given = _read(given)
    if isinstance(given.get("lr"), tuple):
        if len(given["lr"]) > 1:
            got = list(given["lr"])
            raise fail("lr", got, "one number on a task", "run the arena once for each")
        given["lr"] = given["lr"][0]
    own = {field.name for field in fields(TaskArenaConfig)} - {"task", "settings"}
    of_task = dict[str, Any]()
    for text in settings:
        name, value = parse.setting(text)
        (given if name in own else of_task)[name] = value
    return TaskArenaConfig(**given, settings=of_task)


def scaling_command(out: Path, given: dict[str, Any], settings: list[str]) -> None:
    """Measure how time and memory grow, and show it. `settings`: fields of ScalingConfig."""
    given = _read(given)
    known = tuple(field.name for field in fields(ScalingConfig))
    for text in settings:
        name, value = parse.setting(text)
        choose("--set", name, known)
        given[name] = value
    config, console = ScalingConfig(**given), screen()
    with console.status("measuring") as status:
        record = run_scaling(
            config,
            lambda text: status.update(f"measuring {text}"),
            lambda measured: write_json(out / "scaling.json", measured),
        )
    page, undrawn = _report(out, lambda: write_scaling(record, out))
    for variable in ("T", "d"):
        console.print(scaling_table(record, variable))
        console.print()
    note = "exponents p of q = c x^p, with the standard error of the slope; one layer, one sequence"
    say(console, note, style="dim")
    _end(console, page, undrawn, [], None, {})


def _read(given: dict[str, Any]) -> dict[str, Any]:
    """What was written, as the configs have it."""
    readers: dict[str, Callable[[str], Any]] = {
        "rows": split_rows,
        "parameters": parse.count,
        "lr": parse.rates,
    }
    return {n: readers[n](value) if n in readers else value for n, value in given.items()}


def _report(out: Path, write: Callable[[], Path]) -> tuple[Path, str]:
    """The page, or where the results are and why it could not be drawn: they outlive that."""
    try:
        return write(), ""
    except Exception as error:
        return out, f"{type(error).__name__}: {error}"


def _end(
    console: Console,
    page: Path,
    undrawn: str,
    missing: list[str],
    stopped_by: int | None,
    failures: dict[str, str],
) -> int:
    """Where the report is, what is missing; the exit status."""
    if undrawn:
        say(console, f"\nThe report could not be drawn ({undrawn}). All results are kept.")
    show_path(console, "Results" if undrawn else "Report", page)
    if missing:
        say(console, f"Stopped before: {', '.join(missing)}. The same command continues.")
        return 128 + (stopped_by or 2)
    return 1 if failures or undrawn else 0


def show(results: ArenaResults, console: Console) -> None:
    """The samples, then the table, which is what one wants to have on the screen in the end."""
    for result in results.rows:
        console.rule(f"{result.name} continues {results.config.prompt!r}", align="left")
        console.print(results.config.prompt, style="dim", end="")
        console.print(printable(result.sample))
    console.rule()
    console.print(terminal_table(results))
    note = "bits/byte: held-out text, lower is better; tok/s and cache: decoding one sequence"
    say(console, note, style="dim")
    say(console, f"learning rate: {learning_rates(results)}", style="dim")
