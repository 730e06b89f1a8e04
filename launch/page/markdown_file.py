"""Writes a page as Markdown that a git host shows: tables as its tables, charts as SVG files of their own beside it.

An SVG file has its title, legend and colours inside, for light and dark, and asks nothing of any server.
"""

from collections.abc import Sequence
from html import escape
from itertools import zip_longest

from foreroute.launch.page.html_file import DARK, LIGHT, variables
from foreroute.launch.page.parts import Bars, Code, Curve, Page, Part, Table, Verdict
from foreroute.launch.page.svg_charts import draw

_WIDTH, _MARGIN = 480.0, 10.0
_TITLE, _ROW = 22.0, 15.0  # heights in the picture's units
_LETTER = 5.3  # width of a letter of the legend, about
_SPECIAL = str.maketrans({c: f"\\{c}" for c in "\\`*_[]<>|#"})


def markdown(page: Page, prefix: str, *, opening: str = "") -> tuple[str, dict[str, str]]:
    """Give the page's text, and its pictures by file name.

    Args:
        prefix: of the pictures' file names.
        opening: Markdown that stands behind the first paragraph as it is.
    """
    pictures: dict[str, str] = {}
    lines = [f"# {_text(page.title)}", _text(page.lead)]
    if page.figures:
        rows = [[figure.label, figure.value, figure.note] for figure in page.figures]
        lines.append(_table(Table(["", "", ""], rows, text_columns=3)))
    if opening:
        lines.append(opening.strip())
    for section in page.sections:
        lines.append(f"## {_text(section.title)}")
        for part in section.parts:
            if isinstance(part, Curve | Bars):
                name = f"{prefix}-{len(pictures) + 1}.svg"
                pictures[name] = picture(part)
                lines.append(f"![{_text(part.title)}]({name})")
            else:
                lines.append(_part(part))
    if page.footer:
        lines.append(_text(page.footer))
    return "\n\n".join(lines) + "\n", pictures


def picture(chart: Curve | Bars) -> str:
    """Give a chart as the text of an SVG file."""
    drawn = draw(chart, "c")
    _, _, width, height = (float(number) for number in drawn.split('viewBox="')[1].split('"')[0].split())
    legend, rows = _legend(chart)
    top = _TITLE + rows * _ROW + _MARGIN
    inside = _WIDTH - 2 * _MARGIN
    tall = inside * height / width
    placed = drawn.replace("<svg ", f'<svg x="{_MARGIN}" y="{top}" width="{inside}" height="{tall:.1f}" ', 1)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {top + tall + _MARGIN:.1f}"'
        f' width="720"><style>:root {{{variables(LIGHT)}}} @media (prefers-color-scheme: dark) {{ :root'
        f' {{{variables(DARK)}}} }} text {{ font-family: sans-serif; }}</style><rect width="100%" height="100%"'
        f' style="fill: var(--paper)"/><text x="{_MARGIN}" y="{_TITLE - 5}" style="font-size: 12px; font-weight: 600;'
        f' fill: var(--ink)">{escape(chart.title)}</text>{legend}{placed}</svg>\n'
    )


def _legend(chart: Curve | Bars) -> tuple[str, int]:
    """The names of lines or bars with their colours, in as many rows as they need."""
    found, x, row = [], _MARGIN, 0
    for i, name in enumerate(_names(chart)):
        wide = 20 + _LETTER * len(name) + 12
        if x + wide > _WIDTH and x > _MARGIN:
            x, row = _MARGIN, row + 1
        y = _TITLE + row * _ROW + 9
        dashed = isinstance(chart, Curve) and chart.lines[i].dashed
        dash = "; stroke-dasharray: 4 2" if dashed else ""
        found.append(
            f'<path d="M{x:.1f} {y - 3.5:.1f}h14" style="stroke: var(--c{i}); stroke-width: 3{dash}"/>'
            f'<text x="{x + 19:.1f}" y="{y:.1f}" style="font-size: 9.5px; fill: var(--muted)">{escape(name)}</text>'
        )
        x += wide
    return "".join(found), row + 1


def _names(chart: Curve | Bars) -> list[str]:
    if isinstance(chart, Curve):
        return [line.name for line in chart.lines]
    return [bar.name for bar in chart.bars]


def _part(part: Part) -> str:
    if isinstance(part, Table):
        notes = [f"*{_text(note)}*" for note in part.notes]
        caption = [f"**{_text(part.caption)}**"] if part.caption else []
        return "\n\n".join([*caption, _table(part), *notes])
    if isinstance(part, Verdict):
        return f"**{_text(part.text)}**"
    if isinstance(part, Code):
        return f"```\n{part.text}\n```"
    assert isinstance(part, str)
    return _text(part)


def _table(table: Table) -> str:
    """Lay out a table; a gap between groups of rows is a row of empty cells."""
    width = len(next(row for row in [table.header, *table.rows] if row))
    marks = [":--" if i < table.text_columns else "--:" for i in range(width)]
    lines = [_row(table.header, width), f"| {' | '.join(marks)} |"]
    return "\n".join([*lines, *(_row(row, width) for row in table.rows)])


def _row(cells: Sequence[str], width: int) -> str:
    filled = [cell or "" for cell, _ in zip_longest(cells, range(width))]
    return f"| {' | '.join(_text(cell) for cell in filled)} |"


def _text(text: str) -> str:
    """Keep Markdown from reading anything into a text."""
    return text.translate(_SPECIAL)
