"""Tables for people: on terminals of any width, as Markdown, and as CSV. The one place that lays them out."""

import csv
import io
import sys
from dataclasses import dataclass, field

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from liger_cli.system.escape import csv_cell, markdown, printable

FORMATS = ("table", "md", "json", "csv")


@dataclass
class Table:
    """A title, a header, rows of strings; the first `words` columns are aligned to the left, figures to the right."""

    title: str
    header: list[str]
    rows: list[list[str]] = field(default_factory=list)
    words: int = 1

    def markdown(self) -> str:
        lines = [f"**{markdown(self.title)}**", ""] if self.title else []
        lines.append(_markdown_row(self.header))
        lines.append("|" + "---|" * self.words + "---:|" * (len(self.header) - self.words))
        return "\n".join([*lines, *map(_markdown_row, self.rows)])

    def csv(self) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([list(map(csv_cell, cells)) for cells in (self.header, *self.rows)])
        return text.getvalue()


def _widths(header: list[str], rows: list[list[str]], width: int) -> list[int | None]:
    """Columns that every cell and every word of the header fit into, and what is left of `width` for the headers.

    None for each where they do not fit: rich then breaks cells as it sees fit.
    """
    least = [
        max(map(cell_len, (*name.split(), *(row[index] for row in rows), " "))) for index, name in enumerate(header)
    ]
    left = width - sum(least) - 3 * len(least) - 1  # borders, and a space on either side of a cell
    if left < 0:
        return [None] * len(header)
    for index, name in enumerate(header):
        more = min(left, max(cell_len(name) - least[index], 0))
        least[index] += more
        left -= more
    return least


def print_tables(
    tables: list[Table], output_format: str = "table", notes: tuple[str, ...] = (), wrap: bool = False
) -> None:
    """Print tables to stdout; notes follow them (for CSV on stderr).

    Args:
        wrap: notes too; else paths and commands in them stay whole, to be copied.
    """
    if output_format == "table":
        console = Console(highlight=False, markup=False, emoji=False)
        for table in tables:
            _print(console, table)
        for note in notes:
            console.print(printable(note, keep="\n"), soft_wrap=not wrap)
        return
    if output_format == "md":
        print("\n\n".join([table.markdown() for table in tables] + [printable(note, keep="\n") for note in notes]))
        return
    print("\n".join(table.csv() for table in tables), end="")
    for note in notes:
        print(printable(note, keep="\n"), file=sys.stderr)


def _print(console: Console, table: Table) -> None:
    """On a terminal; where it would have to cut words or figures, one line for each cell."""
    header, *rows = [[printable(cell) for cell in row] for row in (table.header, *table.rows)]
    shown = RichTable(box=box.SIMPLE_HEAD)
    for index, (name, columns) in enumerate(zip(header, _widths(header, rows, console.width), strict=True)):
        side = "left" if index < table.words else "right"
        shown.add_column(Text(name), justify=side, width=columns, overflow="fold")
    for row in rows:
        shown.add_row(*map(Text, row))
    if table.title:
        console.print(printable(table.title), soft_wrap=True)
    with console.capture() as captured:
        console.print(shown)
    text = captured.get()
    if all(word in text for row in (header, *rows) for cell in row for word in cell.split()):
        console.print(shown)
        return
    for row in rows:
        console.print(f"{header[0]}: {row[0]}" if header[0] else row[0])
        for name, cell in zip(header[1:], row[1:], strict=True):
            if cell:
                console.print(f"  {name}: {cell}")


def _markdown_row(cells: list[str]) -> str:
    return "| " + " | ".join(map(markdown, cells)) + " |"
