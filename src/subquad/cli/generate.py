"""`subquad generate`: its arguments."""

from pathlib import Path
from typing import Annotated

import typer


def generate(
    model: Annotated[Path, typer.Argument(help="A run directory or a Hugging Face model folder.")],
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

    With linear-time rows, memory stays the same however long the text gets. Of a run that is still
    training, the newest checkpoint is read.

    [cyan]subquad generate runs/gla --prompt "import "[/cyan]

    [cyan]subquad generate runs/gla --prompt "class " --temperature 0 --max-new-tokens 1000[/cyan]
    """
    from subquad.cli.generate_body import generate_command

    generate_command(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        device=device,
    )
