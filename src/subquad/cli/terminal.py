"""Terminals: what is printed fits their width, and a reader that goes away stops nothing.

Lines are wrapped between words, never in one. What is meant to be copied (a path, a command) has a
line of its own, which is never wrapped. Nothing that is printed here is read as markup.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from typing import Any, TextIO

from rich.console import Console


class Lasting:
    """A stream that goes silent once nobody reads it, or the terminal has gone.

    A training of hours must not end, unsaved, because its progress cannot be shown.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            silence(self.stream)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            silence(self.stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def silence(stream: TextIO) -> None:
    """Send what is still to come nowhere, also what Python flushes when it exits."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, stream.fileno())
    except (OSError, ValueError):  # no file behind it
        pass
    finally:
        os.close(nowhere)


def screen() -> Console:
    """What is printed as a command's result."""
    return _console(sys.stdout)


def sidelines() -> Console:
    """What is printed beside it, on stderr: progress and notes."""
    return _console(sys.stderr)


def _console(stream: TextIO | None) -> Console:
    """Python has no stream where the shell closed it."""
    lasting: Any = Lasting(stream or open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    return Console(file=lasting, markup=False, highlight=False, emoji=False)


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print text, wrapped between words."""
    line = wrapped(text, console.width)
    console.print(line, style=style, soft_wrap=True, markup=False, highlight=False)


def wrapped(text: str, width: int) -> str:
    """Every line of a text as lines of this width; a word that is longer stays whole."""
    wrapper = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False)
    return "\n".join(wrapper.fill(line) for line in text.split("\n"))


def printable(text: str) -> str:
    """Text of a model, in which a terminal finds no commands for itself."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


def show_path(console: Console, what: str, path: object) -> None:
    """Print where something is, on one line."""
    console.print(f"\n[bold]{what}[/bold]  ", end="", markup=True)
    console.print(str(path), soft_wrap=True)


def show_command(console: Console, *words: object) -> None:
    """Print a command that can be copied, on one line."""
    console.print(f"  {command(*words)}", soft_wrap=True)


def command(*words: object) -> str:
    """The words as a shell reads them back."""
    written = [str(word) for word in words]
    return subprocess.list2cmdline(written) if os.name == "nt" else shlex.join(written)


def print_error(text: str) -> None:
    """One line in a log; on a terminal as many as its width asks for."""
    line = f"error: {' '.join(text.split())}"
    if sys.stderr.isatty():
        line = wrapped(line, shutil.get_terminal_size().columns)
    print(line, file=sys.stderr)
