"""Prints a page in a terminal or into a file: text and tables; charts are left to the HTML.

Text wraps at the terminal's width (80 columns in a file). A number is never broken or cut off: a table that does not fit is
printed wider than the terminal.
"""

import textwrap
from typing import TextIO

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table as Grid
from rich.text import Text

from launch.page import Bars, Code, Curve, Page, Table, Verdict

_UNBOUNDED = 100_000  # columns


def print_page(page: Page, file: TextIO | None = None, width: int | None = None) -> None:
    """Print a page.

    Args:
        file: None for stdout; colours only where it is a terminal.
        width: columns; None for the terminal's own.
    """
    out = _Out(file, width)
    out.text(page.title, "bold")
    out.text(page.lead)
    if page.figures:
        rows = [[figure.label, figure.value, figure.note] for figure in page.figures]
        out.gap()
        out.grid(rows, ["bold cyan" if i == 1 else "" for i in range(3)])
    for section in page.sections:
        out.gap()
        out.text(section.title, "bold underline")
        for part in section.parts:
            if isinstance(part, Curve | Bars):
                continue
            if isinstance(part, Table):
                out.table(part)
            elif isinstance(part, Verdict):
                out.text(part.text, "bold green" if part.good else "bold red")
            elif isinstance(part, Code):
                out.code(part.text)
            else:
                out.text(part)
    if page.footer:
        out.gap()
        out.text(page.footer)


class _Out:
    def __init__(self, file: TextIO | None, width: int | None) -> None:
        self._console = Console(file=file, width=width, highlight=False, markup=False, emoji=False)
        self._width = self._console.width

    def gap(self) -> None:
        """Leave a line free."""
        self._console.file.write("\n")

    def text(self, text: str, style: str = "") -> None:
        """Print a paragraph."""
        self._print(Text(text, style))

    def code(self, text: str) -> None:
        """Print lines that can be copied: indented, never wrapped."""
        self._print(Padding(Text(text, no_wrap=True), (0, 0, 0, 4)))

    def grid(self, rows: list[list[str]], styles: list[str]) -> None:
        """Print names, values and notes in columns without a header; the last column wraps."""
        found = Grid.grid(padding=(0, 2, 0, 0))
        for i, style in enumerate(styles):
            found.add_column(style=style, no_wrap=i < len(styles) - 1)
        for row in rows:
            found.add_row(*(Text(cell) for cell in row))
        self._print(found)

    def table(self, table: Table) -> None:
        """Print a table between free lines, with its caption above and its notes below."""
        self.gap()
        if table.caption:
            self.text(table.caption, "bold")
        if table.header:
            self._print(_rich_table(table))
        else:
            self.grid([list(row) for row in table.rows], [""] * table.text_columns)
        for note in table.notes:
            self.text(note, "dim")

    def _print(self, what: Text | Grid | Padding) -> None:
        """Print at the terminal's width, or wider where a table needs it."""
        console = self._console
        if not isinstance(what, Text):
            unbounded = console.options.update(max_width=_UNBOUNDED)
            console.width = max(self._width, Measurement.get(console, unbounded, what).minimum)
        with console.capture() as written:
            console.print(what)
        console.width = self._width
        for (
            line
        ) in written.get().splitlines():  # what Rich fills lines up with helps nobody in a file
            console.file.write(line.rstrip() + "\n")


def _rich_table(table: Table) -> Grid:
    found = Grid(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False, header_style="bold"
    )  # fmt: skip
    columns = list(zip(*filter(None, table.rows), strict=True))
    heads = [_wrapped(head, cells) for head, cells in zip(table.header, columns, strict=True)]
    lines = max(head.count("\n") for head in heads)
    for i, head in enumerate(heads):
        low = "\n" * (lines - head.count("\n")) + head  # stands on the rule, however short
        number = i >= table.text_columns
        found.add_column(Text(low), justify="right" if number else "left", no_wrap=number)
    for row in table.rows:
        if row:
            found.add_row(*(Text(cell) for cell in row))
        else:
            found.add_section()
    return found


def _wrapped(head: str, cells: tuple[str, ...]) -> str:
    """Break a header in two between words where its column is narrower."""
    width = max(len(word) for word in [*cells, *head.split()])
    while len(lines := textwrap.wrap(head, width, break_on_hyphens=False)) > 2:
        width += 1
    return "\n".join(lines)
