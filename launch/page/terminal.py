"""Print the top of a page, its verdicts and figures, on a terminal or into a file.

Text wraps between words at the terminal's width (80 columns in a file). A value is never broken or cut off: where a
value does not fit, the lines are longer than the terminal.
"""

from typing import TextIO

from rich.text import Text

from foreroute.launch.page.parts import Page
from foreroute.launch.start.console import grid, print_grid, rich_console


def print_top(page: Page, file: TextIO | None = None, width: int | None = None) -> None:
    """Print a page's title, verdicts and figures.

    Args:
        file: None for stdout; colours only where it is a terminal, and none with NO_COLOR.
        width: columns; None for the terminal's own.
    """
    console = rich_console(file, width)
    print_grid(console, Text(page.title, "bold"))
    styles = {True: "bold green", False: "bold red", None: "bold cyan"}
    figures = [*page.verdicts, *page.figures]
    rows = [[Text(figure.label), Text(figure.value, styles[figure.good]), Text(figure.note)] for figure in figures]
    print_grid(console, grid([], rows, whole=[1]))
