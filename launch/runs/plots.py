"""The two plots of a run: bits per symbol over training, and the slimming curve (bits per symbol against k)."""

from collections.abc import Mapping
from pathlib import Path

from foreroute.engine.metrics.names import read_lines
from foreroute.launch.page.parts import Curve, Line
from foreroute.launch.page.pictures import save_picture

BASELINES = {"order 2": "order2_bpc", "order 3": "order3_bpc", "bzip2 -9": "bzip2_bpc"}
"""Models that count, by their names in charts and tables, and where a run's summary has their bits per symbol."""


def plot_loss(metrics: Path, target: Path) -> None:
    """Draw training and validation bpc over symbols from a metrics.jsonl."""
    rows = read_lines(metrics)
    lines = []
    for label, name in (("training", "bpc"), ("validation", "valid_bpc")):
        points = [(row["tokens"], row[name]) for row in rows if row.get(name) is not None]
        lines.append(Line(label, [x for x, _ in points], [y for _, y in points]))
    save_picture(Curve("Loss", "symbols", "bits per symbol", lines if lines[1].x else lines[:1]), target)


def plot_slimming(bpc: Mapping[str, float], baselines: Mapping[str, float], target: Path) -> None:
    """Draw held-out bpc against the number of active experts, with baselines as horizontal lines."""
    ks = [int(k) for k in bpc if k.isdigit()]
    levels = {**{k: value for k, value in bpc.items() if not k.isdigit()}, **baselines}
    ends = [1, max([2, *ks])]
    lines = [Line("model", ks, [bpc[str(k)] for k in ks])] if ks else []
    lines += [Line(name, ends, [value, value], dashed=True) for name, value in levels.items()]
    save_picture(Curve("Slimming", "active experts k", "bits per symbol", lines, x_log=True), target)
