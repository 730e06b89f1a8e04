"""Makes one HTML file of a page: its style and charts are inside it, and it asks nothing of any server.

It reads well on a phone, in dark and light (as the reader's system says) and on paper. A content security policy in the
file itself forbids every request. By itself it runs no script: how charts are drawn is a Drawing, which may bring one
(launch/page/plotly_charts.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from foreroute.launch.page.parts import (
    Bars,
    Chart,
    Code,
    Curve,
    HeatMap,
    KeyFigure,
    Page,
    Part,
    Section,
    Table,
    Verdict,
    hue_of,
)
from foreroute.launch.page.svg_charts import draw

LIGHT = {
    "paper": "#ffffff",
    "card": "#f5f6f8",
    "ink": "#1c2127",
    "muted": "#586370",
    "rule": "#d9dde2",
    "good": "#1d7a46",
    "bad": "#b3261e",
    "c0": "#2463ad",
    "c1": "#c4560f",
    "c2": "#2a8057",
    "c3": "#8447a8",
    "c4": "#b12c62",
    "c5": "#6a6f00",
}
DARK = {
    "paper": "#14171b",
    "card": "#1d2126",
    "ink": "#e4e8ec",
    "muted": "#9aa6b2",
    "rule": "#343b43",
    "good": "#6fcf97",
    "bad": "#ff8a80",
    "c0": "#78b1f2",
    "c1": "#f2a05f",
    "c2": "#72c79a",
    "c3": "#c79ae6",
    "c4": "#f089ad",
    "c5": "#c9cc5a",
}


def variables(palette: dict[str, str]) -> str:
    """Declare a palette's colours as CSS variables."""
    return " ".join(f"--{name}: {colour};" for name, colour in palette.items())


_STYLE = f"""
:root {{ color-scheme: light dark; {variables(LIGHT)} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {variables(DARK)} }} }}
* {{ box-sizing: border-box; }}
:focus-visible {{ outline: 2px solid var(--c0); outline-offset: 2px; }}
a {{ color: var(--c0); }}
.skip {{ position: absolute; left: -100rem; }} .skip:focus {{ position: static; }}
nav ul {{ list-style: none; margin: 1.25rem 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; }}
body {{ margin: 0 auto; max-width: 66rem; padding: 2rem 1.25rem 3rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  -webkit-text-size-adjust: 100%; overflow-wrap: anywhere; }}
h1 {{ font-size: 1.75rem; line-height: 1.2; margin: 0 0 .5rem; }}
h2 {{ font-size: 1.2rem; margin: 2.75rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--rule); }}
p {{ margin: .5rem 0; max-width: 44rem; }}
.lead, .note, footer {{ color: var(--muted); }}
.note, footer {{ font-size: .875rem; }}
dl {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(max(9.5rem, 30%), 1fr)); gap: .75rem;
  margin: 1.5rem 0 0; }}
dl div {{ background: var(--card); border-radius: .5rem; padding: .75rem .9rem; display: flex;
  flex-direction: column; }}
dt {{ font-size: .8125rem; color: var(--muted); line-height: 1.3; }}
dd {{ margin: 0; font-size: .8125rem; line-height: 1.35; color: var(--muted); }}
dd.value {{ font-size: 1.5rem; line-height: 1.3; font-weight: 600; color: var(--ink);
  font-variant-numeric: tabular-nums; }}
.scroll {{ overflow-x: auto; margin: 1rem 0 .5rem; }}
table {{ border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }}
caption {{ text-align: left; font-weight: 600; padding-bottom: .3rem; }}
th, td {{ padding: .3rem .75rem; text-align: right; white-space: nowrap; vertical-align: top;
  border-bottom: 1px solid var(--rule); }}
th:first-child, td:first-child {{ padding-left: 0; }}
thead th {{ white-space: normal; vertical-align: bottom; font-weight: 600; font-size: .8125rem; line-height: 1.25;
  color: var(--muted); }}
th.text, td.text {{ text-align: left; }}
tbody th {{ font-weight: 500; }}
tbody + tbody::before {{ content: ""; display: table-row; height: 1.25rem; }}
th:first-child {{ position: sticky; left: 0; background: var(--paper); }}
.facts td {{ white-space: normal; overflow-wrap: anywhere; }}
.facts th {{ color: var(--muted); }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(24rem, 100%), 1fr)); gap: 1.5rem;
  margin: 1.25rem 0; }}
figure {{ margin: 0; max-width: 36rem; break-inside: avoid; }}
figcaption {{ font-weight: 600; font-size: .95rem; }}
.legend {{ list-style: none; margin: .15rem 0 .35rem; padding: 0; display: flex; flex-wrap: wrap; gap: .1rem 1rem;
  font-size: .8125rem; color: var(--muted); }}
.legend i {{ display: inline-block; width: 1.1rem; height: .7rem; margin-right: .4rem; border-radius: 2px;
  background: var(--hue); }}
.legend i.line {{ height: 0; border-top: 3px solid var(--hue); background: none; border-radius: 0;
  vertical-align: middle; }}
.legend i.dashed {{ border-top-style: dashed; }}
.legend i.faint {{ opacity: .4; }}
svg {{ display: block; width: 100%; height: auto; stroke-linejoin: round; }}
.verdict {{ border-left: 4px solid var(--tone); padding: .4rem .9rem; background: var(--card);
  border-radius: 0 .4rem .4rem 0; font-weight: 500; }}
.good {{ --tone: var(--good); }} .bad {{ --tone: var(--bad); }}
pre {{ background: var(--card); padding: .75rem .9rem; border-radius: .4rem; overflow-x: auto; font-size: .85rem; }}
@media (max-width: 36rem) {{ th, td {{ padding: .3rem .45rem; }} table {{ font-size: .8125rem; }}
  h1 {{ font-size: 1.5rem; }} }}
footer {{ margin-top: 3rem; border-top: 1px solid var(--rule); padding-top: .75rem; }}
@media print {{ body {{ max-width: none; padding: 0; font-size: 10pt; }} h2 {{ break-after: avoid; }}
  tr {{ break-inside: avoid; }}
  .scroll {{ overflow: visible; }} th:first-child {{ position: static; background: none; }}
  h2 + p {{ break-after: avoid; }} dl div, pre, .verdict {{ border: 1px solid var(--rule); }}
  pre {{ white-space: pre-wrap; }}
  .charts {{ grid-template-columns: 1fr 1fr; }} dl {{ grid-template-columns: repeat(3, 1fr); }} }}
"""


@dataclass(frozen=True, slots=True)
class Drawing:
    """How charts become HTML, and what that needs in the file."""

    figure: Callable[[Chart, str], str]  # of a chart and the prefix of its ids: a <figure>
    policy: str = "default-src 'none'; style-src 'unsafe-inline'"  # content security policy
    head: str = ""  # last in <head>
    end: str = ""  # last in <body>


def html(page: Page, drawing: Drawing | None = None) -> str:
    """Give the whole file, in ASCII.

    Args:
        drawing: small pictures without a script by default, of curves and bars alone.
    """
    drawing = drawing or Drawing(_figure)
    main = ' id="main"' if page.contents else ""
    return _ascii(
        "<!doctype html>\n"
        '<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{drawing.policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(page.title)}</title><style>{_STYLE}</style>{drawing.head}</head>\n"
        f"<body>{_skip(page)}<header><h1>{escape(page.title)}</h1><p"
        f' class="lead">{escape(page.lead)}</p>{_figures(page)}</header>\n'
        f"{_contents(page)}<main{main}>{_sections(page, drawing)}</main>\n"
        + (f"<footer>{escape(page.footer)}</footer>" if page.footer else "")
        + f"{drawing.end}</body></html>\n"
    )


def _ascii(text: str) -> str:
    return text.encode("ascii", "xmlcharrefreplace").decode("ascii")


def _skip(page: Page) -> str:
    return '<a class="skip" href="#main">Skip to the content</a>' if page.contents else ""


def _contents(page: Page) -> str:
    if not page.contents:
        return ""
    links = "".join(f'<li><a href="#s{i}">{escape(section.title)}</a></li>' for i, section in enumerate(page.sections))
    return f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n'


def _figures(page: Page) -> str:
    return f"<dl>{''.join(_key_figure(figure) for figure in page.figures)}</dl>" if page.figures else ""


def _key_figure(figure: KeyFigure) -> str:
    note = f"<dd>{escape(figure.note)}</dd>" if figure.note else ""
    return f'<div><dt>{escape(figure.label)}</dt><dd class="value">{escape(figure.value)}</dd>{note}</div>'


def _sections(page: Page, drawing: Drawing) -> str:
    return "\n".join(_section(section, f"s{i}", drawing) for i, section in enumerate(page.sections))


def _section(section: Section, prefix: str, drawing: Drawing) -> str:
    """Lay out a section; charts that follow each other stand side by side where there is room."""
    title = f'<h2 id="{prefix}">{escape(section.title)}</h2>'
    found = [title]
    charts: list[str] = []
    for i, part in enumerate([*section.parts, ""]):
        if isinstance(part, Chart):
            charts.append(drawing.figure(part, f"{prefix}c{i}"))
            continue
        if charts:
            found.append(f'<div class="charts">{"".join(charts)}</div>')
            charts = []
        if part:
            found.append(_part(part))
    return f'<section aria-labelledby="{prefix}">{"".join(found)}</section>'


def _part(part: Part) -> str:
    if isinstance(part, Table):
        return table_html(part)
    if isinstance(part, Verdict):
        return f'<p class="verdict {"good" if part.good else "bad"}">{escape(part.text)}</p>'
    if isinstance(part, Code):
        return f"<pre>{escape(part.text)}</pre>"
    assert isinstance(part, str)
    return f"<p>{escape(part)}</p>"


def table_html(table: Table) -> str:
    """Give a table with its caption and notes."""

    def cell(tag: str, i: int, text: str, scope: str = "") -> str:
        kind = ' class="text"' if i < table.text_columns else ""
        return f"<{tag}{scope}{kind}>{escape(text)}</{tag}>"

    head = "".join(cell("th", i, text, ' scope="col"') for i, text in enumerate(table.header))

    def line(row: Sequence[str]) -> str:
        if not row:
            return "</tbody><tbody>"
        first = cell("th", 0, row[0], ' scope="row"')
        return f"<tr>{first}{''.join(cell('td', i, text) for i, text in enumerate(row) if i)}</tr>"

    caption = f"<caption>{escape(table.caption)}</caption>" if table.caption else ""
    facts = "" if table.header else ' class="facts"'
    return (
        f'<div class="scroll" role="region" aria-label="{escape(table.caption or "table")}"'
        f' tabindex="0"><table{facts}>{caption}'
        + (f"<thead><tr>{head}</tr></thead>" if head else "")
        + f"<tbody>{''.join(line(row) for row in table.rows)}</tbody></table></div>"
        + "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)
    )


def _figure(chart: Chart, prefix: str) -> str:
    if not isinstance(chart, Curve | Bars):
        raise TypeError(f"chart {chart.title!r}: {type(chart).__name__} has no picture without a script")
    items = "".join(f"<li>{key.html()}</li>" for key in legend(chart))
    return (
        f"<figure><figcaption>{escape(chart.title)}</figcaption>"
        f'<ul class="legend">{items}</ul>{draw(chart, prefix)}</figure>'
    )


@dataclass(frozen=True, slots=True)
class LegendKey:
    """A name in a legend."""

    name: str
    hue: str  # of the palette
    kind: str  # class of the sample beside it

    def html(self) -> str:
        """Give the sample and the name."""
        return f'<i class="{self.kind}" style="--hue: var(--{self.hue})"></i>{escape(self.name)}'


def legend(chart: Chart) -> list[LegendKey]:
    """Give the names of a chart: of its lines or bars, in order, then of what else there is to tell apart."""
    if isinstance(chart, HeatMap):
        return []
    if not isinstance(chart, Bars):
        band = isinstance(chart, Curve) and chart.band
        kind = "line" if isinstance(chart, Curve) else ""
        lines = [
            LegendKey(line.name, f"c{hue_of(line, i)}", f"{kind} dashed" if line.dashed else kind)
            for i, line in enumerate(chart.lines)
        ]
        return [*lines, LegendKey(band, "muted", "faint")] if band else lines
    found = [LegendKey(bar.name, f"c{i}", "") for i, bar in enumerate(chart.bars)]
    if len(chart.stack) > 1:
        last = len(chart.stack) - 1
        found += [LegendKey(name, "muted", "" if i == last else "faint") for i, name in enumerate(chart.stack)]
    if chart.mark:
        found.append(LegendKey(chart.mark, "muted", "line"))
    return found
