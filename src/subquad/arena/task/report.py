"""The results of an arena on a task for people: a terminal table and a self-contained page."""

import dataclasses
import json
import math
import shlex
from pathlib import Path
from typing import Any

from rich.text import Text

from subquad.arena.columns import NumberTable
from subquad.arena.drawing import byte_count, count, looks
from subquad.arena.page import render
from subquad.arena.task.example import example
from subquad.arena.task.plots import (
    by_length,
    learning_against_time,
    learning_curves,
    quality_against_state,
)
from subquad.arena.task.results import Outcome, TaskArenaConfig, TaskArenaResults, TaskRowResult
from subquad.files import write_atomically, write_json
from subquad.tasks import Task
from subquad.tasks.scoring import CHUNK


def write_task_report(results: TaskArenaResults, folder: Path) -> Path:
    """Write results.json and, once a row is finished, report.html; return the page's path."""
    write_json(folder / "results.json", results.to_json())
    page = folder / "report.html"
    if results.rows:
        write_atomically(page, render_task_html(results))
    return page


def task_table(results: TaskArenaResults, tests: int = 4) -> NumberTable:
    """The finished rows, for a rich Console; of the tests as many as given, evenly chosen."""
    task = results.config.build()
    names = list(task.tests())
    number = min(tests, len(names))
    shown = [round(i * (len(names) - 1) / max(1, number - 1)) for i in range(number)]
    heads = ["\nparams", "solved\nat step", "\nstate"]
    heads += ["\n".join(names[index].rpartition(" ")[::2]) for index in shown]
    rows = []
    for row in results.rows:
        values = [row.tests[index] for index in shown]
        cells = [
            Text(count(row.shape.parameters)),
            Text(_solved(row)),
            Text(byte_count(row.state_bytes).replace("iB", "")),
            *(Text(value_text(v), style="bold" if _is_solved(task, v) else "") for v in values),
        ]
        rows.append((row.label, cells))
    return NumberTable("\nrow", heads, rows)


def value_text(outcome: Outcome) -> str:
    return "not run" if outcome.value is None else f"{outcome.value:.3f}"


def _is_solved(task: Task, outcome: Outcome) -> bool:
    return outcome.value is not None and task.is_solved(outcome.value)


def _solved(row: TaskRowResult) -> str:
    if row.solved is not None:
        return f"{row.solved:,}"
    return f"cut off at {row.steps:,}" if row.cut else "no"


def render_task_html(results: TaskArenaResults) -> str:
    """The page, complete in one string. Needs at least one finished row."""
    if not results.rows:
        raise ValueError("results hold no finished row, so there is nothing to report yet")
    task, plan, config = results.config.build(), results.plan, results.config
    drawings = {
        "learning_wide": learning_curves(results, 912, 380),
        "learning_narrow": learning_curves(results, 440, 380),
        "length_wide": by_length(results, 912, 380),
        "length_narrow": by_length(results, 440, 380),
        "time": learning_against_time(results, 440, 340),
        "state": quality_against_state(results, 440, 340),
    }
    environment = plan.environment
    versions = ("subquad", "torch", "transformers", "python")
    return render(
        "task/report.html.jinja",
        drawings,
        task=task,
        metric=task.metric if task.metric == "NMSE" else task.metric.capitalize(),
        lower=task.metric == "NMSE",
        guess=f"{task.guess:.3g}",
        parameters=count(plan.parameters) if plan.parameters else None,
        recipe=plan.recipe,
        missing=results.missing,
        environment=environment,
        until_solved=config.until_solved,
        chunk=CHUNK,
        findings=findings(results),
        tests=list(task.tests()),
        rows=_page_rows(task, results),
        example=example(task),
        settings=[(name, str(value)) for name, value in dataclasses.asdict(task).items()],
        details=[
            ("Machine", f"{environment['processor']}, {environment['platform']}"),
            ("Versions", ", ".join(f"{name} {environment[name]}" for name in versions)),
            ("Seed", str(config.seed)),
            ("Models", "; ".join(f"{r.label}: {r.shape.description}" for r in results.rows)),
        ],
        command=task_command_line(config),
    )


def _page_rows(task: Task, results: TaskArenaResults) -> list[dict[str, Any]]:
    look = looks(row.label for row in results.rows)
    return [_page_row(task, row) | {"colour": look[row.label].colour} for row in results.rows]


def _page_row(task: Task, row: TaskRowResult) -> dict[str, Any]:
    cells = [
        {"name": test.name, "value": value_text(test), "solved": _is_solved(task, test)}
        for test in row.tests
    ]
    return {
        "label": row.label,
        "cells": cells,
        "solved": _solved(row),
        "steps": f"{row.steps:,}",
        "seconds": f"{row.seconds:,.0f}",
        "parameters": f"{row.shape.parameters:,}",
        "state": byte_count(row.state_bytes),
        "failure": row.failure,
    }


def findings(results: TaskArenaResults) -> list[str]:
    """What follows from the numbers alone: who solved it as trained, and how far that carries."""
    task = results.config.build()
    solved = [row.label for row in results.rows if _is_solved(task, row.tests[0])]
    cut = {row.label: row.steps for row in results.rows if row.cut and row.label not in solved}
    others = [row.label for row in results.rows if row.label not in {*solved, *cut}]
    sentences = []
    if solved:
        sentences.append(f"Solved as trained ({task.metric} {task.solved:g}): {', '.join(solved)}.")
    if others:
        sentences.append(f"Not solved in {results.plan.recipe.steps:,} steps: {', '.join(others)}.")
    if cut:
        steps = (f"{label} (step {step:,})" for label, step in cut.items())
        sentences.append(f"Cut off by the clock, not solved: {', '.join(steps)}.")
    for row in results.rows:
        run = [test for test in row.tests if test.value is not None]
        if row.label not in solved or len({test.positions for test in run}) < 2:
            continue
        longest = max(run, key=lambda test: test.positions)
        sentences.append(
            f"{row.label}: solved up to {count(_reach(task, run))} positions; at "
            f"{count(longest.positions)} {task.metric} {value_text(longest)}."
        )
    return sentences


def _reach(task: Task, run: list[Outcome]) -> int:
    """The longest test up to which, from the one of training on, every test is solved."""
    trained = run[0].positions
    beyond = [test for test in run if test.positions > trained]
    failed = [test.positions for test in beyond if not _is_solved(task, test)]
    limit = min(failed, default=math.inf)
    return max((test.positions for test in beyond if test.positions < limit), default=trained)


def task_command_line(config: TaskArenaConfig) -> str:
    """The command that asks the same again."""
    words = ["subquad", "arena", "--task", config.task]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        flag = f"--{field.name.replace('_', '-')}"
        if field.name in ("task", "settings", "device") or value is None or value == field.default:
            continue
        if field.name == "rows":
            words += [flag, ",".join(value)]
        elif field.name in _OPTIONS:
            words += [flag, str(value)]
        else:
            words += ["--set", f"{field.name}={json.dumps(value)}"]
    for name, value in config.settings.items():
        words += ["--set", f"{name}={json.dumps(value)}"]
    return shlex.join(words)


_OPTIONS = ("preset", "rows", "parameters", "steps", "batch_size", "lr", "seed")
