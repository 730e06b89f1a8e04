"""Pictures of curves: the numbers are where they belong, and the file stands alone."""

import re
from math import log2
from xml.etree import ElementTree

import numpy as np
import pytest

from foreroute.launch.page.parts import Curve, Line
from foreroute.launch.page.pictures import save_picture

NAMES = "{http://www.w3.org/2000/svg}"


def drawn(chart, tmp_path):
    save_picture(chart, tmp_path / "x.svg")
    return (tmp_path / "x.svg").read_text()


def corners(svg, hue="#2463ad"):
    """Of the line of a colour, as [n, 2]."""
    (path,) = [
        element.attrib["d"]
        for element in ElementTree.fromstring(svg).iter(f"{NAMES}path")
        if f"stroke: {hue}" in element.attrib.get("style", "") and element.attrib["d"].count("L") > 2
    ]
    return np.array(re.findall(r"-?\d+(?:\.\d+)?", path), float).reshape(-1, 2)


def off_line(found, values):
    """Largest distance, in points, of drawn coordinates from a linear function of values."""
    return np.abs(np.polyval(np.polyfit(values, found, 1), values) - found).max()


def test_a_picture_may_be_committed(tmp_path):
    """`make lint` refuses spaces at the end of a line, which matplotlib writes."""
    text = drawn(Curve("t", "x", "y", [Line("a", [1, 2], [3, 4])]), tmp_path)
    assert "<path" in text and text.endswith("\n") and not re.search(r"[ \t]$", text, re.MULTILINE)


@pytest.mark.parametrize("log", [False, True])
def test_a_line_is_where_its_numbers_are(tmp_path, log):
    x, y = [1, 2, 8, 64], [5, 2, 9, 4]
    found = corners(drawn(Curve("t", "x", "y", [Line("a", x, y)], x_log=log), tmp_path))
    assert off_line(found[:, 0], [log2(v) for v in x] if log else x) < 0.02
    assert off_line(found[:, 1], y) < 0.02 and off_line(found[:, 1], [5, 2, 9, 5]) > 1  # negative control
    assert found[2, 1] < found[1, 1]  # up is more


def test_a_picture_has_its_words_and_asks_for_nothing(tmp_path):
    chart = Curve("a < b & $c$", "x", "y", [Line("first_arm", [1, 2], [3, 4]), Line("second", [1, 2], [4, 5])])
    svg = drawn(chart, tmp_path)
    texts = {element.text for element in ElementTree.fromstring(svg).iter(f"{NAMES}text")}
    assert {"a < b & $c$", "first_arm", "second", "x", "y"} <= texts
    assert not re.findall(r"(?:href|src)=\"(?!#)", svg) and "<script" not in svg
    assert drawn(chart, tmp_path) == svg
