"""The command line. Each command parses and hands over; what it hands over to loads only then, so
that `subquad --help` answers sooner than torch would have been imported."""

import functools
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from subquad import __version__
from subquad.cli import arena, generate, rows, train

HELP = """\
Linear-time language models and the Transformer they rival: train, run and compare them.

Every model is a row of one table, and every command takes the row's name.
To begin with (nothing is downloaded: the text is Python's own standard library):

[cyan]subquad train runs/gla --mixer gla --steps 500[/cyan]

[cyan]subquad generate runs/gla --prompt "def "[/cyan]

[cyan]subquad arena --rows softmax_attention,gla,mamba2 --minutes 5[/cyan]

[cyan]subquad table[/cyan] lists the rows; [cyan]subquad explain gla[/cyan] says what one does.

Each command has examples of its own: [cyan]subquad train --help[/cyan].
[cyan]subquad --install-completion[/cyan] completes commands, options and rows with the tab key.
"""


def main() -> None:
    """Run the command line. What the user can fix is one line; a traceback is a bug."""
    try:
        app()
    except (ValueError, OSError, ImportError, RuntimeError, MemoryError) as error:
        ours = type(error).__module__.startswith("subquad.")
        if "--debug" in sys.argv or (isinstance(error, RuntimeError) and not ours):
            raise
        from subquad.cli.terminal import print_error

        print_error(str(error) or "there is not enough memory")
        sys.exit(1)


def _unwrapped(text: str) -> str:
    """The paragraphs of a docstring each on one line, for the terminal to wrap at its own width."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


app = typer.Typer(
    name="subquad",
    help=_unwrapped(HELP),
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _interruptible(command: Callable[..., Any]) -> Callable[..., Any]:
    """`command`, after whose Ctrl-C the exit status is a shell's 130, and nothing is printed."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> Any:
        try:
            return command(*args, **options)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None

    return run


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


_COMMANDS: tuple[Callable[..., Any], ...] = (
    rows.table,
    rows.explain,
    rows.hippo,
    train.train,
    generate.generate,
    arena.arena,
)
for _command in _COMMANDS:  # in the order of --help
    app.command(help=_unwrapped(_command.__doc__ or ""))(_interruptible(_command))
