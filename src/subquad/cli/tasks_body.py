"""The body of `subquad arena --list-tasks`: what each task measures, and what of it can be set."""

import json
from dataclasses import fields
from typing import Any

from rich.table import Table
from rich.text import Text

from subquad import tasks
from subquad.cli.terminal import say, screen, show_command
from subquad.errors import pick

_WIDE = 140  # from here on the list has a column for each fact


def list_tasks_command(as_json: bool, task: str | None = None) -> None:
    """Print every task, or `task`: what it measures, who solves it, where it is from."""
    if task is not None:
        task = pick("task", task, tasks.TASKS)
    listed = [_facts(name) for name in tasks.TASKS if task in (None, name)]
    if as_json:
        print(json.dumps(listed, indent=2, ensure_ascii=False))
        return
    console = screen()
    console.print(_page(listed, console.width >= _WIDE))
    if task:
        say(console, f"\npresets: {', '.join(listed[0]['presets'])}")
        for name, value in listed[0]["settings"].items():
            written = json.dumps(value, separators=(",", ":"))
            console.print(f"--set {name}={written}", soft_wrap=True)
    say(console, f"\nTo train rows on {'it' if task else 'one'}:")
    show_command(console, "subquad", "arena", "--task", task or "mqar", "--rows", "mamba2,gla")


def _page(listed: list[dict[str, Any]], wide: bool) -> Table:
    page = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    page.add_column("task", no_wrap=True)
    for head in ("measures", "solved by", "from") if wide else ("what it is",):
        page.add_column(head, overflow="fold")
    for facts in listed:
        columns = [facts["measures"], facts["solved_by"], facts["from"]]
        if wide:
            page.add_row(facts["task"], *map(Text, columns))
        else:
            below = f"\nsolved by: {columns[1]}\nfrom: {columns[2]}"
            page.add_row(facts["task"], Text.assemble(columns[0], (below, "dim")))
    return page


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
