"""Draws the README's pictures: `python docs/img/pictures.py` the way of a token, `... pictures.py runs/quickstart
runs/quickstart_dense` also the slimming curve of that run beside its dense twin, and puts the results into README.md.

A picture's colours follow the reader's light or dark theme.
"""

import json
import re
import sys
from collections.abc import Mapping
from html import escape
from math import log2
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
README = HERE.parents[1] / "README.md"
RESULTS = re.compile(r"(?<=<!-- results of docs/img/pictures.py -->\n\n).*?(?=\n\n<!-- end of results -->)", re.DOTALL)

_NAMES = "paper", "band", "ink", "muted", "rule", "a", "b"
_LIGHT = "#ffffff", "#f3f5f8", "#1c2127", "#586370", "#c3cad3", "#2463ad", "#c4560f"
_DARK = "#14171b", "#1d2126", "#e4e8ec", "#9aa6b2", "#48525d", "#78b1f2", "#f2a05f"
_RULES = """
text {font: 13px sans-serif; fill: var(--ink)} .small {font-size: 12px; fill: var(--muted)}
.mono {font-family: monospace}
.head {font-size: 14px; font-weight: 600} .mid {text-anchor: middle} .end {text-anchor: end} .on {fill: var(--paper)}
rect {fill: var(--paper); stroke: var(--rule)} .band {fill: var(--band); stroke: none}
.a {fill: var(--a); stroke: var(--a)} .b {fill: var(--b); stroke: var(--b)} circle {fill: var(--a)}
path {fill: none; stroke: var(--muted); stroke-width: 1.5} marker path {fill: var(--muted); stroke: none}
.curve {stroke: var(--a); stroke-width: 2} .dash {stroke: var(--b); stroke-dasharray: 5 4}
.grid {stroke: var(--rule); stroke-width: 0.6}
"""
STEP = "In the step, on every rank: no counts exchange, no host sync, no sort, no dropped token"
_ARROW = (
    '<marker id="to" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<path d="M0 0L8 4L0 8z"/></marker>'
)


def way() -> str:
    """Draw the way from a token through table, plan, exchange and experts: 4 experts on 2 ranks, k = 2."""
    parts = [_box(10, 10, 880, 196, "band"), _box(10, 222, 880, 226, "band")]
    parts += [_text(26, 34, "Ahead of the step, in the data loader: from token ids alone", "head")]
    parts += [_text(26, 246, STEP, "head")]

    parts += [_text(26, 66, "token")]
    for i, letter in enumerate("in the"):
        parts += _cell(26 + 22 * i, 78, letter, "a" if i > 2 else "")
    parts += [_text(26, 124, "its key: the n-gram", "small"), _text(26, 140, "that ends at it", "small")]
    parts += [_arrow("M164 90H214")]

    parts += [_text(224, 66, "table")]
    for row, experts in enumerate(("2013", "3021", "1230")):
        chosen = row == 1
        parts += [_text(252, 95 + 26 * row, "..." if not chosen else "row", "small end")]
        for i, expert in enumerate(experts):
            parts += _cell(260 + 22 * i, 78 + 26 * row, expert, "a" if chosen and i < 2 else "")
    parts += [
        _text(224, 176, "an ordering of all experts for each", "small"),
        _text(224, 192, "key; the first k are active", "small"),
    ]
    parts += [_arrow("M358 116H446")]

    parts += [_text(456, 66, "plan"), _box(456, 76, 416, 84)]
    for i, line in enumerate(
        (
            "which rows go to which rank, each token once to a rank",
            "how many rows come from which rank",
            "which rows each expert reads, and their weights",
        )
    ):
        parts += [_text(470, 98 + 24 * i, line)]
    parts += [_text(456, 180, "for every rank, table and micro-batch", "small")]
    parts += [_arrow("M780 162V234")]

    heads = (26, "hidden states"), (224, "exchange"), (456, "experts"), (660, "exchange"), (806, "sum")
    parts += [_text(x, 284, head) for x, head in heads]
    for rank, experts in enumerate(("01", "23")):
        y = 300 + 58 * rank
        parts += [_text(26, y + 19, f"rank {rank}", "small")]
        parts += _cell(76, y + 4, "x", "a" if rank == 0 else "")
        parts += _cell(98, y + 4, "x", "") + _cell(120, y + 4, "x", "")
        parts += [_box(456, y, 120, 32), _text(586, y + 20, f"rank {rank}", "small")]
        for i, expert in enumerate(experts):
            parts += _cell(484 + 32 * i, y + 5, expert, "a" if expert in "30" else "")
        parts += (
            _cell(806, y + 4, "y", "b" if rank == 0 else "") + _cell(828, y + 4, "y", "") + _cell(850, y + 4, "y", "")
        )
    parts += [_arrow("M150 316H448"), _arrow("M150 320C250 322 340 374 448 374")]
    parts += [_arrow("M640 316H798"), _arrow("M640 374C690 374 720 322 798 320")]
    lines = (
        (26, "a token has experts 3 and 0,"), (26, "so on both ranks"),
        (224, "one all-to-all: one row"), (224, "to each rank it needs"),
        (456, "grouped products and the"), (456, "weighted sum, in one"),
        (660, "one row comes back from"), (660, "each rank, and they add up"),
    )  # fmt: skip
    parts += [_text(x, 420 + 16 * (i % 2), line, "small") for i, (x, line) in enumerate(lines)]
    return _svg(
        900, 458, "The way of a token: key, table and plan ahead of the step; exchange and experts in it", parts
    )


def slimming(bpc: Mapping[str, float], others: Mapping[str, float]) -> str:
    """Draw held-out bits per byte of one trained model against its active experts.

    Args:
        bpc: by the number of active experts.
        others: what is drawn as lines across.
    """
    left, right, top, bottom = 60, 560, 44, 290
    ks = sorted(map(int, bpc))
    shown = [*bpc.values(), *others.values()]
    low, high = round(min(shown), 1) - 0.1, round(max(shown), 1) + 0.1

    def place(k: float, value: float) -> tuple[float, float]:
        x = left + (right - left) * log2(k) / log2(ks[-1])
        return round(x, 1), round(bottom - (bottom - top) * (value - low) / (high - low), 1)

    parts = [_text(20, 24, "One trained model at any number of active experts k", "head")]
    for tenth in range(round(10 * low), round(10 * high) + 1):
        if tenth % 2 == 0:
            y = place(1, tenth / 10)[1]
            parts += [f'<path class="grid" d="M{left} {y}H{right}"/>']
            parts += [_text(left - 8, y + 4, f"{tenth / 10:.1f}", "small end")]
    for name, value in others.items():
        y = place(1, value)[1]
        parts += [f'<path class="dash" d="M{left} {y}H{right}"/>', _text(right + 8, y + 4, f"{name} {value:.3f}")]
    points = [place(k, bpc[str(k)]) for k in ks]
    parts += [f'<path class="curve" d="M{"L".join(f"{x} {y}" for x, y in points)}"/>']
    for k, (x, y) in zip(ks, points, strict=True):
        parts += [f'<circle cx="{x}" cy="{y}" r="4"/>', _text(x, y - 10, f"{bpc[str(k)]:.3f}", "mid")]
        parts += [_text(x, bottom + 18, str(k), "small mid")]
    label = "active experts k; bits per byte of text that was not trained on"
    parts += [_text((left + right) / 2, bottom + 38, label, "small mid")]
    return _svg(720, 340, "Bits per byte of held-out text against the number of active experts", parts)


def results(summary: Mapping[str, Any], others: Mapping[str, float]) -> str:
    """Write a run's tables as the program prints them, with what others reach, as a code block."""
    from foreroute.launch.runs.summary import result_table

    text = result_table({**summary, "bpc": {**summary["bpc"], **others}, "bits_per_byte": {}}).partition("\ntraining")[
        0
    ]
    return "\n".join(f"    {line}" for line in text.splitlines())


def _svg(width: int, height: int, title: str, parts: list[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">'
    light, dark = ("; ".join(f"--{n}: {c}" for n, c in zip(_NAMES, cs, strict=True)) for cs in (_LIGHT, _DARK))
    style = f"<style>:root {{{light}}} @media (prefers-color-scheme: dark) {{:root {{{dark}}}}}{_RULES}</style>"
    paper = f'<rect width="{width}" height="{height}" style="stroke: none"/>'
    return "\n".join(
        [head, f"<title>{escape(title)}</title>", style, f"<defs>{_ARROW}</defs>", paper, *parts, "</svg>\n"]
    )


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    return f'<text x="{x}" y="{y}" class="{kind}">{escape(text)}</text>'


def _box(x: float, y: float, width: float, height: float, kind: str = "") -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="4" class="{kind}"/>'


def _cell(x: float, y: float, text: str, kind: str) -> list[str]:
    return [_box(x, y, 22, 22, kind), _text(x + 11, y + 16, text, f"mono mid {'on' if kind else ''}")]


def _arrow(path: str) -> str:
    return f'<path d="{path}" marker-end="url(#to)"/>'


def main() -> None:
    """Draw what the command line asks for."""
    (HERE / "way.svg").write_text(way(), encoding="utf-8")
    if len(sys.argv) > 1:
        own, *dense = (json.loads((Path(run) / "summary.json").read_text(encoding="utf-8")) for run in sys.argv[1:])
        bpc = {k: value for k, value in own["bpc"].items() if k.isdigit()}
        others = {"dense twin": dense[0]["bpc"]["dense"]} if dense else {}
        counted = {"order 2": own["order2_bpc"], "order 3": own["order3_bpc"]}
        (HERE / "slimming.svg").write_text(slimming(bpc, others | counted), encoding="utf-8")
        text = README.read_text(encoding="utf-8")
        README.write_text(RESULTS.sub(results(own, others).replace("\\", r"\\"), text), encoding="utf-8")


if __name__ == "__main__":
    main()
