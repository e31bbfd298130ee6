"""`subquad arena`: on text, on a task, or how costs grow; and which options go together."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from subquad.cli.complete import complete_rows

TEXT, TASK = "On text", "On a task"


def arena(
    rows: Annotated[
        str | None,
        typer.Option(
            help="Rows, with commas between, also with options of the mixer: "
            "deltanet:allow_negative_eigenvalues, mamba2:state_size=16.",
            show_default="softmax_attention, mamba, mamba2, gla, gated_deltanet",
            autocompletion=complete_rows,
        ),
    ] = None,
    parameters: Annotated[
        str | None,
        typer.Option(help="Size of every model.", show_default="1M; on a task what it needs"),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps of every row, whatever time they take.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Sequences in a step.", show_default="4; the task's")
    ] = None,
    lr: Annotated[
        str | None,
        typer.Option(
            help="Peak learning rate of every row. Of several (1e-3,3e-3; on text) each row is "
            "trained at each and shown at its best.",
            show_default="each row's own; the task's",
            metavar="<float,...>",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of weights and batches.", show_default="0")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda ...", show_default="auto")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where runs and report go.", show_default="runs/arena...")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="As for train.", show_default="stdlib", rich_help_panel=TEXT),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="Time for everything; sets the steps.", show_default="6", rich_help_panel=TEXT
        ),
    ] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(help="Tokens in a sequence.", show_default="256", rich_help_panel=TEXT),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="Train on this synthetic task instead.", rich_help_panel=TASK),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Size of the task: small, published ...",
            show_default="small",
            rich_help_panel=TASK,
        ),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="A setting of the task, or of TaskArenaConfig, as JSON: --set pairs=4 "
            "--set hidden_size=64. Repeatable.",
            rich_help_panel=TASK,
        ),
    ] = None,
    list_tasks: Annotated[
        bool,
        typer.Option(
            "--list-tasks",
            help="What each task measures; with --task, what can be set of that one.",
            rich_help_panel=TASK,
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="The list, for programs.", rich_help_panel=TASK)
    ] = False,
    scaling: Annotated[
        bool,
        typer.Option(
            "--scaling",
            help="Measure how time and memory of every row grow with T and with d. --set "
            "tokens=[...], widths=[...], width, length, repeats, seconds.",
            rich_help_panel="Growth",
        ),
    ] = False,
) -> None:
    """Train several rows alike and compare their quality, speed and memory.

    Every row gets the same number of parameters, the same batches and the same steps. A table, a
    sample of each and a report in HTML come out. Ctrl-C keeps the rows that are finished; the same
    command continues from there.

    [cyan]subquad arena[/cyan]

    [cyan]subquad arena --rows gla,retnet,deltanet --parameters 3M --minutes 30 --out runs/b[/cyan]

    [cyan]subquad arena --list-tasks[/cyan]

    [cyan]subquad arena --task mqar --rows mamba2,gla --set pairs=16[/cyan]

    [cyan]subquad arena --scaling --rows mamba2,softmax_attention[/cyan]
    """
    # A thread that spins while it waits wins time on an idle machine; on a busy one it makes models
    # this small up to a hundred times slower, and a comparison false. Set before torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    from subquad.cli.arena_body import arena_command, scaling_command, task_command
    from subquad.cli.tasks_body import list_tasks_command

    common: dict[str, object] = {
        "rows": rows,
        "parameters": parameters,
        "steps": steps,
        "batch_size": batch_size,
        "lr": lr,
        "seed": seed,
        "device": device,
    }
    on_text = {"data": data, "minutes": minutes, "seq_len": seq_len}
    on_task = {"preset": preset, "set": setting, "json": as_json or None}
    if list_tasks:
        strays = common | on_text | {"preset": preset, "set": setting, "scaling": scaling or None}
        _refuse_strays(strays | {"out": out}, "--list-tasks")
        list_tasks_command(as_json, task)
        return
    if scaling:
        strays = common | on_text | on_task | {"task": task}
        taken = ("rows", "device", "set")
        _refuse_strays({n: v for n, v in strays.items() if n not in taken}, "--scaling")
        given = {n: value for n, value in common.items() if value is not None}
        scaling_command(out or Path("runs/scaling"), given, setting or [])
        return
    _refuse_strays(on_text if task else on_task, "--task" if task else "the arena on text")
    if task:
        asked = common | {"task": task, "preset": preset}
        chosen = {name: value for name, value in asked.items() if value is not None}
        raise typer.Exit(task_command(out, chosen, setting or []))
    given = {n: value for n, value in (common | on_text).items() if value is not None}
    raise typer.Exit(arena_command(out or Path("runs/arena"), given))


def _refuse_strays(options: Mapping[str, object], where: str) -> None:
    """ValueError for an option that was given but would not be read."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"--{name.replace('_', '-')}: does not go with {where}; leave it out")
