"""The style that all drawings of a chart share: colours, marks, and the ticks of their axes."""

from collections.abc import Sequence
from math import ceil, floor, isfinite, log2, log10

from foreroute.launch.page.words import count_text, number_text

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
MARKED = 24
"""Lines of at most so many points show them."""
_TICKS = 8  # of a logarithmic axis, about
_LARGE = 1e5  # from here on an axis has prefixes


def tick_format(values: Sequence[float]) -> str:
    """Return plotly's format of an axis: 200k and 3M from 1e5 on, else plain numbers."""
    return "~s" if max(map(abs, values), default=0) >= _LARGE else ",~g"


def tick_text(value: float) -> str:
    """Write a tick as the other axes have it."""
    return count_text(value).replace(" ", "") if value >= _LARGE else number_text(value)


def log_ticks(values: Sequence[float], base: int) -> list[float]:
    """Return ticks for a logarithmic axis, about eight at most: powers of 2, or 1, 2 and 5 times powers of 10.

    Example: for values from 0.3 to 7 and base 10 the ticks are 0.2, 0.5, 1, 2, 5 and 10.
    """
    known = [value for value in values if isfinite(value) and value > 0] or [1.0]
    if base == 2:
        first, last = floor(log2(min(known))), ceil(log2(max(known)))
        return [2.0**power for power in range(first, last + 1, -(-(last - first + 1) // _TICKS))]
    first, last = floor(log10(min(known))), ceil(log10(max(known)))
    steps = (1, 2, 5) if last - first <= 2 else (1,)
    every = max(1, -(-(last - first + 1) // _TICKS))
    found = [step * 10.0**power for power in range(first, last + 1, every) for step in steps]
    inside = [i for i, tick in enumerate(found) if min(known) <= tick <= max(known)] or [0]
    return found[max(0, inside[0] - 1) : inside[-1] + 2]
