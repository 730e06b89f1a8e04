"""A page as HTML and in the terminal: nothing from outside, nothing unescaped, nothing cut off, and charts that show
their numbers."""

import io
import re
from collections import Counter
from functools import cache
from html.parser import HTMLParser
from math import log10, nan

import numpy as np
import pytest

from foreroute.launch.page.html_file import html
from foreroute.launch.page.parts import Bar, Bars, Code, Curve, KeyFigure, Line, Page, Section, Table, Verdict
from foreroute.launch.page.svg_charts import draw
from foreroute.launch.page.terminal import print_page
from foreroute.launch.page.words import byte_text, describe, number_text

EVIL = "</style></title><script>alert(1)</script>\" onload='x' &amp; $x$"


class Parsed(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, name):
        return [attrs[name] for _, attrs in self.tags if name in attrs]


def reaching_out(source):
    """What in an HTML file asks for something outside of it, or runs."""
    found = []
    for tag, attrs in Parsed(source).tags:
        if tag in ("script", "link", "iframe", "object", "embed", "base", "form", "foreignobject"):
            found.append(tag)
        for name, value in attrs.items():
            if name.startswith("on") or (
                name.rpartition(":")[2] in ("src", "srcset", "href", "action", "data", "poster")
                and not value.startswith("#")
            ):
                found.append(f"{name}={value}")
    found += [url for url in re.findall(r"url\(\s*['\"]?([^)'\"]*)", source) if url[0] != "#"]
    return found + re.findall(r"@import|http://|https://", source)


def lines(log=False):
    return Curve(
        "Speed",
        "ranks",
        "tokens per second",
        [
            Line("weak", [1, 2, 4, 8], [10, 19, 36, 68], upper=[12, 20, 40, 70]),
            Line("strong", [1, 2, 4, 8], [10, 15, 20, 22], dashed=True),
        ],
        x_log=log,
        y_log=log,
        band="up to the worst",
    )


def bars():
    each = [Bar("first", [[1, 2, 3], [4, 3, 0]], mark=[6, 7, 8]), Bar("second", [[2, 2, 2], [1, 1, 1]])]
    return Bars("Bytes", "k", "MB", ["1", "2", "16"], each, ["inside", "between"], mark="maximum")


def full(text=lambda words: words):
    """A page with one of everything; `text` is applied to every text in it."""
    curve = Curve(text("title"), text("x"), text("y"), [Line(text("line"), [0, 1], [1, 2])], band=text("band"))
    chart = Bars(
        text("title"),
        text("x"),
        text("y"),
        [text("g")],
        [Bar(text("bar"), [[1], [2]], [4])],
        [text("a"), text("b")],
        text("mark"),
    )
    table = Table(
        [text("head"), text("n")],
        [[text("cell"), text("1")], [], [text("cell"), text("2")]],
        text("caption"),
        1,
        [text("note")],
    )
    facts = Table([], [[text("name"), text("what")]], text_columns=2)
    parts = [text("words"), table, facts, curve, chart, Verdict(text("fits"), True), Code(text("a=1"))]
    figure = KeyFigure(text("label"), text("value"), text("note"))
    return Page(text("page"), text("lead"), [Section(text("section"), parts)], [figure], text("footer"))


@cache
def full_html():
    return html(full())


def test_a_page_asks_for_nothing_and_runs_nothing():
    source = full_html()
    assert reaching_out(source) == []
    policy = dict(Parsed(source).tags[3][1])
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"
    assert source.isascii() and len(source) < 30_000


@pytest.mark.parametrize(
    "planted",
    [
        '<img src="https://example.org/x.png">',
        '<p style="background: url(//example.org/x)">',
        "<script>1</script>",
        '<link rel="icon" href="x.ico">',
        "<style>@import 'x'</style>",
        '<svg><use xlink:href="other.svg#a"></use></svg>',
        '<p onclick="x">',
    ],
)
def test_the_search_for_requests_finds_them(planted):
    """Negative control of the test above."""
    assert reaching_out(full_html().replace("</main>", planted + "</main>"))


def test_all_text_is_escaped():
    """The same page with hostile text everywhere has the same tags, and shows that text wherever it showed text."""
    plain, evil = Parsed(full_html()), Parsed(html(full(lambda words: words + EVIL)))
    assert [tag for tag, _ in evil.tags] == [tag for tag, _ in plain.tags]
    assert [sorted(attrs) for _, attrs in evil.tags] == [sorted(attrs) for _, attrs in plain.tags]
    shown = "".join(evil.texts).split(EVIL)
    assert len(shown) - 1 == 34  # each of the texts once; the page's title is also the window's
    assert not any("alert" in text for text in shown)
    broken = full_html().replace("words", "words" + EVIL)  # negative control
    assert [tag for tag, _ in Parsed(broken).tags] != [tag for tag, _ in plain.tags]


def test_text_beyond_ascii_arrives():
    text = "Gr\u00f6\u00dfe \u5927"
    page = Page(text, text, [Section(text, [text])])
    assert Parsed(html(page)).texts.count(text) == 5 and printed(page).count(text) == 4


def ids_and_references(source):
    ids = Parsed(source).all("id")
    used = set(re.findall(r'(?:href="|url\(|labelledby=")#?([\w.-]+)', source))
    return Counter(ids), used


def test_ids_of_several_charts_do_not_meet():
    page = Page("page", "", [Section("one", [lines(), lines(), bars()]), Section("two", [lines()])])
    ids, used = ids_and_references(html(page))
    assert len(used) > 8 and used == set(ids) and set(ids.values()) == {1}
    twice, _ = ids_and_references(draw(lines(), "same") + draw(lines(), "same"))
    assert set(twice.values()) == {2}  # negative control


@pytest.mark.parametrize("chart", [lines(), lines(log=True), bars()], ids=["curve", "log", "bars"])
def test_a_chart_has_its_words_and_takes_its_colours_from_the_page(chart):
    svg = draw(chart, "c")
    parsed = Parsed(svg)
    assert {chart.x_label, chart.y_label} <= set(parsed.texts)
    assert parsed.tags[0][1]["role"] == "img" and parsed.tags[0][1]["aria-label"] == describe(chart)
    assert not re.findall(r"#[0-9a-fA-F]{6}\b|rgb|\bblack|\bwhite|font-family", svg)
    assert {"var(--muted)", "var(--rule)", "var(--c0)", "var(--c1)"} <= set(re.findall(r"var\(--\w+\)", svg))
    page = html(Page("page", "", [Section("s", [chart])]))
    names = [line.name for line in getattr(chart, "lines", [])] + [bar.name for bar in getattr(chart, "bars", [])]
    assert {chart.title, *names} <= set(Parsed(page).texts)
    defined = set(re.findall(r"(--\w+):", page))
    assert set(re.findall(r"var\((--\w+)\)", page)) <= defined


def path_of(svg, style):
    """Corners of the first path whose style has these words, as [n, 2]."""
    for tag, attrs in Parsed(svg).tags:
        if tag == "path" and style in attrs.get("style", ""):
            numbers = re.findall(r"-?\d+(?:\.\d+)?", attrs["d"])
            return np.array(numbers, float).reshape(-1, 2)
    raise AssertionError(f"no path with {style}")


def off_line(drawn, values):
    """Largest distance, in points, of drawn coordinates from a linear function of values."""
    fit = np.polyfit(values, drawn, 1)
    return np.abs(np.polyval(fit, values) - drawn).max()


def test_a_curve_is_drawn_where_its_numbers_are():
    chart = Curve("t", "x", "y", [Line("a", [0, 1, 3, 7], [5, 2, 9, 4])])
    corners = path_of(draw(chart, "c"), "stroke: var(--c0)")
    assert off_line(corners[:, 0], [0, 1, 3, 7]) < 0.02 and off_line(corners[:, 1], [5, 2, 9, 4]) < 0.02
    assert off_line(corners[:, 1], [5, 2, 9, 5]) > 1  # negative control
    assert corners[2, 1] < corners[1, 1]  # up is more


def test_log_axes_are_logarithmic():
    x, y = [1, 4, 64, 1024], [3, 700, 2e4, 1e6]
    chart = Curve("t", "x", "y", [Line("a", x, y)], x_log=True, y_log=True)
    svg = draw(chart, "c")
    corners = path_of(svg, "stroke: var(--c0)")
    assert off_line(corners[:, 0], [log10(v) for v in x]) < 0.02
    assert off_line(corners[:, 1], [log10(v) for v in y]) < 0.02
    assert off_line(corners[:, 0], x) > 1  # negative control
    assert {"1,024", "64", "100", "1,000,000"} <= set(Parsed(svg).texts)


def test_an_axis_starts_where_it_is_told():
    def texts(y, y_from):
        curve = Curve("t", "x", "y", [Line("a", [0, 1], y)], y_from=y_from)
        return Parsed(draw(curve, "c")).texts

    assert "0" in texts([79.0, 80.0], 0.0)[5:] and "80" in texts([79.0, 80.0], 0.0)
    assert "60" not in texts([79.0, 80.0], None)
    assert "-20" in texts([-20.0, 80.0], 0.0)  # no value is hidden


def test_bars_are_as_high_as_their_numbers():
    svg = draw(Bars("t", "x", "y", ["1", "2", "3"], [Bar("a", [[1, 2, 5]])], ["all"]), "c")
    tops = []
    for tag, attrs in Parsed(svg).tags:
        if tag == "path" and "fill: var(--c0)" in attrs.get("style", ""):
            y = np.array(re.findall(r"-?\d+(?:\.\d+)?", attrs["d"]), float)[1::2]
            tops.append(y.max() - y.min())
    assert np.allclose(np.array(tops) / tops[0], [1, 2, 5], atol=0.01)


def test_a_chart_is_described_in_words():
    chart = Curve(
        "Speed", "ranks", "ms", [Line("a", [1, 2, 3], [4, nan, 2500], upper=[5, nan, 3000]), Line("b", [1], [7])]
    )
    assert describe(chart) == (
        "Line chart. Speed: ms over ranks. a: 4 to 2,500, last 2,500, its band up to 3,000; b: 7."
    )
    assert describe(bars()) == "Bar chart. Bytes: MB over k. first: 3 to 5, last 3; second: 3."


def test_a_line_without_values_is_drawn_and_described():
    chart = Curve("t", "x", "y", [Line("a", [0, 1], [nan, nan], upper=[nan, nan])], y_from=0)
    assert "a: no values" in describe(chart) and "nan" not in describe(chart)
    assert draw(chart, "c").startswith("<svg")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1, "1"),
        (1.05, "1.05"),
        (400_000, "400,000"),
        (-20, "-20"),
        (0.00012345, "0.0001234"),
        (1e-7, "1e-07"),
        (3e15, "3e+15"),
        (1234.5678, "1,235"),
    ],
)
def test_numbers_of_axes(value, text):
    assert number_text(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (79_154_000, "79.2 MB"),
        (999_600, "1.00 MB"),
        (9_999_000, "10.0 MB"),
        (99_960_000, "100 MB"),
        (5e18, "5000 PB"),
    ],
)
def test_bytes_have_three_digits(value, text):
    assert byte_text(value) == text


def printed(page, width=None):
    file = io.StringIO()
    print_page(page, file, width)
    return file.getvalue()


def one(*parts):
    return Page("page", "lead", [Section("section", parts)])


NUMBERS = [["received by a rank", "400,000", *[f"{n},234,567.891" for n in range(1, 6)], "38"]]
WIDE = Table(["rows", "steps", *"abcde", "the worst step"], NUMBERS, notes=["a note " * 30])


def test_a_file_gets_plain_text_of_80_columns():
    text = printed(full())
    assert "\x1b" not in text and all(len(line) <= 80 for line in text.splitlines())
    assert all(line == line.rstrip() for line in text.splitlines())
    for word in (
        "page",
        "lead",
        "label",
        "value",
        "section",
        "words",
        "head",
        "cell",
        "caption",
        "note",
        "what",
        "fits",
        "a=1",
    ):
        assert word in text
    assert "title" not in text and "footer" not in text  # charts and the file's foot are for the HTML


@pytest.mark.parametrize("width", [10, 30, 40, 60, 80, 200])
def test_texts_beside_numbers_wrap_between_words(width):
    note = "of 400,000 steps, in which a rank receives no row at all"
    figure = KeyFigure("Steps with an idle rank", "1,234,567 MB", note)
    facts = Table([], [["a name of words", note]], text_columns=2)
    text = printed(Page("page", "lead", [Section("section", [facts])], [figure]), width)
    assert "1,234,567 MB" in text
    for words in (note, note, "Steps with an idle rank", "a name of words"):
        for word in words.split():
            assert re.search(rf"(^|\s){re.escape(word)}(\s|$)", text), word
    if width >= 40:
        assert max(len(line) for line in text.splitlines()) <= width


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_no_number_is_broken_or_cut_off(width):
    text = printed(one(WIDE, Code("a" * 300)), width)
    for cell in NUMBERS[0][1:]:
        assert re.search(rf"(^|\s){re.escape(cell)}(\s|$)", text), cell
    assert "\u2026" not in text and "a" * 300 in text
    notes = [line for line in text.splitlines() if "note" in line]
    assert max(len(line) for line in notes) <= width  # text wraps where the terminal ends


def test_markup_is_text_in_the_terminal():
    text = printed(full(lambda words: words + "[bold red]:smile:[/] \\[x]"))
    assert text.replace("\n", "").count("[bold red]:smile:[/]") >= 15 and "\x1b" not in text


def test_a_header_takes_two_lines_at_most_and_stands_on_the_rule():
    table = Table(["k", "rows from rank to rank", "of an expert"], [["4", "839", "3"]])
    text = printed(one(table)).splitlines()
    assert text[-4:] == ["      rows from   of an", "k  rank to rank  expert", "\u2500" * 23, "4           839       3"]


def test_groups_of_rows_are_apart():
    table = Table(["what", "n"], [["first", "1"], [], ["second", "2"]])
    text = printed(one(table)).splitlines()
    place = text.index("first   1")
    assert text[place + 1].strip() == "" and text[place + 2] == "second  2"
    assert html(one(table)).count("<tbody>") == 2


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Table(["a", "b"], [["1"]], "cap"), "rows of [1, 2] cells in one table: 'cap'"),
        (lambda: Line("a", [1, 2], [1]), "line 'a': x, y and upper must have equal lengths"),
        (lambda: Line("a", [1], [1], upper=[1, 2]), "line 'a'"),
        (lambda: Curve("t", "x", "y", []), "chart 't': 0 names; from 1 to 6"),
        (lambda: Curve("t", "x", "y", [Line("a", [], [])] * 7), "chart 't': 7 names"),
        (lambda: Bars("t", "x", "y", ["1"], [Bar("a", [[1], [2]])], ["s"]), "bars 'a': need 1 parts of 1 groups"),
        (lambda: Bars("t", "x", "y", ["1"], [Bar("a", [[1]], [1, 2])], ["s"]), "bars 'a'"),
    ],
)
def test_what_a_page_cannot_be_made_of(make, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        make()
