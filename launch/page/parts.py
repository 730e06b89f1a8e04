"""The parts of a page: sections of text, tables and charts, and a strip of key figures.

A page is described once, as plain values. launch/page/html_file.py makes one self-contained HTML file of it,
launch/page/markdown_file.py makes a Markdown file, and launch/page/terminal.py prints the figures on top. All text is
plain text: no output interprets markup in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

COLOURS = 6  # that a chart has: lines or bars of a group at most


@dataclass(frozen=True, slots=True)
class KeyFigure:
    """A number, or the answer to a question, that a reader should see first."""

    label: str
    value: str  # with its unit
    note: str = ""
    good: bool | None = None  # of an answer; None: neither


@dataclass(frozen=True, slots=True)
class Table:
    """Cells as they are to be read, numbers already written out."""

    header: Sequence[str]  # may be empty: rows then are names and what they are
    rows: Sequence[Sequence[str]]  # an empty row is a gap between groups of rows
    caption: str = ""
    text_columns: int = 1  # so many first columns hold text, aligned left; the others hold numbers, aligned right
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        widths = {len(row) for row in [self.header, *self.rows] if row}
        if len(widths) > 1:
            raise ValueError(f"rows of {sorted(widths)} cells in one table: {self.caption!r}")


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart; y may hold nan where there is no value."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    upper: Sequence[float] | None = None  # a light band goes from y to here
    dashed: bool = False
    hue: int | None = None  # which of the COLOURS; None: by its place among the chart's lines

    def __post_init__(self) -> None:
        if not len(self.x) == len(self.y) == len(self.x if self.upper is None else self.upper):
            raise ValueError(f"line {self.name!r}: x, y and upper must have equal lengths")


@dataclass(frozen=True, slots=True)
class Curve:
    """Named lines over one quantity."""

    title: str
    x_label: str  # with its unit
    y_label: str
    lines: Sequence[Line]
    x_log: bool = False
    x_base: int = 2  # of a logarithmic x axis: ticks at powers of 2, or at 1, 2 and 5 times those of 10
    y_log: bool = False
    y_from: float | None = None  # the axis starts here, or below where a value is lower
    band: str = ""  # what the bands are, if there are any
    choice: str = ""  # neighbours of one title are shown one at a time, and these are the names to choose by

    def __post_init__(self) -> None:
        _check_colours(self.title, self.lines)


@dataclass(frozen=True, slots=True)
class Bar:
    """The bars of one name, one in each group."""

    name: str
    parts: Sequence[Sequence[float]]  # [part of the stack][group]
    mark: Sequence[float] | None = None  # a stroke above each bar


@dataclass(frozen=True, slots=True)
class Bars:
    """Stacked bars, side by side in groups."""

    title: str
    x_label: str
    y_label: str
    groups: Sequence[str]
    bars: Sequence[Bar]
    stack: Sequence[str]  # names of the parts, from the bottom; the last is drawn in full colour
    mark: str = ""  # what the strokes are

    def __post_init__(self) -> None:
        _check_colours(self.title, self.bars)
        for bar in self.bars:
            counts = {len(part) for part in bar.parts} | {len(bar.mark or self.groups)}
            if len(bar.parts) != len(self.stack) or counts != {len(self.groups)}:
                raise ValueError(f"bars {bar.name!r}: need {len(self.stack)} parts of {len(self.groups)} groups")


@dataclass(frozen=True, slots=True)
class Areas:
    """Parts that add up to a whole, stacked from the bottom, over one quantity that they share."""

    title: str
    x_label: str  # with its unit
    y_label: str
    lines: Sequence[Line]

    def __post_init__(self) -> None:
        _check_colours(self.title, self.lines)
        if any(list(line.x) != list(self.lines[0].x) for line in self.lines):
            raise ValueError(f"chart {self.title!r}: areas must have the same x")


@dataclass(frozen=True, slots=True)
class HeatMap:
    """A number for each row and place, as a colour."""

    title: str
    x_label: str  # with its unit
    y_label: str  # what the rows are
    value_label: str
    x: Sequence[float]
    rows: Sequence[str]  # from the bottom
    values: Sequence[Sequence[float]]  # [row][x]; may hold nan
    middle: float | None = None  # drawn without colour: what is below has one hue, above another
    ends: tuple[float, float] | None = None  # of the colours; None: those of the values

    def __post_init__(self) -> None:
        widths = {len(row) for row in self.values}
        if len(self.values) != len(self.rows) or widths != {len(self.x)}:
            raise ValueError(f"heat map {self.title!r}: need {len(self.rows)} rows of {len(self.x)} values")


Chart: TypeAlias = Curve | Bars | Areas | HeatMap


@dataclass(frozen=True, slots=True)
class Verdict:
    """A sentence that decides something."""

    text: str
    good: bool


@dataclass(frozen=True, slots=True)
class Code:
    """Lines to copy, such as options of a command."""

    text: str


Part: TypeAlias = str | Table | Chart | Verdict | Code  # str: a paragraph


@dataclass(frozen=True, slots=True)
class Section:
    """A titled piece of a page."""

    title: str
    parts: Sequence[Part]


@dataclass(frozen=True, slots=True)
class Page:
    """A page of its own."""

    title: str
    lead: str  # one paragraph: what is seen here
    sections: Sequence[Section]
    figures: Sequence[KeyFigure] = ()
    verdicts: Sequence[KeyFigure] = ()  # answers; before the figures
    footer: str = ""  # of the file; a terminal does not show it


def hue_of(line: Line, place: int) -> int:
    """Return the colour of a line at a place among its chart's lines."""
    return place if line.hue is None else line.hue


def _check_colours(title: str, named: Sequence[object]) -> None:
    if not 1 <= len(named) <= COLOURS:
        raise ValueError(f"chart {title!r}: {len(named)} names; from 1 to {COLOURS} can be told apart")
