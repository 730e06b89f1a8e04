"""Write a page as Markdown that a git host shows and that reads well as plain text; its curves become pictures beside
it.

launch/page/templates/page.md is the template.
"""

from collections.abc import Iterator, Sequence
from itertools import zip_longest

from foreroute.launch.page.html_file import environment
from foreroute.launch.page.parts import Curve, Page, Part

_SPECIAL = str.maketrans({c: f"\\{c}" for c in "\\`*_[]<>|#"})


def markdown(page: Page, prefix: str = "", *, opening: str = "") -> tuple[str, dict[str, Curve]]:
    """Return the page's text, and its curves by the names of their files.

    Args:
        prefix: of the pictures' file names; an empty one leaves the pictures out.
        opening: Markdown that is put after the first section unchanged.
    """
    pictures: dict[str, Curve] = {}

    def picture_of(part: Part) -> str:
        if not (prefix and isinstance(part, Curve)):
            return ""
        pictures[name := f"{prefix}-{len(pictures) + 1}.svg"] = part
        return name

    env = environment(trim=True)
    env.globals |= {"lines": _lines, "picture_of": picture_of}
    env.globals["cells_of"] = lambda figures: [[figure.label, figure.value, figure.note] for figure in figures]
    env.filters["plain"] = plain
    text = env.get_template("page.md").render(page=page, opening=opening.strip())
    return text.rstrip() + "\n", pictures


def plain(text: str) -> str:
    """Escape the characters that Markdown would interpret."""
    return text.translate(_SPECIAL)


def _lines(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int) -> Iterator[list[str]]:
    """Return the cells of a table in columns of equal width: its header, the line of marks and its rows.

    A gap between groups of rows is a row of empty cells.
    """
    count = len(next(row for row in [header, *rows] if row))
    table = [[plain(cell or "") for cell, _ in zip_longest(cells, range(count))] for cells in [header, *rows]]
    widths = [max(3, *(len(row[i]) for row in table)) for i in range(count)]
    if text_columns == count:
        widths[-1] = 3  # nothing stands on the right of a text
    marks = [f":{'-' * (width - 1)}" if i < text_columns else f"{'-' * (width - 1)}:" for i, width in enumerate(widths)]
    for row in [table[0], marks, *table[1:]]:
        yield [
            cell.ljust(width) if i < text_columns else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
