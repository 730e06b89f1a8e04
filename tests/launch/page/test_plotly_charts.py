"""Charts by plotly: the numbers and names of the page's description, in its palette, with a table beside each; nothing
from outside."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from math import nan

import pytest

from foreroute.launch.page.html_file import html
from foreroute.launch.page.parts import Areas, Bar, Bars, Curve, HeatMap, Line, Page, Section
from foreroute.launch.page.plotly_charts import figure_of
from foreroute.launch.page.style import DARK, LIGHT, log_ticks
from foreroute.launch.page.words import describe, numbers

CURVE = Curve(
    "Loss",
    "step",
    "nats",
    [Line("a", [1, 2, 4], [5, nan, 4], upper=[6, nan, 4.5]), Line("b", [1, 4], [3, 2], dashed=True, hue=4)],
    band="worst",
)
AREAS = Areas("Step", "step", "ms", [Line("forward", [1, 2], [10, 11]), Line("backward", [1, 2], [20, 22])])
BARS = Bars(
    "Bytes",
    "k",
    "MB",
    ["1", "2"],
    [Bar("ours", [[1, 2], [4, 3]], mark=[6, 7]), Bar("theirs", [[2, 2], [1, 1]])],
    ["in", "out"],
    mark="most",
)
HEAT = HeatMap(
    "Load", "step", "expert", "over the mean", [10, 20, 30], ["0", "1"], [[1.5, 1, nan], [0.5, 1, 1]], middle=1
)
CHARTS = [CURVE, AREAS, BARS, HEAT]
IDS = ["curve", "areas", "bars", "heat"]


def plain(chart):
    """The figure as the browser gets it."""
    return json.loads(figure_of(chart).to_json())


def test_a_curve_has_its_numbers_and_band():
    low, high, a, b = plain(CURVE)["data"]
    assert (a["x"], a["y"], a["name"]) == ([1, 2, 4], [5, None, 4], "a")
    assert (low["y"], high["y"], high["fill"]) == ([5, None, 4], [6, None, 4.5], "tonexty")
    assert (b["y"], b["line"]["dash"], b["line"]["color"]) == ([3, 2], "dash", "var(--c4)")
    assert [trace["legendgroup"] for trace in (low, high, a, b)] == ["0", "0", "0", "1"]


def test_areas_are_stacked():
    traces = plain(AREAS)["data"]
    assert [trace["y"] for trace in traces] == [[10, 11], [20, 22]]
    assert {trace["stackgroup"] for trace in traces} == {"all"}


def test_bars_stand_on_each_other_and_beside_the_others():
    traces = plain(BARS)["data"]
    assert [(t["offsetgroup"], t["y"], t["base"]) for t in traces] == [
        ("0", [1, 2], [0, 0]),
        ("0", [4, 3], [1, 2]),
        ("0", [0, 0], [6, 7]),
        ("1", [2, 2], [0, 0]),
        ("1", [1, 1], [2, 2]),
    ]


def test_a_heat_map_has_no_colour_in_the_middle():
    (trace,) = plain(HEAT)["data"]
    assert trace["z"] == [[1.5, 1, None], [0.5, 1, 1]]
    assert (trace["zmin"], trace["zmax"]) == (0.5, 1.5)
    assert trace["colorscale"] == [[0, "var(--c0)"], [0.5, "var(--card)"], [1, "var(--c1)"]]
    skewed = HeatMap("t", "x", "y", "z", [1, 2], ["0"], [[0.5, 5]], middle=1)
    (trace,) = plain(skewed)["data"]
    assert (trace["zmin"], trace["zmax"], trace["colorscale"][1][0]) == (0, 5, 0.2)


@pytest.mark.parametrize("chart", CHARTS, ids=IDS)
def test_every_colour_is_of_both_palettes(chart):
    used = set(re.findall(r"var\(--([\w-]+)\)", json.dumps(plain(chart))))
    assert {"muted", "rule", "c0"} <= used
    assert {name.removesuffix("-faint") for name in used} <= set(LIGHT) and set(LIGHT) == set(DARK)
    assert not re.findall(r"#[0-9a-f]{6}", json.dumps(plain(chart)))


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_words_and_lines_stand_out(palette):
    """WCAG 2.1: contrast of at least 4.5 for text (1.4.3) and 3 for lines (1.4.11)."""

    def luminance(name):
        parts = [int(palette[name][i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(name, other):
        light, dark = sorted((luminance(name), luminance(other)), reverse=True)
        return (light + 0.05) / (dark + 0.05)

    for ground in ("paper", "card"):
        assert all(contrast(name, ground) >= 4.5 for name in ("ink", "muted", "c0"))
        assert all(contrast(f"c{i}", ground) >= 3 for i in range(6))
    assert contrast("rule", "paper") < 3  # negative control


@pytest.mark.parametrize(
    ("chart", "header", "rows"),
    [
        (
            CURVE,
            ["line", "step", "nats"],
            [["a", "1", "5"], ["a", "2", "-"], ["a", "4", "4"], ["b", "1", "3"], ["b", "4", "2"]],
        ),
        (AREAS, ["step", "forward", "backward"], [["1", "10", "20"], ["2", "11", "22"]]),
        (
            BARS,
            ["k", "ours, in", "ours, out", "ours, most", "theirs, in", "theirs, out"],
            [["1", "1", "4", "6", "2", "1"], ["2", "2", "3", "7", "2", "1"]],
        ),
        (HEAT, ["step", "expert 0", "expert 1"], [["10", "1.5", "0.5"], ["20", "1", "1"], ["30", "-", "1"]]),
    ],
    ids=IDS,
)
def test_a_table_has_the_numbers(chart, header, rows):
    table = numbers(chart)
    assert list(table.header) == header and [list(row) for row in table.rows] == rows


def test_long_tables_are_thinned_and_say_so():
    x = list(range(1000))
    table = numbers(Curve("t", "x", "y", [Line("a", x, x, upper=x)]))
    assert len(table.rows) == 24 and table.rows[0][0] == "0" and table.rows[-1] == ["999"] * 3
    assert list(table.notes) == ["24 of 1,000 points, evenly spaced."]
    many = numbers(HeatMap("t", "step", "rank", "z", [5], [str(i) for i in range(40)], [[i] for i in range(40)]))
    assert list(many.header) == ["step", "least", "median", "most", "rank with the most"]
    assert many.rows[0] == ["5", "0", "19.5", "39", "39"]


def test_new_charts_are_described():
    assert describe(HEAT) == "Heat map. Load: over the mean over step. 2 rows, one for each expert: 0.5 to 1.5."
    assert (
        describe(AREAS) == "Stacked areas. Step: ms over step. forward: 10 to 11, last 11; backward: 20 to 22, last 22."
    )


class Scripts(HTMLParser):
    """Scripts that a file runs, its policy, and its other tags."""

    def __init__(self, source):
        super().__init__()
        self.runs, self.tags, self._in = [], [], None
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self._in = attrs.get("type", "run") if tag == "script" else None
        self.tags.append((tag, sorted(attrs)))
        if attrs.get("http-equiv"):
            self.policy = attrs["content"]

    def handle_endtag(self, tag):
        self._in = None

    def handle_data(self, data):
        if self._in == "run":
            self.runs.append(data)


def test_the_file_allows_its_own_scripts_and_nothing_else():
    source = html(Page("p", "l", [Section("s", CHARTS)]))
    found = Scripts(source)
    sums = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in found.runs]
    assert len(sums) == 2 and source.isascii()
    allowed = " ".join(f"'sha256-{value}'" for value in sums)
    assert found.policy == f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:"
    assert not [
        tag for tag, attrs in found.tags if {"src", "srcset"} & set(attrs) or tag in ("link", "iframe", "object")
    ]


def test_hostile_names_stay_text():
    evil = "</script><img src=x onerror=alert(1)>\"'&<b>"

    def page(word):
        curve = Curve(word, word, word, [Line(word, [1], [1]), Line(word, [1], [2])], band=word)
        bars = Bars(word, word, word, [word], [Bar(word, [[1]], [2])], [word], mark=word)
        heat = HeatMap(word, word, word, word, [1], [word], [[1]])
        return Page(word, word, [Section(word, [curve, bars, heat])] * 4)

    tame, wild = (Scripts(html(page(word))) for word in ("words", evil))
    assert tame.tags == wild.tags
    texts = json.dumps(plain(page(evil).sections[0].parts[0]))
    assert "<img" not in texts and "&lt;img" in texts  # plotly reads a little HTML in names


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: Areas("t", "x", "y", [Line("a", [1], [1]), Line("b", [2], [1])]),
            "chart 't': areas must have the same x",
        ),
        (lambda: HeatMap("t", "x", "y", "z", [1], ["a"], [[1, 2]]), "heat map 't': need 1 rows of 1 values"),
        (lambda: HeatMap("t", "x", "y", "z", [1], ["a", "b"], [[1]]), "heat map 't': need 2 rows"),
    ],
)
def test_what_a_chart_cannot_be_made_of(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("values", "base", "words"),
    [
        ([0.31, 7], 10, ["0.2", "0.5", "1", "2", "5", "10"]),
        ([0.5, 0.5], 10, ["0.2", "0.5", "1"]),
        ([3, 1e6], 10, ["1", "10", "100", "1,000", "10,000", "100k", "1M"]),
        ([1, 4, 16], 2, ["1", "2", "4", "8", "16"]),
        ([1, 1024], 2, ["1", "4", "16", "64", "256", "1,024"]),
        ([nan, 0], 10, ["1", "2"]),
    ],
)
def test_log_axes_have_their_numbers_written_out(values, base, words):
    """plotly's own ticks say 5 where they mean 0.5."""
    chart = Curve("t", "x", "y", [Line("a", values, values)], x_log=base == 2, y_log=base == 10)
    axis = plain(chart)["layout"]["xaxis" if base == 2 else "yaxis"]
    assert (axis["type"], axis["ticktext"], axis["tickvals"]) == ("log", words, log_ticks(values, base))
    numbers = [float(word.replace(",", "").replace("k", "e3").replace("M", "e6")) for word in words]
    assert numbers == pytest.approx(axis["tickvals"])


@pytest.mark.parametrize(("y", "low"), [([79.0, 80.0], 0), ([-20.0, 80.0], None)], ids=["from 0", "no value is hidden"])
def test_an_axis_starts_where_it_is_told(y, low):
    shown = plain(Curve("t", "x", "y", [Line("a", [0, 1], y)], y_from=0.0))["layout"]["yaxis"].get("range")
    assert shown == (None if low is None else [0, 84])
