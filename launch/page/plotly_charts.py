"""Draws the charts of a page with plotly: values under the pointer, names that hide their line, zoom by dragging.

plotly.js is put into the file, once, with the script of launch/page/plotly_charts.js; the file's content security
policy allows these two scripts, by their checksums, and no request. Without a script the page has its text and tables,
among them one beneath each chart with its numbers, which is also what a screen reader and a keyboard get.
"""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from html import escape
from math import isfinite, log2
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from foreroute.launch.page.html_file import DARK, LIGHT, Drawing, html, legend, table_html
from foreroute.launch.page.parts import COLOURS, Areas, Bars, Chart, Curve, HeatMap, Page, hue_of
from foreroute.launch.page.words import describe, number_text, numbers

_SCRIPT = Path(__file__).with_suffix(".js")
_FAINT = "47"  # alpha of bands, in hexadecimal: 28 %
_MARKED = 24  # lines of at most so many points show them
_STYLE = """<style>
.plot { height: 20rem; }
figure { max-width: none; min-width: 0; display: grid; grid-template: subgrid / minmax(0, 1fr); grid-row: span 4;
  row-gap: 0; align-content: start; }
figure .scroll { margin: .5rem 0; }
.legend { align-items: center; align-content: start; gap: .1rem .5rem; } ul.legend { gap: .1rem 1rem; }
.legend i.scale { width: 7rem; margin: 0; border: 1px solid var(--rule); }
.legend button { font: inherit; color: inherit; background: none; border: 0; padding: .15rem 0; cursor: pointer;
  text-align: left; }
.legend button[aria-pressed="false"] { text-decoration: line-through; opacity: .6; }
details { margin: .25rem 0 0; font-size: .875rem; } summary { cursor: pointer; color: var(--muted);
  width: fit-content; }
details .scroll { max-height: 22rem; overflow: auto; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)); }
@media print { .plot { height: 15rem; } .charts { grid-template-columns: 1fr; } details { display: none; } }
</style><noscript><style>.plot, .legend { display: none; }</style></noscript>"""


def interactive_html(page: Page) -> str:
    """Give the whole file of a page with any charts, in ASCII."""
    scripts = [_ascii_script(get_plotlyjs()), f"const PALETTES = {_palettes()};\n{_SCRIPT.read_text()}"]
    allowed = " ".join(f"'sha256-{_sha256(script)}'" for script in scripts)
    policy = f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:"
    end = "".join(f"<script>{script}</script>\n" for script in scripts)
    return html(page, Drawing(_figure, policy, _STYLE, end))


def figure_of(chart: Chart) -> go.Figure:
    """Give the plotly figure of a chart; its colours are names of the page's palette, such as var(--c0)."""
    if isinstance(chart, Curve):
        traces, layout = _curve(chart)
    elif isinstance(chart, Areas):
        traces, layout = _areas(chart)
    elif isinstance(chart, Bars):
        traces, layout = _bars(chart)
    else:
        traces, layout = _heat_map(chart)
    axis = {
        "gridcolor": "var(--rule)",
        "linecolor": "var(--muted)",
        "zeroline": False,
        "automargin": True,
        "exponentformat": "power",
        "separatethousands": True,
    }
    figure = go.Figure(traces)
    figure.update_layout(
        template="none",
        showlegend=False,
        uirevision="kept",
        margin={"l": 8, "r": 12, "t": 12, "b": 8},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 12, "color": "var(--muted)"},
        hoverlabel={
            "bgcolor": "var(--card)",
            "bordercolor": "var(--rule)",
            "font": {"color": "var(--ink)"},
            "namelength": -1,
        },
        xaxis={**axis, "title": {"text": escape(chart.x_label), "standoff": 8}, "ticks": ""},
        yaxis={**axis, "title": {"text": escape(chart.y_label), "standoff": 8}, "ticks": ""},
    )
    figure.update_layout(layout)
    return figure


def _curve(chart: Curve) -> tuple[list[Any], dict[str, Any]]:
    traces: list[Any] = []
    for i, line in enumerate(chart.lines):
        common = {"x": _short(line.x), "legendgroup": str(i)}
        marked = len(line.x) <= _MARKED and not line.dashed
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
                marker={"color": colour, "size": 6},
                mode="lines+markers" if marked else "lines",
                hovertemplate="%{y:,.5~g}",
            )
        )
    layout: dict[str, Any] = {"hovermode": "x unified", "xaxis": {}, "yaxis": {}}
    if chart.x_log:
        ticks = _powers_of_2([x for line in chart.lines for x in line.x])
        layout["xaxis"] = {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:,}" for tick in ticks]}
    else:
        layout["xaxis"] = {"tickformat": _tick_format(chart.lines[0].x)}
    if chart.y_log:
        layout["yaxis"] = {"type": "log", "dtick": "D2"}
    values = [y for line in chart.lines for y in [*line.y, *(line.upper or ())] if isfinite(y)]
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
    return traces, {"hovermode": "x unified", "xaxis": {"tickformat": _tick_format(chart.lines[0].x)}}


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
            line = {"width": 2, "color": "var(--muted)"}
            zeros = [0.0] * len(bar.mark)
            name = escape(f"{bar.name}, {chart.mark}")
            traces.append(
                go.Bar(
                    **common,
                    y=zeros,
                    base=_short(bar.mark),
                    name=name,
                    marker={"line": line},
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
        "xaxis": {"tickformat": _tick_format(chart.x), "showgrid": False},
        "yaxis": {"type": "category", "showgrid": False},
    }


def _colours(chart: HeatMap) -> tuple[float, float, list[tuple[float, str]]]:
    """Give the values at the ends of the scale, and the palette's names at places from 0 to 1 between them.

    Around a middle both ends are equally far from it, as long as no end is below 0 for values that are not.
    """
    values = [value for row in chart.values for value in row if isfinite(value)]
    low, high = chart.ends or (min(values, default=0.0), max(values, default=1.0))
    if chart.middle is None:
        return low, high if high > low else low + 1, [(0, "card"), (1, "c0")]
    reach = max(high - chart.middle, chart.middle - low, 0.05 * abs(chart.middle))
    bottom = chart.middle - reach
    low, high = max(bottom, 0.0) if low >= 0 else bottom, chart.middle + reach
    return low, high, [(0, "c0"), ((chart.middle - low) / (high - low), "card"), (1, "c1")]


def _colour_key(chart: HeatMap) -> str:
    low, high, scale = _colours(chart)
    stops = ", ".join(f"var(--{name}) {100 * place:.0f}%" for place, name in scale)
    middle = "" if chart.middle is None else f"; {number_text(chart.middle)} has no colour"
    return (
        f'<p class="legend">{escape(chart.value_label)}: {number_text(low)} '
        f'<i class="scale" style="background: linear-gradient(90deg, {stops})"></i> {number_text(high)}{middle}</p>'
    )


def _figure(chart: Chart, prefix: str) -> str:
    keys = legend(chart)
    named = 0 if isinstance(chart, HeatMap) else len(chart.bars if isinstance(chart, Bars) else chart.lines)
    items = [
        (
            f'<li><button type="button" aria-pressed="true">{key.html()}</button></li>'
            if i < named
            else f"<li>{key.html()}</li>"
        )
        for i, key in enumerate(keys)
    ]
    names = _colour_key(chart) if isinstance(chart, HeatMap) else f'<ul class="legend">{"".join(items)}</ul>'
    data = json.dumps(figure_of(chart).to_plotly_json(), separators=(",", ":")).replace("<", "\\u003c")
    return (
        f'<figure aria-labelledby="{prefix}-title"><figcaption'
        f' id="{prefix}-title">{escape(chart.title)}</figcaption>{names}<div class="plot" id="{prefix}" role="img"'
        f' aria-label="{escape(describe(chart))}"></div><script type="application/json"'
        f' id="{prefix}-data">{data}</script><details><summary>Numbers<span class="unseen"> of'
        f" {escape(chart.title)}</span></summary>{table_html(numbers(chart))}</details></figure>"
    )


def _short(values: Sequence[float]) -> list[float | None]:
    """Give numbers with six digits, and nothing where they are not finite: the file stays small."""
    return [float(f"{value:.6g}") if isfinite(value) else None for value in values]


def _tick_format(x: Sequence[float]) -> str:
    """Large values as 200k or 3M."""
    return "~s" if max(map(abs, x), default=0) >= 1e5 else ",~g"


def _powers_of_2(values: Sequence[float]) -> list[int]:
    highest = max([1.0, *values])
    return [2**i for i in range(int(log2(highest)) + 1)]


def _palettes() -> str:
    def whole(palette: dict[str, str]) -> dict[str, str]:
        return palette | {f"c{i}-faint": palette[f"c{i}"] + _FAINT for i in range(COLOURS)}

    return json.dumps({"light": whole(LIGHT), "dark": whole(DARK)})


def _ascii_script(script: str) -> str:
    """Write other characters as escapes; plotly.js has them in strings and patterns only, where they mean the same."""
    return re.sub(r"[^\x00-\x7f]", lambda found: f"\\u{ord(found[0]):04x}", script)


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
