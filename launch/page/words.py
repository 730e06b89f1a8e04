"""A chart in words and in numbers, for readers who cannot see it: a description and a table.

launch/page/html_file.py puts both beside each chart.
"""

from collections.abc import Sequence
from math import isfinite
from statistics import median

from foreroute.launch.page.parts import Bars, Chart, Curve, HeatMap, Line, Table

_POINTS = 24  # of a line in a table
_COLUMNS = 16  # rows of a heat map that a table shows one by one


def describe(chart: Chart) -> str:
    """Describe a chart in words: its kind, title, axes and the range of each line."""
    if isinstance(chart, HeatMap):
        values = [value for row in chart.values for value in row]
        rows = f"{len(chart.rows)} rows, one for each {chart.y_label}"
        return (
            f"Heat map. {chart.title}: {chart.value_label} over {chart.x_label}. {rows}:"
            f" {_range_text(values, last=False)}."
        )
    if isinstance(chart, Bars):
        kind = "Bar chart"
        totals = [[sum(parts) for parts in zip(*bar.parts, strict=True)] for bar in chart.bars]
        said = [f"{bar.name}: {_range_text(sums)}" for bar, sums in zip(chart.bars, totals, strict=True)]
    else:
        kind = "Line chart" if isinstance(chart, Curve) else "Stacked areas"
        said = [f"{line.name}: {_range_text(line.y)}{_band_text(line)}" for line in chart.lines]
    return f"{kind}. {chart.title}: {chart.y_label} over {chart.x_label}. {'; '.join(said)}."


def number_text(value: float) -> str:
    """Write a number of an axis or a description: four digits, thousands apart, no exponent between 1e-4 and 1e15."""
    if value == 0 or not 1e-4 <= abs(value) < 1e15:
        return f"{value:.4g}"
    return f"{float(f'{value:.4g}'):,.10f}".rstrip("0").rstrip(".")


def numbers(chart: Chart) -> Table:
    """Return a chart's numbers as a table; a long line is represented by evenly spaced points."""
    if isinstance(chart, HeatMap):
        return _numbers_of_heat_map(chart)
    if isinstance(chart, Bars):
        return _numbers_of_bars(chart)
    first = chart.lines[0]
    if all(list(line.x) == list(first.x) for line in chart.lines):
        return _numbers_of_columns(chart.x_label, first.x, chart.lines)
    rows = [[line.name, place_text(line.x[i]), _cell(line.y[i])] for line in chart.lines for i in _some(len(line.x))]
    longest = max(len(line.x) for line in chart.lines)
    return Table(["line", chart.x_label, chart.y_label], rows, notes=_note(longest))


def place_text(value: float) -> str:
    """Write a place on an axis: whole numbers such as steps with all their digits."""
    return f"{value:,.0f}" if value == int(value) and abs(value) < 1e9 else number_text(value)


def _numbers_of_columns(x_label: str, x: Sequence[float], lines: Sequence[Line]) -> Table:
    columns: list[tuple[str, Sequence[float]]] = []
    for line in lines:
        columns.append((line.name, line.y))
        if line.upper is not None:
            columns.append((f"{line.name}, up to", line.upper))
    header = [x_label, *(name for name, _ in columns)]
    rows = [[place_text(x[i]), *(_cell(y[i]) for _, y in columns)] for i in _some(len(x))]
    return Table(header, rows, text_columns=0, notes=_note(len(x)))


def _numbers_of_heat_map(chart: HeatMap) -> Table:
    """Return one column for each row of the map; many rows are summed up by least, median and most."""
    rows = []
    for i in _some(len(chart.x)):
        column = [row[i] for row in chart.values]
        if len(column) <= _COLUMNS:
            cells = [_cell(value) for value in column]
        else:
            known = [value for value in column if isfinite(value)]
            most = chart.rows[column.index(max(known))] if known else "-"
            spread = [min(known), median(known), max(known)] if known else [float("nan")] * 3
            cells = [*(_cell(value) for value in spread), most]
        rows.append([place_text(chart.x[i]), *cells])
    names = ["least", "median", "most", f"{chart.y_label} with the most"]
    if len(chart.rows) <= _COLUMNS:
        names = [f"{chart.y_label} {row}" for row in chart.rows]
    return Table([chart.x_label, *names], rows, text_columns=0, notes=_note(len(chart.x)))


def _numbers_of_bars(chart: Bars) -> Table:
    columns: dict[str, Sequence[float]] = {}
    for bar in chart.bars:
        for name, part in zip(chart.stack, bar.parts, strict=True):
            columns[f"{bar.name}, {name}" if len(chart.stack) > 1 else bar.name] = part
        if bar.mark is not None:
            columns[f"{bar.name}, {chart.mark}"] = bar.mark
    rows = [[group, *(_cell(column[i]) for column in columns.values())] for i, group in enumerate(chart.groups)]
    return Table([chart.x_label, *columns], rows)


def _some(count: int) -> list[int]:
    """Return at most _POINTS evenly spaced places, the first and the last among them."""
    if count <= _POINTS:
        return list(range(count))
    return [round(i * (count - 1) / (_POINTS - 1)) for i in range(_POINTS)]


def _note(count: int) -> list[str]:
    return [f"{_POINTS} of {count:,} points, evenly spaced."] if count > _POINTS else []


def _cell(value: float) -> str:
    return number_text(value) if isfinite(value) else "-"


def _range_text(values: Sequence[float], *, last: bool = True) -> str:
    found = [value for value in values if isfinite(value)]
    if not found:
        return "no values"
    if min(found) == max(found):
        return number_text(found[0])
    ends = f"{number_text(min(found))} to {number_text(max(found))}"
    return f"{ends}, last {number_text(found[-1])}" if last else ends


def _band_text(line: Line) -> str:
    found = [value for value in line.upper or () if isfinite(value)]
    return f", its band up to {number_text(max(found))}" if found else ""


def byte_text(value: float) -> str:
    """Write a number of bytes with three digits and a decimal unit: 79154000 is 79.2 MB."""
    units = ["B", "kB", "MB", "GB", "TB", "PB"]
    place = 0
    while value >= 999.5 and place < len(units) - 1:
        value, place = value / 1000, place + 1
    digits = 0 if place == 0 or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {units[place]}"


def percent(part: float, whole: float) -> str:
    """Write a part of a whole as a percentage."""
    return f"{part / whole:.1%}" if whole and isfinite(part) else "-"


def duration(seconds: float) -> str:
    """Write seconds with two units: 4020 is 1 h 07 min."""
    if not isfinite(seconds):
        return "-"
    if seconds < 99.95:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02d} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def count_text(value: float) -> str:
    """Write a large count with three digits and a decimal prefix: 3444992 is 3.44 M."""
    prefixes = ["", "k", "M", "G", "T", "P", "E", "Z"]
    if not isfinite(value):
        return "-"
    value, place = float(f"{value:.3g}"), 0
    while abs(value) >= 1000 and place < len(prefixes) - 1:
        value, place = value / 1000, place + 1
    return f"{value:.3g} {prefixes[place]}".strip()
