"""Make one HTML file of a page, with its style, its charts and the script that draws them inside.

launch/page/templates/ has the template, the style and the script. The file reads well on a phone, in dark and light (as
the reader's system asks) and on paper. Its content security policy allows its own two scripts, by their checksums, and
forbids every request. Without a script the page has its text and tables. A table beneath each chart has the chart's
numbers; a screen reader and a keyboard get that table too.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from plotly.offline import get_plotlyjs

from foreroute.launch.page.parts import COLOURS, Bars, Chart, Curve, HeatMap, Page, Part, Section, hue_of
from foreroute.launch.page.plotly_charts import colour_key, figure_of
from foreroute.launch.page.style import DARK, LIGHT
from foreroute.launch.page.words import describe, numbers

_TEMPLATES = Path(__file__).with_name("templates")
_FAINT = "47"  # alpha of bands, in hexadecimal: 28 %


def environment(*, trim: bool = False) -> Environment:
    """Open the templates; text that is put into a .html file is escaped.

    Args:
        trim: a line that holds only a tag leaves no line in the output.
    """
    return Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=trim,
        lstrip_blocks=trim,
        keep_trailing_newline=True,
    )


def html(page: Page, generator: str = "foreroute") -> str:
    """Return the whole file, in ASCII.

    Args:
        generator: the program's name, in the file's head.
    """
    palettes = {"light": _with_faint(LIGHT), "dark": _with_faint(DARK)}
    own = (_TEMPLATES / "charts.js").read_text()
    # plotly.js has other characters in strings and patterns only, where an escape means the same
    plotly = re.sub(r"[^\x00-\x7f]", lambda found: f"\\u{ord(found[0]):04x}", get_plotlyjs())
    scripts = [plotly, f"const PALETTES = {json.dumps(palettes)};\n{own}"]
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    env = environment()
    env.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    env.filters["unbroken"] = lambda text: text.replace(" = ", "\u00a0=\u00a0")  # keeps k = 4 on one line
    env.globals |= {
        "blocks": blocks,
        "legend": legend,
        "colour_key": colour_key,
        "figure_of": figure_of,
        "describe": describe,
        "table_of": numbers,
    }
    text = env.get_template("page.html").render(
        page=page,
        palettes={"light": LIGHT, "dark": DARK},
        style=(_TEMPLATES / "page.css").read_text(),
        scripts=scripts,
        policy=f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:",
        generator=generator,
    )
    return text.encode("ascii", "xmlcharrefreplace").decode("ascii")


@dataclass(frozen=True, slots=True)
class Side:
    """Charts that stand side by side where there is room."""

    groups: list[list[Chart]]  # those of one group are shown one at a time


def blocks(section: Section) -> Iterator[Part | Side]:
    """Return the parts of a section in order; charts that follow each other are one block."""
    for are_charts, found in groupby(section.parts, lambda part: isinstance(part, Chart)):
        if are_charts:
            charts = [part for part in found if isinstance(part, Chart)]
            yield Side([list(group) for _, group in groupby(charts, _place)])
        else:
            yield from found


def _place(chart: Chart) -> tuple[str, int]:
    """Return a key that is equal for charts that are shown one at a time."""
    return chart.title, 0 if isinstance(chart, Curve) and chart.choice else id(chart)


@dataclass(frozen=True, slots=True)
class LegendKey:
    """A name in a legend."""

    text: str
    hue: str  # of the palette
    kind: str  # class of the sample beside it
    hides: bool  # a press hides what it names


def legend(chart: Chart) -> list[LegendKey]:
    """Return the names of a chart: its lines or bars in order, then the parts of a stack, bands and marks."""
    if isinstance(chart, HeatMap):
        return []
    if not isinstance(chart, Bars):
        is_curve, band = isinstance(chart, Curve), isinstance(chart, Curve) and chart.band
        lines = []
        for i, line in enumerate(chart.lines):
            kind = ("point" if len(line.x) == 1 else "line") if is_curve else ""
            lines.append(
                LegendKey(line.name, f"c{hue_of(line, i)}", f"{kind} dashed" if line.dashed else kind, hides=True)
            )
        return [*lines, LegendKey(band, "muted", "faint", hides=False)] if band else lines
    found = [LegendKey(bar.name, f"c{i}", "", hides=True) for i, bar in enumerate(chart.bars)]
    if len(chart.stack) > 1:
        last = len(chart.stack) - 1
        found += [LegendKey(name, "muted", "faint" * (i != last), hides=False) for i, name in enumerate(chart.stack)]
    if chart.mark:
        found.append(LegendKey(chart.mark, "muted", "line", hides=False))
    return found


def _with_faint(palette: dict[str, str]) -> dict[str, str]:
    return palette | {f"c{i}-faint": palette[f"c{i}"] + _FAINT for i in range(COLOURS)}
