"""`subquad table`, `explain` and `hippo`: what rows are, and where they come from."""

from pathlib import Path
from typing import Annotated

import typer

from subquad.cli.complete import complete_row


def table(
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show the table: every row's recurrence, state, costs and paper, and whether it runs.

    [cyan]subquad table --json[/cyan]
    """
    from subquad.cli.rows_body import table_command

    table_command(as_json)


def explain(
    row: Annotated[
        str,
        typer.Argument(help="A row of the table: subquad table.", autocompletion=complete_row),
    ],
    hidden_size: Annotated[int, typer.Option(help="Width of the layer that is tried.")] = 512,
    tokens: Annotated[int, typer.Option(help="Tokens given at once.")] = 1024,
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Explain a row: its formulas and costs, which form and kernel run here, why, and how fast.

    [cyan]subquad explain gated_deltanet --tokens 8192[/cyan]
    """
    from subquad.cli.rows_body import explain_command

    explain_command(row, hidden_size, tokens, batch, device, as_json)


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
    from subquad.cli.hippo.body import hippo_command

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
