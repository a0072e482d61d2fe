"""Tables that can be read at any width: where their columns do not fit side by side, their rows are written out."""

import html
import io
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

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
    texts = [[_text(cell) for cell in (column.header, *column.cells)] for column in table.columns]
    whole = [max(text.cell_len for text in column) for column in texts]
    words = [max(max(map(len, text.plain.split()), default=0) for text in column) for column in texts]
    # Numbers stay whole; words go on below.
    least = [
        most if column.justify == "right" else word
        for column, most, word in zip(table.columns, whole, words, strict=True)
    ]
    frame = Measurement.get(console, console.options.update(width=100_000), table).maximum - sum(whole)
    room = console.width - frame
    if sum(least) > room:
        _stack(console, table, texts)
        return
    for column, width in zip(table.columns, _shrunk(whole, least, room), strict=True):
        column.width = width
    console.print(table)


class Tabular(ABC):
    """A value that people look at as tables: as text where it is printed, as HTML in a notebook."""

    @abstractmethod
    def tables(self) -> list[Table]: ...

    def __str__(self) -> str:
        console = Console(width=WIDE, file=io.StringIO(), color_system=None)
        with console.capture() as shown:
            for table in self.tables():
                show(console, table)
        return "\n".join(line.rstrip() for line in shown.get().splitlines())

    def _repr_html_(self) -> str:
        return "".join(map(as_html, self.tables()))


def as_html(table: Table) -> str:
    """The same as a table of a web page, as notebooks show it."""
    columns = [[_text(cell).plain for cell in (column.header, *column.cells)] for column in table.columns]
    rights = [' style="text-align:right"' if column.justify == "right" else "" for column in table.columns]
    lines = ["<table>"]
    if table.title is not None:
        lines.append(f"<caption>{html.escape(_text(table.title).plain)}</caption>")
    for number, cells in enumerate(zip(*columns, strict=True)):
        tag = "td" if number else "th"
        lines.append("<tr>")
        lines += [f"<{tag}{right}>{html.escape(cell)}</{tag}>" for cell, right in zip(cells, rights, strict=True)]
        lines.append("</tr>")
    return "".join([*lines, "</table>"])


def _shrunk(whole: Sequence[int], least: Sequence[int], room: int) -> list[int]:
    """Widths that fit: always the widest that can become narrower does."""
    widths = list(whole)
    while sum(widths) > room:
        widest = max((i for i in range(len(widths)) if widths[i] > least[i]), key=lambda i: widths[i])
        widths[widest] -= 1
    return widths


def _stack(console: Console, table: Table, texts: Sequence[Sequence[Text]]) -> None:
    """Each row on lines of its own; what tells rows apart stands first, and alone."""
    if table.title is not None:
        console.print(table.title, style="table.title", highlight=False)
    heads = [column[0] for column in texts]
    for cells in zip(*(column[1:] for column in texts), strict=True):
        if cells[0]:
            console.print(cells[0], style="bold", highlight=False)
        for line in _lines(heads[1:], cells[1:], console.width - 2):
            console.print(Text("  ") + line, highlight=False)


def _lines(heads: Sequence[Text], cells: Sequence[Text], width: int) -> Iterator[Text]:
    """A row's cells, each behind its column's head, as many in a line as fit; longer ones are broken between words."""
    line = Text()
    for head, cell in zip(heads, cells, strict=True):
        if not cell:
            continue
        pair = Text.assemble(head, " ", cell) if head else cell
        if line and line.cell_len + 3 + pair.cell_len > width:
            yield line
            line = Text()
        line = Text.assemble(line, " · ", pair) if line else pair
    if line:
        yield line


def _text(cell: object) -> Text:
    return cell.copy() if isinstance(cell, Text) else Text.from_markup(str(cell))
