"""Draws the charts of a page as small SVG pictures that take their colours and font from the page around them.

Matplotlib draws with stand-in colours, which become the page's CSS variables: one picture serves dark, light and print.
Titles and legends are not in the picture but in the HTML (launch/page/html_file.py), where they wrap on a narrow
screen.
"""

import re
from collections.abc import Callable, Sequence
from io import StringIO
from math import inf, isfinite
from typing import Any
from xml.etree import ElementTree

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from foreroute.launch.page.parts import COLOURS, Bars, Curve, hue_of
from foreroute.launch.page.words import describe, number_text

_SIZE_INCHES = 4.7, 2.7
_MARKED = 24  # lines of at most so many points show them
_TICKS = 8

# stand-ins, which no style of Matplotlib uses, and what they become
_INK, _GRID = "#01fe01", "#01fe02"
_SERIES = [f"#01fe1{i}" for i in range(COLOURS)]
_VARIABLES = {_INK: "var(--muted)", _GRID: "var(--rule)"} | {
    stand_in: f"var(--c{i})" for i, stand_in in enumerate(_SERIES)
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "path.simplify": True,
    "path.simplify_threshold": 0.2,
}


def draw(chart: Curve | Bars, prefix: str) -> str:
    """Give the chart as an <svg> element.

    Args:
        prefix: of every id in it; differs from chart to chart of a page.
    """
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": prefix}):
        figure, axes = plt.subplots(figsize=_SIZE_INCHES, layout="constrained")
        try:
            if isinstance(chart, Curve):
                _draw_curve(axes, chart)
            else:
                _draw_bars(axes, chart)
            axes.set(xlabel=chart.x_label, ylabel=chart.y_label)
            written = StringIO()
            figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
        finally:
            plt.close(figure)
    return _for_page(written.getvalue(), describe(chart), prefix)


def _draw_curve(axes: Axes, chart: Curve) -> None:
    for i, line in enumerate(chart.lines):
        colour = _SERIES[hue_of(line, i)]
        marker = "o" if len(line.x) <= _MARKED and not line.dashed else ""
        axes.plot(
            line.x,
            line.y,
            linestyle="--" if line.dashed else "-",
            color=colour,
            linewidth=1.2,
            marker=marker,
            markersize=3.2,
        )
        if line.upper is not None:
            axes.fill_between(line.x, line.y, line.upper, color=colour, alpha=0.28, linewidth=0)
    if chart.y_from is not None and min(_lowest(line.y) for line in chart.lines) >= chart.y_from:
        axes.set_ylim(chart.y_from, axes.get_ylim()[1] + 0.04 * (axes.get_ylim()[1] - chart.y_from))
    axes.grid(axis="both" if chart.x_log else "y")
    _scale(axes, "x", log_base=2 if chart.x_log else None)
    _scale(axes, "y", log_base=10 if chart.y_log else None)


def _lowest(values: Sequence[float]) -> float:
    return min((value for value in values if isfinite(value)), default=inf)


def _scale(axes: Axes, which: str, log_base: int | None) -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis
    formatter: Callable[[float, int], str] = lambda value, _: number_text(value)  # noqa: E731
    if log_base:
        (axes.set_xscale if which == "x" else axes.set_yscale)("log", base=log_base)
        axis.set_major_locator(LogLocator(base=log_base, numticks=_TICKS))
        axis.set_minor_formatter(NullFormatter())
    else:
        axis.set_major_locator(MaxNLocator(5 if which == "x" else 6, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(formatter))


def _draw_bars(axes: Axes, chart: Bars) -> None:
    width = 0.8 / len(chart.bars)
    for i, (bar, colour) in enumerate(zip(chart.bars, _SERIES, strict=False)):
        places = [group + (i - (len(chart.bars) - 1) / 2) * width for group in range(len(chart.groups))]
        bottom = [0.0] * len(places)
        for part, values in enumerate(bar.parts):
            alpha = 1.0 if part == len(bar.parts) - 1 else 0.4
            axes.bar(places, values, 0.86 * width, bottom, color=colour, alpha=alpha, linewidth=0)
            bottom = [low + value for low, value in zip(bottom, values, strict=True)]
        if bar.mark is not None:
            axes.hlines(
                bar.mark, [x - 0.43 * width for x in places], [x + 0.43 * width for x in places], _INK, linewidth=1.2
            )
    every = -(-len(chart.groups) // 16)
    axes.set_xticks(range(0, len(chart.groups), every), chart.groups[::every])
    margin = 1.0 if len(chart.groups) == 1 else 0.6
    axes.set_xlim(-margin, len(chart.groups) - 1 + margin)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y")
    _scale(axes, "y", None)


def _for_page(svg: str, description: str, prefix: str) -> str:
    """Strip what a page does not need, prefix ids that are used, and put the page's colours in."""
    root = ElementTree.fromstring(svg)
    for parent in root.iter():
        parent.tag = parent.tag.rpartition("}")[2]
        for name in [name for name in parent.attrib if "}" in name]:
            parent.attrib[name.rpartition("}")[2]] = parent.attrib.pop(name)
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    used = set(re.findall(r'(?:href="|url\()#([\w.-]+)', ElementTree.tostring(root, "unicode")))
    for element in root.iter():
        _for_page_element(element, used, prefix)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": description}
    text = ElementTree.tostring(root, "unicode", short_empty_elements=False)
    return re.sub(r">\s+<", "><", text)


def _for_page_element(element: ElementTree.Element, used: set[str], prefix: str) -> None:
    found = element.attrib
    if found.get("id") not in used:
        found.pop("id", None)
    else:
        found["id"] = f"{prefix}-{found['id']}"
    if "href" in found:
        found["href"] = f"#{prefix}-{found['href'][1:]}"
    if "clip-path" in found:
        found["clip-path"] = found["clip-path"].replace("#", f"#{prefix}-")
    if "d" in found:
        short = re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), found["d"])
        found["d"] = " ".join(short.split())
    if "style" in found:
        style = re.sub(r"font-family: [^;]*;? ?", "", found["style"])
        for stand_in, variable in _VARIABLES.items():
            style = style.replace(stand_in, variable)
        found["style"] = style
