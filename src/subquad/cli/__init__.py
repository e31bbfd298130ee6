"""The command line. Each command parses and hands over; what it hands over to loads only then, so
that `subquad --help` answers sooner than torch would have been imported."""

import sys
from typing import Annotated

import typer

from subquad import __version__
from subquad.cli import arena, generate, rows, train

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


_COMMANDS = (rows.table, rows.explain, rows.hippo, train.train, generate.generate, arena.arena)
for _command in _COMMANDS:  # in the order of --help
    app.command()(_command)
