"""Tables of numbers for terminals of any width: where columns do not fit they go below."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

_GAP = 1


@dataclass(frozen=True)
class NumberTable:
    """A label a row and numbers beside it; headers may have several lines.

    Where a terminal is too narrow for all columns, the rest follow in a table of their own, so
    that no number is cut off.
    """

    label_head: str
    heads: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Text]]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        for columns in self._blocks(options.max_width):
            table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="dim")
            table.add_column(Text(self.label_head), overflow="fold")
            for column in columns:
                table.add_column(Text(self.heads[column]), justify="right", no_wrap=True)
            for label, cells in self.rows:
                table.add_row(Text(label), *(cells[column] for column in columns))
            yield table

    def _blocks(self, width: int) -> Iterator[list[int]]:
        """Which columns stand beside each other."""
        labels = max(map(_width, (self.label_head, *(label for label, _ in self.rows))))
        block: list[int] = []
        left = width - labels
        for column, head in enumerate(self.heads):
            needed = _GAP + max(
                _width(head), *(_width(cells[column].plain) for _, cells in self.rows)
            )
            if block and needed > left:
                yield block
                block, left = [], width - labels
            block.append(column)
            left -= needed
        yield block


def _width(text: str) -> int:
    return max(map(cell_len, text.split("\n")))
