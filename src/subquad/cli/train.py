"""`subquad train`: its arguments."""

from pathlib import Path
from typing import Annotated

import typer

from subquad.cli.complete import complete_row, complete_rows

MODEL, DATA, TRAINING = "The model", "The text", "The training"


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
    start: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Begin with the weights of another run or model folder, and so with its model.",
        ),
    ] = None,
    mixer: Annotated[
        str | None,
        typer.Option(
            help="Row of the table for every layer.",
            show_default="gated_deltanet",
            rich_help_panel=MODEL,
            autocompletion=complete_row,
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="How many layers, or the row of each: mamba2,mamba2,softmax_attention.",
            show_default="4",
            rich_help_panel=MODEL,
            autocompletion=complete_rows,
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

    Ctrl-C saves and stops; [cyan]--resume[/cyan] continues from there, bit for bit on the CPU.
    RUN_DIR gets config.json, metrics.jsonl (a line a step), checkpoints/ and, at the end, model/:
    a Hugging Face folder.

    [cyan]subquad train runs/gla --mixer gla --steps 500[/cyan]

    [cyan]subquad train runs/hybrid --layers mamba2,mamba2,softmax_attention --data ~/texts[/cyan]

    [cyan]subquad train runs/gla --resume --steps 2000[/cyan]

    [cyan]subquad train runs/tuned --from runs/gla --data notes.txt --lr 3e-4[/cyan]
    """
    from subquad.cli.train_body import train_command

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
    status = train_command(
        run_dir,
        given={name: value for name, value in given.items() if value is not None},
        model={name: value for name, value in model.items() if value is not None},
        settings=setting or [],
        base=config,
        start=start,
        resume=resume,
    )
    raise typer.Exit(status)
