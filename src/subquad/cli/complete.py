"""What the tab key offers beside commands, options and paths: the rows. Loads no torch."""

from subquad.table import ROWS


def complete_row(incomplete: str) -> list[str]:
    """A row's name."""
    return [name for name in ROWS if name.startswith(incomplete.lower())]


def complete_rows(incomplete: str) -> list[str]:
    """The last of several names with commas between."""
    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in complete_row(last)]
