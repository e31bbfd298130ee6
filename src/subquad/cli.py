"""The command line. Each command parses and hands over; what it hands over to loads only then, so
that `subquad --help` answers sooner than torch would have been imported."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from subquad import __version__

HELP = """\
Linear-time language models and the Transformer they rival: train them, hear them, compare them.

Every model is a row of one table, and every command takes the row's name.
To begin with (nothing is downloaded: the text is Python's own standard library):

[cyan]subquad train runs/gla --mixer gla --steps 500[/cyan]

[cyan]subquad generate runs/gla --prompt "def "[/cyan]

[cyan]subquad arena --rows softmax_attention,gla,mamba2 --minutes 5[/cyan]

[cyan]subquad table[/cyan] lists the rows; [cyan]subquad explain gla[/cyan] tells what one does.

Each command has examples of its own: [cyan]subquad train --help[/cyan].
"""

app = typer.Typer(
    name="subquad",
    help=HELP,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line. What the user can mend is told in one line; a traceback is a bug."""
    try:
        app()
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        ours = type(error).__module__.startswith("subquad.")
        if "--debug" in sys.argv or (isinstance(error, RuntimeError) and not ours):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"subquad {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show the traceback of an error: subquad --debug train ..."),
    ] = False,
) -> None:
    """Options that stand before the command. `main` looks for --debug itself."""


@app.command()
def table(
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show the table: every row's recurrence, state, costs and paper, and whether it runs.

    [cyan]subquad table --json[/cyan]
    """
    from subquad.arena.rows import table_command

    table_command(as_json)


@app.command()
def explain(
    row: Annotated[str, typer.Argument(help="A row of the table: subquad table.")],
    hidden_size: Annotated[int, typer.Option(help="Width of the layer that is tried.")] = 512,
    tokens: Annotated[int, typer.Option(help="Tokens given at once.")] = 1024,
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Explain a row: its formulas and costs, which form and kernel run here, why, and how fast.

    [cyan]subquad explain gated_deltanet --tokens 8192[/cyan]
    """
    from subquad.arena.rows import explain_command

    explain_command(row, hidden_size, tokens, batch, device, as_json)


@app.command()
def hippo(
    signal: Annotated[
        str, typer.Argument(help="waves, steps, noise, or a .csv, .txt or .npy file of numbers.")
    ] = "waves",
    measure: Annotated[
        str, typer.Option(help="Which past: legs (all of it), legt or lmu (a window), decay.")
    ] = "legs",
    size: Annotated[int, typer.Option(help="Numbers that the memory keeps.")] = 64,
    method: Annotated[
        str, typer.Option(help="Discretisation: zoh (exact), bilinear, backward_euler, euler.")
    ] = "zoh",
    window: Annotated[
        float | None,
        typer.Option(
            help="Samples: the reach of legt and lmu, the time constant of decay.",
            show_default="a quarter of the signal",
        ),
    ] = None,
    length: Annotated[int, typer.Option(help="Samples of waves, steps or noise.")] = 1000,
    column: Annotated[
        str | None, typer.Option(help="Of a file with several: its name, or its number from 1.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the drawing goes.")] = Path("runs/hippo.png"),
) -> None:
    """Draw what a state of few numbers remembers of a signal: HiPPO, from which S4 and Mamba came.

    The signal is read sample by sample and looked back on after each quarter of it.

    [cyan]subquad hippo[/cyan]

    [cyan]subquad hippo steps --measure legt --window 300 --size 32[/cyan]

    [cyan]subquad hippo prices.csv --column close --method bilinear --out prices.png[/cyan]
    """
    from subquad.ssm.command import hippo_command

    hippo_command(
        signal,
        measure=measure,
        size=size,
        method=method,
        window=window,
        length=length,
        column=column,
        out=out,
    )


MODEL, DATA, TRAINING = "The model", "The text", "The training"


@app.command()
def train(
    run_dir: Annotated[
        Path | None,
        typer.Argument(help="Where the run goes: a new directory.", show_default="runs/ROW"),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue the run in RUN_DIR from its newest checkpoint."),
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(help="Begin with the settings of another run: its directory or config.json."),
    ] = None,
    mixer: Annotated[
        str | None,
        typer.Option(
            help="Row of the table for every layer.",
            show_default="gated_deltanet",
            rich_help_panel=MODEL,
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="How many layers, or the row of each: mamba2,mamba2,softmax_attention.",
            show_default="4",
            rich_help_panel=MODEL,
        ),
    ] = None,
    hidden_size: Annotated[
        int | None,
        typer.Option(help="Channels.", show_default="256", rich_help_panel=MODEL),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="stdlib (this Python's own library), a text file, a folder, or a .jsonl file of "
            '{"text": ...} lines.',
            show_default="stdlib",
            rich_help_panel=DATA,
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="A Hugging Face tokenizer folder or a tokenizer.json.",
            show_default="bytes",
            rich_help_panel=DATA,
        ),
    ] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(help="Tokens in a sequence.", show_default="256", rich_help_panel=DATA),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Sequences in a step.", show_default="8", rich_help_panel=DATA),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Optimizer steps.", show_default="1000", rich_help_panel=TRAINING),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(help="Peak learning rate.", show_default="0.003", rich_help_panel=TRAINING),
    ] = None,
    accumulate: Annotated[
        int | None,
        typer.Option(
            help="Passes that a batch is spread over, when it does not fit in memory.",
            show_default="1",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    eval_every: Annotated[
        int | None,
        typer.Option(
            help="Steps between held-out scores.", show_default="100", rich_help_panel=TRAINING
        ),
    ] = None,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(
            help="Steps between checkpoints.", show_default="100", rich_help_panel=TRAINING
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Of the weights and the order of the text.",
            show_default="0",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="auto, cpu, cuda, cuda:1 ...", show_default="auto", rich_help_panel=TRAINING
        ),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Any other field of TrainConfig, or of SubquadConfig after `model.`, as JSON: "
            "--set weight_decay=0.05 --set model.norm_eps=1e-6. Repeatable.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
) -> None:
    """Train a language model on real text.

    Ctrl-C saves and stops; [cyan]--resume[/cyan] goes on from there, bit for bit on the CPU.
    RUN_DIR gets config.json, metrics.jsonl (a line a step), checkpoints/ and, at the end, model/:
    a Hugging Face folder.

    [cyan]subquad train runs/gla --mixer gla --steps 500[/cyan]

    [cyan]subquad train runs/hybrid --layers mamba2,mamba2,softmax_attention --data ~/texts[/cyan]

    [cyan]subquad train runs/gla --resume --steps 2000[/cyan]
    """
    from subquad.train.command import train_command

    given = {
        "data": data,
        "tokenizer": tokenizer,
        "steps": steps,
        "batch_size": batch_size,
        "seq_len": seq_len,
        "accumulate": accumulate,
        "lr": lr,
        "seed": seed,
        "device": device,
        "eval_every": eval_every,
        "checkpoint_every": checkpoint_every,
    }
    model = {"mixer": mixer, "layers": layers, "hidden_size": hidden_size}
    train_command(
        run_dir,
        given={name: value for name, value in given.items() if value is not None},
        model={name: value for name, value in model.items() if value is not None},
        settings=setting or [],
        base=config,
        resume=resume,
    )


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A run directory or a Hugging Face model folder.")],
    prompt: Annotated[str, typer.Option(help="The text to continue.")] = "",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add at most.")] = 256,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token; higher is wilder.")
    ] = 0.8,
    top_p: Annotated[
        float, typer.Option(help="Draw among the likeliest tokens that reach this probability.")
    ] = 0.95,
    seed: Annotated[
        int | None, typer.Option(help="Makes the draw repeatable.", show_default="random")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
) -> None:
    """Continue a prompt, printing as it goes.

    With linear-time rows, memory stays the same however long the text gets. A run that is still
    training speaks from its newest checkpoint.

    [cyan]subquad generate runs/gla --prompt "import "[/cyan]

    [cyan]subquad generate runs/gla --prompt "class " --temperature 0 --max-new-tokens 1000[/cyan]
    """
    from subquad.generate.command import generate_command

    generate_command(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        device=device,
    )


TEXT, TASK = "On text", "On a task"


@app.command()
def arena(
    rows: Annotated[
        str | None,
        typer.Option(
            help="Rows, with commas between, also with options of the mixer: "
            "deltanet:allow_negative_eigenvalues, mamba2:state_size=16.",
            show_default="softmax_attention,mamba,mamba2,gla,gated_deltanet",
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
            show_default="0.002; the task's",
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
        typer.Option("--list-tasks", help="Tell what each task measures.", rich_help_panel=TASK),
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
    command goes on from there.

    [cyan]subquad arena[/cyan]

    [cyan]subquad arena --rows gla,retnet,deltanet --parameters 3M --minutes 30 --out runs/b[/cyan]

    [cyan]subquad arena --list-tasks[/cyan]

    [cyan]subquad arena --task mqar --rows mamba2,gla --set pairs=16[/cyan]

    [cyan]subquad arena --scaling --rows mamba2,softmax_attention[/cyan]
    """
    # A thread that spins while it waits wins time on an idle machine; on a busy one it makes models
    # this small up to a hundred times slower, and a comparison false. Set before torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    from subquad.arena.command import (
        arena_command,
        list_tasks_command,
        scaling_command,
        task_command,
    )

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
        list_tasks_command(as_json)
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
