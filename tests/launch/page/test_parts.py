"""A page as HTML and in the terminal: nothing from outside, nothing unescaped, nothing cut off, and charts that show
their numbers."""

import io
import re
from collections import Counter
from functools import cache
from html.parser import HTMLParser
from math import nan

import pytest

from foreroute.launch.page.html_file import html
from foreroute.launch.page.parts import Bar, Bars, Code, Curve, KeyFigure, Line, Page, Section, Table, Verdict
from foreroute.launch.page.terminal import print_top
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
    """What in an HTML file, before its own two scripts at its end, asks for something outside of it, or runs."""
    found = []
    source = source.rpartition("</main>")[0]
    for tag, attrs in Parsed(source).tags:
        if tag in ("link", "iframe", "object", "embed", "base", "form", "foreignobject"):
            found.append(tag)
        if tag == "script" and attrs.get("type") != "application/json":
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
    verdict = KeyFigure(text("asked"), text("answer"), text("why"), good=True)
    return Page(text("page"), text("lead"), [Section(text("section"), parts)], [figure], [verdict], text("footer"))


@cache
def full_html():
    return html(full())


def test_a_page_asks_for_nothing_and_runs_no_more_than_its_own_scripts():
    """tests/launch/page/test_plotly_charts.py has the policy and the checksums."""
    source = full_html()
    assert reaching_out(source) == []
    assert source.isascii() and len(source.rpartition("</main>")[0]) < 30_000


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
    texts = [text for text in evil.texts if not text.startswith('{"data"') and "Plotly" not in text]
    shown = "".join(texts).split(EVIL)
    assert len(shown) - 1 == 44  # each of the texts once; the page's title is also the window's
    assert not any("alert" in text for text in shown)
    broken = full_html().replace("words", "words" + EVIL)  # negative control
    assert [tag for tag, _ in Parsed(broken).tags] != [tag for tag, _ in plain.tags]


def test_text_beyond_ascii_arrives():
    text = "Gr\u00f6\u00dfe \u5927"
    page = Page(text, text, [Section(text, [text])])
    assert Parsed(html(page)).texts.count(text) == 5 and printed(page).count(text) == 1


def ids_and_references(source):
    ids = Parsed(source).all("id")
    used = set(re.findall(r'(?:href="|url\(|labelledby=")#?([\w.-]+)', source))
    return Counter(ids), used


def test_ids_of_several_charts_do_not_meet():
    page = Page("page", "", [Section("one", [lines(), lines(), bars()]), Section("two", [lines()])])
    ids, used = ids_and_references(html(page).rpartition("</main>")[0])
    assert len(ids) == 2 + 3 * 4 and used < set(ids) and set(ids.values()) == {1}
    twice, _ = ids_and_references(2 * html(page).rpartition("</main>")[0])
    assert set(twice.values()) == {2}  # negative control


def test_a_chart_is_described_in_words():
    chart = Curve(
        "Speed", "ranks", "ms", [Line("a", [1, 2, 3], [4, nan, 2500], upper=[5, nan, 3000]), Line("b", [1], [7])]
    )
    assert describe(chart) == (
        "Line chart. Speed: ms over ranks. a: 4 to 2,500, last 2,500, its band up to 3,000; b: 7."
    )
    assert describe(bars()) == "Bar chart. Bytes: MB over k. first: 3 to 5, last 3; second: 3."


def test_a_line_without_values_is_drawn_and_described():
    chart = Curve("t", "x", "y", [Line("a", [0, 1], [nan, nan], upper=[nan, nan])], y_from=0, y_log=True)
    assert "a: no values" in describe(chart) and "nan" not in describe(chart)
    assert "nan" not in html(one(chart)).partition("<main")[2].rpartition("</main>")[0].lower()


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
    print_top(page, file, width)
    return file.getvalue()


def one(*parts):
    return Page("page", "lead", [Section("section", parts)])


def test_a_file_gets_plain_text_of_80_columns():
    text = printed(full())
    assert "\x1b" not in text and all(len(line) <= 80 for line in text.splitlines())
    assert all(line == line.rstrip() for line in text.splitlines())
    assert text.splitlines() == ["page", "asked  answer  why", "label  value   note"]


@pytest.mark.parametrize("width", [10, 20, 30, 40, 60, 80, 200])
def test_notes_wrap_between_words_and_no_value_is_broken_or_cut_off(width):
    note = "of 400,000 steps, in which a rank receives no row at all"
    figures = [KeyFigure("Steps with an idle rank", "1,234,567 MB", note), KeyFigure("b", "2", note)]
    text = printed(Page("page", "lead", [], figures, figures), width)
    assert text.count("1,234,567 MB") == 2 and "\u2026" not in text
    for words in (note, "Steps with an idle rank"):
        for word in words.split():
            assert re.search(rf"(^|\s){re.escape(word)}(\s|$)", text), word
    if width >= 40:
        assert max(len(line) for line in text.splitlines()) <= width


def test_markup_is_text_in_the_terminal():
    text = printed(full(lambda words: words + "[bold red]:smile:[/]"))
    assert text.count("[bold red]:smile:[/]") == 7 and "\x1b" not in text


def test_groups_of_rows_are_apart():
    table = Table(["what", "n"], [["first", "1"], [], ["second", "2"]])
    assert html(one(table)).count("<tbody>") == 2


def test_charts_of_a_choice_are_one_figure_at_a_time():
    names = ["symbols", "time"]
    charts = [Curve("Loss", name, "y", [Line("a", [1, 2], [1, 2])], choice=name) for name in names]
    found = Parsed(html(one(*charts, lines(), lines())).rpartition("</main>")[0])
    figures = [attrs for tag, attrs in found.tags if tag == "figure"]
    assert ["hidden" in attrs for attrs in figures] == [False, True, False, False]
    assert [text for text in found.texts if text in names] == [*names, "symbols", *names, "time"]


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
