"""Prints a page in a terminal or into a file: text and tables; charts are left to the HTML.

Text wraps at the terminal's width (80 columns in a file). A number is never broken or cut off: a table that does not
fit is printed wider than the terminal.
"""

import textwrap
from collections.abc import Sequence
from typing import TextIO

from rich import box
from rich.cells import cell_len
from rich.console import JustifyMethod
from rich.table import Table as Grid
from rich.text import Text

from foreroute.launch.page.parts import Chart, Code, Page, Table, Verdict
from foreroute.launch.start.console import rich_console

_GAP = "  "  # between columns


def print_page(page: Page, file: TextIO | None = None, width: int | None = None) -> None:
    """Print a page.

    Args:
        file: None for stdout; colours only where it is a terminal, and none with NO_COLOR.
        width: columns; None for the terminal's own.
    """
    out = _Out(file, width)
    out.text(page.title, "bold")
    out.text(page.lead)
    if page.figures:
        rows = [[figure.label, figure.value, figure.note] for figure in page.figures]
        out.gap()
        out.grid(rows, ["", "bold cyan", ""])
    for section in page.sections:
        out.gap()
        out.text(section.title, "bold underline")
        for part in section.parts:
            if isinstance(part, Chart):
                continue
            if isinstance(part, Table):
                out.table(part)
            elif isinstance(part, Verdict):
                out.text(part.text, "bold green" if part.good else "bold red")
            elif isinstance(part, Code):
                out.code(part.text)
            else:
                out.text(part)


class _Out:
    def __init__(self, file: TextIO | None, width: int | None) -> None:
        self._console = rich_console(file, width)
        self._width = self._console.width

    def gap(self) -> None:
        """Leave a line free."""
        self._console.file.write("\n")

    def text(self, text: str, style: str = "") -> None:
        """Print a paragraph."""
        self._print(Text(text, style), self._width)

    def code(self, text: str) -> None:
        """Print lines that can be copied: indented, never wrapped."""
        for line in text.splitlines():
            self._console.file.write(f"    {line}\n")

    def grid(self, rows: Sequence[Sequence[str]], styles: Sequence[str]) -> None:
        """Print rows without a header: names, whole values between, and texts that wrap."""
        columns = list(zip(*rows, strict=True))
        whole = [0 < i < len(columns) - 1 for i in range(len(columns))]
        widths = _widths(columns, whole, self._width)
        found = Grid.grid(padding=(0, len(_GAP), 0, 0))
        for width, style in zip(widths, styles, strict=True):
            found.add_column(style=style, width=width, overflow="fold")
        for row in rows:
            found.add_row(*(Text(cell) for cell in row))
        self._print(found, _total(widths))

    def table(self, table: Table) -> None:
        """Print a table between free lines, with its caption above and its notes below."""
        self.gap()
        if table.caption:
            self.text(table.caption, "bold")
        if table.header:
            self._headed(table)
        else:
            self.grid(table.rows, [""] * len(table.rows[0]))
        for note in table.notes:
            self.text(note, "dim")

    def _headed(self, table: Table) -> None:
        columns = list(zip(*filter(None, table.rows), strict=True))
        heads = [_head(head, cells) for head, cells in zip(table.header, columns, strict=True)]
        height = max(len(head) for head in heads)
        whole = [i >= table.text_columns for i in range(len(columns))]
        widths = _widths([[*cells, *head] for cells, head in zip(columns, heads, strict=True)], whole, self._width)
        found = Grid(
            box=box.SIMPLE_HEAD, padding=(0, len(_GAP) - 1, 0, 0), show_edge=False, pad_edge=False, header_style="bold"
        )
        for width, head, number in zip(widths, heads, whole, strict=True):
            low = "\n" * (height - len(head)) + "\n".join(head)  # stands on the rule, however short
            justify: JustifyMethod = "right" if number else "left"
            found.add_column(Text(low), justify=justify, width=width, overflow="fold")
        for row in table.rows:
            if row:
                found.add_row(*(Text(cell) for cell in row))
            else:
                found.add_section()
        self._print(found, _total(widths))

    def _print(self, what: Text | Grid, width: int) -> None:
        self._console.width = width
        with self._console.capture() as written:
            self._console.print(what)
        for line in written.get().splitlines():
            self._console.file.write(line.rstrip() + "\n")  # Rich fills lines up with spaces


def _head(head: str, cells: Sequence[str]) -> list[str]:
    """Break a header in two between words where its column is narrower."""
    width = max(cell_len(word) for word in [*cells, *head.split()])
    while len(lines := textwrap.wrap(head, width, break_on_hyphens=False)) > 2:
        width += 1
    return lines


def _widths(columns: Sequence[Sequence[str]], whole: Sequence[bool], room: int) -> list[int]:
    """Give each column as much as its cells need where there is room; else the later ones wrap between words.

    Args:
        whole: columns that never wrap.
        room: columns of the terminal; the widths may come to more where even that is not enough.
    """
    most = [max(cell_len(cell) for cell in cells) for cells in columns]
    least = [
        wide if keep else max((cell_len(word) for cell in cells for word in cell.split()), default=1)
        for cells, keep, wide in zip(columns, whole, most, strict=True)
    ]
    spare = max(0, room - _total(least))
    widths = []
    for narrow, wide in zip(least, most, strict=True):
        more = min(wide - narrow, spare)
        spare -= more
        widths.append(narrow + more)
    return widths


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(_GAP) * (len(widths) - 1)
