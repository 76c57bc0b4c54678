"""Tables on terminals of any width."""

import sys

from rich.text import Text


def print_table(console, table) -> None:
    """Print a rich table; where it would have to cut words or figures, one line for each cell.

    Args:
        console: it decides the width. table: cells that are no text, such as bars, are left out of the lines.
    """
    with console.capture() as shown:
        console.print(table)
    text = shown.get()
    names = [_text(column.header) for column in table.columns]
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    cells = [cell for row in [names, *rows] for cell in row if isinstance(cell, (str, Text))]
    if all(word in text for cell in cells for word in str(cell).split()):
        console.print(table)
        return
    if table.title:
        console.print(_text(table.title))
    for row in rows:
        console.print(names[0] + Text(": " if names[0] else "") + _text(row[0]))
        for name, cell in zip(names[1:], row[1:], strict=True):
            if isinstance(cell, (str, Text)) and str(cell):
                console.print(Text("  ") + name + Text(": ") + _text(cell))


def _text(content: str | Text) -> Text:
    return content.copy() if isinstance(content, Text) else Text(content)


def say(sentence: str) -> None:
    """A line for the user while something takes long."""
    print(f"liger: {sentence}", file=sys.stderr)
