"""Puts measured numbers into docs/compress.md, its table and its picture: `python docs/compress.py [RESULT]`.

RESULT is a file whose last line is that of benchmarks.bench_compress; docs/compress.json keeps it. Without RESULT the
kept numbers are used.
"""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foreroute.launch.page.parts import Curve, Line
from foreroute.launch.page.pictures import save_picture

HERE = Path(__file__).resolve().parent
PAGE, KEPT, PICTURE = HERE / "compress.md", HERE / "compress.json", HERE / "compress.svg"
TABLE = re.compile(r"(?<=<!-- table of docs/compress.py -->\n\n).*?(?=\n\n<!-- end of table -->)", re.DOTALL)
DRAWN = 8  # experts in the picture
NAMES = {
    "merge outputs": "merged by outputs",
    "merge use": "merged by use",
    "merge random": "merged at random",
    "prune use": "pruned by use",
    "prune random": "pruned at random",
}


def name_of(arm: str, experts: int) -> list[str]:
    """Return an arm's number of experts and what was done."""
    if arm in ("whole", "int8"):
        return [str(experts), "-" if arm == "whole" else "int8"]
    number, _, way = arm.partition(" ")
    return [number, NAMES[way]]


def page(found: Mapping[str, Any]) -> str:
    """Return the page with the table of a result."""
    every_k = list(found["bpc"]["whole"])
    header = ["experts", "", *(f"k = {k}" for k in every_k), "bytes of experts"]
    whole = found["expert_bytes"]["whole"]
    rows = [
        [
            *name_of(arm, found["experts"]),
            *(f"{bpc[k]:.3f}" if k in bpc else "" for k in every_k),
            f"{found['expert_bytes'][arm] / whole:.1%}",
        ]
        for arm, bpc in found["bpc"].items()
    ]
    marks = ["--:", ":--", *(["--:"] * (len(header) - 2))]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in [header, marks, *rows])
    return TABLE.sub(lambda _: table, PAGE.read_text(encoding="utf-8"))


def picture(found: Mapping[str, Any]) -> Curve:
    """Return the chart of bits over k, of the whole model and of those with DRAWN experts."""
    arms = {"whole": f"{found['experts']} experts"} | {f"{DRAWN} {way}": name for way, name in NAMES.items()}
    lines = [
        Line(name, [*map(int, found["bpc"][arm])], [*found["bpc"][arm].values()], dashed=arm == "whole")
        for arm, name in arms.items()
    ]
    return Curve(
        f"From {found['experts']} experts to {DRAWN}", "active experts k", "bits per symbol", lines, x_log=True
    )


def main() -> None:
    """Write the files."""
    if len(sys.argv) > 1:
        last = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()[-1]
        KEPT.write_text(json.dumps(json.loads(last), indent=1) + "\n", encoding="utf-8")
    found = json.loads(KEPT.read_text(encoding="utf-8"))
    PAGE.write_text(page(found), encoding="utf-8")
    save_picture(picture(found), PICTURE)


if __name__ == "__main__":
    main()
