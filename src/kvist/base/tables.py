"""Tables that can be read at any width: where their columns do not fit side by side, their rows are written out."""

import sys
from collections.abc import Iterator

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

WIDE = 140  # columns


def output(wide: int = WIDE) -> Console:
    """Standard output, as wide as the terminal is; `wide` columns where it is none."""
    return Console(width=None if sys.stdout.isatty() else wide)


def show(console: Console, table: Table) -> None:
    """Print a table, or its rows one after another, if numbers or words would be broken to fit it in. Cells are
    text."""
    for column in table.columns:
        column.no_wrap = column.no_wrap or column.justify == "right"  # numbers stay whole; words go on below
    if Measurement.get(console, console.options.update(width=10_000), table).minimum <= console.width:
        console.print(table)
        return
    if table.title is not None:
        console.print(table.title, style="table.title", highlight=False)
    for cells in zip(*(column.cells for column in table.columns), strict=True):
        # What tells rows apart stands first, and alone.
        if first := _text(cells[0]):
            console.print(first, style="bold", highlight=False)
        for line in _lines(table, cells[1:], console.width - 2):
            console.print(Text("  ") + line, highlight=False)


def _lines(table: Table, cells: tuple[object, ...], width: int) -> Iterator[Text]:
    """A row's cells, each behind its column's head, as many in a line as fit; longer ones are broken between words."""
    line = Text()
    for column, cell in zip(table.columns[1:], cells, strict=True):
        value = _text(cell)
        if not value.plain:
            continue
        head = _text(column.header)
        pair = Text.assemble(head, " ", value) if head.plain else value
        if line and line.cell_len + 3 + pair.cell_len > width:
            yield line
            line = Text()
        line = Text.assemble(line, " · ", pair) if line else pair
    if line:
        yield line


def _text(cell: object) -> Text:
    return cell.copy() if isinstance(cell, Text) else Text.from_markup(str(cell))
