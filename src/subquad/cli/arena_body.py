"""The body of `subquad arena`: on text, on a task, or the list of tasks."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.console import Console

from subquad import tasks
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
from subquad.cli.train_body import parse_setting
from subquad.errors import choose, fail
from subquad.files import write_json


def arena_command(out: Path, given: dict[str, Any]) -> int:
    """Run the arena of the given settings and show it.

    The exit status: 0, 130 if stopped, 1 if the training of a row broke off.

    `given`: fields of ArenaConfig as the user wrote them; `rows` and `parameters` as text.
    """
    if "rows" in given:
        given["rows"] = split_rows(given["rows"])
    if "parameters" in given:
        given["parameters"] = parse_count(given["parameters"])
    if "lr" in given:
        given["lr"] = parse_rates(given["lr"])
    config = ArenaConfig(**given)
    console = Console()
    with ArenaProgress(console) as progress:
        results = run_arena(config, out, progress.on_event)
    page = write_report(results, out)
    if results.rows:
        show(results, console)
    console.print(f"\n[bold]Report[/bold]  {page}", highlight=False, soft_wrap=True)
    for row, reason in results.failures.items():
        console.print(f"{row} gave up: {reason}", highlight=False)
    if results.missing:
        console.print(f"Stopped before: {', '.join(results.missing)}. The same command continues.")
        return 130
    return 1 if results.failures else 0


def task_command(out: Path | None, given: dict[str, Any], settings: list[str]) -> int:
    """Run the arena on a task and show it; the exit status: 0, or 130 if stopped.

    `given`: fields of TaskArenaConfig as the user wrote them. `settings`: name=value, of the task
    or else of TaskArenaConfig.
    """
    config = task_config(given, settings)
    out = out or Path("runs") / f"arena-{config.task}"
    console = Console()
    with TaskProgress(console) as progress:
        results = run_task_arena(config, out, progress.on_event)
    page = write_task_report(results, out)
    if results.rows:
        console.rule()
        console.print(task_table(results))
        task = config.build()
        better = "lower" if task.metric == "NMSE" else "higher"
        console.print(
            f"{task.metric} on new sequences, {better} is better, bold: solved; a uniform guess "
            f"has {task.guess:.3g}; state: bytes kept of one sequence",
            style="dim",
        )
    console.print(f"\n[bold]Report[/bold]  {page}", highlight=False, soft_wrap=True)
    if results.missing:
        console.print(f"Stopped before: {', '.join(results.missing)}. The same command continues.")
        return 130
    return 0


def task_config(given: dict[str, Any], settings: list[str]) -> TaskArenaConfig:
    """The config that the command line means."""
    if "rows" in given:
        given["rows"] = split_rows(given["rows"])
    if "parameters" in given:
        given["parameters"] = parse_count(given["parameters"])
    if "lr" in given:
        rates = parse_rates(given["lr"])
        if len(rates) > 1:
            raise fail("lr", list(rates), "one number on a task", "run the arena once for each")
        given["lr"] = rates[0]
    own = {field.name for field in fields(TaskArenaConfig)} - {"task", "settings"}
    of_task = dict[str, Any]()
    for setting in settings:
        name, value = parse_setting(setting)
        (given if name in own else of_task)[name] = value
    return TaskArenaConfig(**given, settings=of_task)


def scaling_command(out: Path, given: dict[str, Any], settings: list[str]) -> None:
    """Measure how time and memory grow, and show it. `settings`: fields of ScalingConfig."""
    if "rows" in given:
        given["rows"] = split_rows(given["rows"])
    known = {field.name for field in fields(ScalingConfig)}
    for setting in settings:
        name, value = parse_setting(setting)
        if name not in known:
            raise fail(
                f"--set {name}", "no such field", f"one of {', '.join(sorted(known))}", "rename it"
            )
        given[name] = value
    config, console = ScalingConfig(**given), Console()
    with console.status("measuring") as status:
        record = run_scaling(
            config,
            lambda text: status.update(f"measuring {text}"),
            lambda measured: write_json(out / "scaling.json", measured),
        )
    page = write_scaling(record, out)
    for variable in ("T", "d"):
        console.print(scaling_table(record, variable))
        console.print()
    console.print(
        "exponents p of q = c x^p, with the standard error of the slope; one layer, one sequence",
        style="dim",
    )
    console.print(f"\n[bold]Report[/bold]  {page}", highlight=False, soft_wrap=True)


def list_tasks_command(as_json: bool, task: str | None = None) -> None:
    """Print every task, or `task`: what it measures, who solves it, where it is from."""
    from rich.table import Table

    if task is not None:
        choose("task", task, tuple(tasks.TASKS))
    told_of = [_facts(name) for name in tasks.TASKS if task in (None, name)]
    if as_json:
        print(json.dumps(told_of, indent=2, ensure_ascii=False))
        return
    console = Console()
    page = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    page.add_column("task", no_wrap=True)
    wide = console.width >= 140
    for column in ("measures", "solved by", "from") if wide else ("what it is",):
        page.add_column(column, overflow="fold")
    for facts in told_of:
        told = [facts["measures"], facts["solved_by"], facts["from"]]
        if not wide:
            told = [f"{told[0]}\n[dim]solved by: {told[1]}\nfrom: {told[2]}[/dim]"]
        page.add_row(facts["task"], *told)
    console.print(page, highlight=False)
    if task:
        console.print(f"\npresets: {', '.join(told_of[0]['presets'])}", highlight=False)
        for name, value in told_of[0]["settings"].items():
            written = json.dumps(value, separators=(",", ":"))
            console.print(f"--set {name}={written}", highlight=False, soft_wrap=True)
    console.print(
        f"\nTrain rows on {'it' if task else 'one'}:  subquad arena --task {task or 'mqar'} "
        "--rows mamba2,gla",
        style="dim",
        soft_wrap=True,
    )


def _facts(name: str) -> dict[str, Any]:
    cls = tasks.TASKS[name]
    return {
        "task": name,
        "measures": cls.measures,
        "solved_by": cls.solved_by,
        "from": cls.source,
        "metric": cls.metric,
        "presets": {preset: dict(values) for preset, values in cls.presets.items()},
        "settings": {field.name: field.default for field in fields(cls)},
    }


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


def parse_rates(text: str) -> tuple[float, ...]:
    """`1e-3,3e-3` -> (0.001, 0.003)."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        expected = "a number, or several with commas between"
        raise fail("lr", repr(text), expected, "for example --lr 1e-3,3e-3") from None


def show(results: ArenaResults, console: Console) -> None:
    """The samples, then the table, which is what one wants to have on the screen in the end."""
    for result in results.rows:
        console.rule(
            f"[bold]{result.name}[/bold] continues {results.config.prompt!r}", align="left"
        )
        console.print(results.config.prompt, style="dim", end="", highlight=False, markup=False)
        console.print(result.sample, highlight=False, markup=False)
    console.rule()
    console.print(terminal_table(results))
    console.print(
        "bits/byte: held-out text, lower is better; tok/s and cache: decoding one sequence",
        style="dim",
    )
    if len(results.config.rates) > 1:
        console.print(f"learning rate: {learning_rates(results)}", style="dim", highlight=False)
