"""A page as Markdown: nothing in its texts is read as markup, and its curves are files of their own."""

from foreroute.launch.page.markdown_file import markdown
from foreroute.launch.page.parts import Curve, KeyFigure, Line, Page, Section, Table

CHART = Curve("a < b & c", "x", "y", [Line("first_arm", [1, 2], [3, 4]), Line("second", [1, 2], [4, 5], dashed=True)])


def page(*parts):
    return Page("Title", "Lead.", [Section("Part", parts)], [KeyFigure("Runs", "3", "done")])


def test_tables_have_a_row_for_each_row():
    table = Table(["", "n"], [["a", "1"], [], ["b", "2"]], caption="Cap", notes=["A note."])
    text, pictures = markdown(page(table, "Words."), "p")
    assert pictures == {}
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows[-5:] == ["|     |   n |", "| :-- | --: |", "| a   |   1 |", "|     |     |", "| b   |   2 |"]
    for line in ("# Title", "## Part", "**Cap**", "*A note.*", "Words.", "| Runs | 3   | done |"):
        assert line in text.splitlines()


def test_markup_in_texts_is_text():
    words = "a_b *c* [d](e) <f> `g` | h"
    text, _ = markdown(page(words, Table([words], [[words]])), "p")
    escaped = r"a\_b \*c\* \[d\](e) \<f\> \`g\` \| h"
    assert escaped in text.splitlines() and text.count(f"| {escaped} |") == 2
    opened, _ = markdown(page("x"), "p", opening="**as it is**")
    assert "**as it is**" in opened.splitlines()


def test_charts_are_files_of_their_own():
    text, pictures = markdown(page(CHART, "between", CHART), "name")
    assert pictures == {"name-1.svg": CHART, "name-2.svg": CHART}
    assert "(name-1.svg)" in text and text.index("(name-1.svg)") < text.index("between")
