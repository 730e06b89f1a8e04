"""Make plotly figures of a page's charts, with values under the pointer and zoom by dragging.

Colours are names of the page's palette, such as var(--c0). launch/page/templates/charts.js replaces them by the colours
of the reader's light or dark system.
"""

from collections.abc import Sequence
from html import escape
from math import isfinite
from typing import Any

import plotly.graph_objects as go

from foreroute.launch.page.parts import Areas, Bars, Chart, Curve, HeatMap, hue_of
from foreroute.launch.page.style import MARKED, log_ticks, tick_format, tick_text
from foreroute.launch.page.words import number_text


def figure_of(chart: Chart) -> go.Figure:
    """Return the plotly figure of a chart; its colours are names of the page's palette, such as var(--c0)."""
    if isinstance(chart, Curve):
        traces, layout = _curve(chart)
    elif isinstance(chart, Areas):
        traces, layout = _areas(chart)
    elif isinstance(chart, Bars):
        traces, layout = _bars(chart)
    else:
        traces, layout = _heat_map(chart)
    axis = {"gridcolor": "var(--rule)", "linecolor": "var(--muted)", "zeroline": False, "automargin": True}
    ink = {"color": "var(--ink)"}
    figure = go.Figure(traces)
    figure.update_layout(
        template="none",
        showlegend=False,
        uirevision="kept",
        margin={"l": 8, "r": 12, "t": 12, "b": 8},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 12, "color": "var(--muted)"},
        hoverlabel={"bgcolor": "var(--card)", "bordercolor": "var(--rule)", "font": ink, "namelength": -1},
        xaxis={**axis, "title": {"text": escape(chart.x_label), "standoff": 8}, "ticks": ""},
        yaxis={**axis, "title": {"text": escape(chart.y_label), "standoff": 8}, "ticks": ""},
    )
    figure.update_layout(layout)
    return figure


def _curve(chart: Curve) -> tuple[list[Any], dict[str, Any]]:
    traces: list[Any] = []
    for i, line in enumerate(chart.lines):
        common = {"x": _short(line.x), "legendgroup": str(i)}
        marked = len(line.x) <= MARKED and not line.dashed
        size = 10 if len(line.x) == 1 else 6
        if line.upper is not None:
            none = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
            faint = f"var(--c{hue_of(line, i)}-faint)"
            traces += [
                go.Scatter(**common, **none, y=_short(line.y)),
                go.Scatter(**common, **none, y=_short(line.upper), fill="tonexty", fillcolor=faint),
            ]
        colour = f"var(--c{hue_of(line, i)})"
        style = {"color": colour, "width": 1.8, "dash": "dash" if line.dashed else "solid"}
        traces.append(
            go.Scatter(
                **common,
                y=_short(line.y),
                name=escape(line.name),
                line=style,
                marker={"color": colour, "size": size},
                mode="lines+markers" if marked else "lines",
                hovertemplate="%{y:,.5~g}",
            )
        )
    layout: dict[str, Any] = {"hovermode": "x unified"}
    values = [y for line in chart.lines for y in [*line.y, *(line.upper or ())] if isfinite(y)]
    places = [x for line in chart.lines for x in line.x]
    layout["xaxis"] = _log_axis(places, chart.x_base) if chart.x_log else {"tickformat": tick_format(places)}
    layout["yaxis"] = _log_axis(values, 10) if chart.y_log else {"tickformat": tick_format(values)}
    low = chart.y_from
    if low is not None and values and min(values) >= low:
        top = max(values)
        layout["yaxis"]["range"] = [low, top + 0.05 * (top - low) or low + 1]
    return traces, layout


def _areas(chart: Areas) -> tuple[list[Any], dict[str, Any]]:
    traces = [
        go.Scatter(
            x=_short(line.x),
            y=_short(line.y),
            name=escape(line.name),
            legendgroup=str(i),
            stackgroup="all",
            mode="lines" if len(line.x) > 1 else "lines+markers",
            line={"width": 0.5, "color": f"var(--c{hue_of(line, i)})"},
            fillcolor=f"var(--c{hue_of(line, i)})",
            hovertemplate="%{y:,.4~g}",
        )
        for i, line in enumerate(chart.lines)
    ]
    tops = [sum(y for y in column if isfinite(y)) for column in zip(*(line.y for line in chart.lines), strict=True)]
    axes = {"xaxis": {"tickformat": tick_format(chart.lines[0].x)}, "yaxis": {"tickformat": tick_format(tops)}}
    return traces, {"hovermode": "x unified", **axes}


def _bars(chart: Bars) -> tuple[list[Any], dict[str, Any]]:
    traces: list[Any] = []
    for i, bar in enumerate(chart.bars):
        common = {"x": list(map(escape, chart.groups)), "offsetgroup": str(i), "legendgroup": str(i)}
        base = [0.0] * len(chart.groups)
        for part, (name, values) in enumerate(zip(chart.stack, bar.parts, strict=True)):
            colour = f"var(--c{i}{'' if part == len(bar.parts) - 1 else '-faint'})"
            label = f"{bar.name}, {name}" if len(chart.stack) > 1 else bar.name
            traces.append(
                go.Bar(
                    **common,
                    y=_short(values),
                    base=_short(base),
                    name=escape(label),
                    marker={"color": colour},
                    customdata=_short(values),
                    hovertemplate="%{customdata:,.5~g}",
                )
            )
            base = [low + value for low, value in zip(base, values, strict=True)]
        if bar.mark is not None:
            traces.append(
                go.Bar(
                    **common,
                    y=[0.0] * len(bar.mark),
                    base=_short(bar.mark),
                    name=escape(f"{bar.name}, {chart.mark}"),
                    marker={"line": {"width": 2, "color": "var(--muted)"}},
                    hovertemplate="%{base:,.5~g}",
                )
            )
    return traces, {"barmode": "group", "hovermode": "x unified", "xaxis": {"type": "category", "showgrid": False}}


def _heat_map(chart: HeatMap) -> tuple[list[Any], dict[str, Any]]:
    low, high, scale = _colours(chart)
    said = f"{escape(chart.x_label)} %{{x:,}}<br>{escape(chart.y_label)} %{{y}}<br>%{{z:,.4~g}}<extra></extra>"
    trace = go.Heatmap(
        x=_short(chart.x),
        y=list(map(escape, chart.rows)),
        z=[_short(row) for row in chart.values],
        zmin=low,
        zmax=high,
        colorscale=[(place, f"var(--{name})") for place, name in scale],
        showscale=False,
        hovertemplate=said,
    )
    return [trace], {
        "xaxis": {"tickformat": tick_format(chart.x), "showgrid": False},
        "yaxis": {"type": "category", "showgrid": False},
    }


def _colours(chart: HeatMap) -> tuple[float, float, list[tuple[float, str]]]:
    """Return the values at the ends of the scale, and the palette's names at places from 0 to 1 between them.

    Around a middle both ends are equally far from it. No end is below 0 if no value is.
    """
    values = [value for row in chart.values for value in row if isfinite(value)]
    low, high = chart.ends or (min(values, default=0.0), max(values, default=1.0))
    if chart.middle is None:
        return low, high if high > low else low + 1, [(0, "card"), (1, "c0")]
    reach = max(high - chart.middle, chart.middle - low, 0.05 * abs(chart.middle))
    bottom = chart.middle - reach
    low, high = max(bottom, 0.0) if low >= 0 else bottom, chart.middle + reach
    return low, high, [(0, "c0"), ((chart.middle - low) / (high - low), "card"), (1, "c1")]


def colour_key(chart: Chart) -> dict[str, str]:
    """Return the legend of a heat map: the values at both ends, the stops of the colour gradient and the middle; empty
    for other charts."""
    if not isinstance(chart, HeatMap):
        return {}
    low, high, scale = _colours(chart)
    stops = ", ".join(f"var(--{name}) {100 * place:.0f}%" for place, name in scale)
    middle = "" if chart.middle is None else f"; {number_text(chart.middle)} has no colour"
    return {"low": number_text(low), "high": number_text(high), "stops": stops, "middle": middle}


def _short(values: Sequence[float]) -> list[float | None]:
    """Round to six digits, which keeps the file small; a value that is not finite becomes None."""
    return [float(f"{value:.6g}") if isfinite(value) else None for value in values]


def _log_axis(values: Sequence[float], base: int) -> dict[str, Any]:
    ticks = log_ticks(values, base)
    return {"type": "log", "tickvals": ticks, "ticktext": [tick_text(tick) for tick in ticks]}
