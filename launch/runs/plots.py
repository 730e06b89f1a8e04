"""The two plots of a run: bits per symbol over training, and the slimming curve (bits per symbol against k)."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from foreroute.engine.metrics.names import read_lines


def plot_loss(metrics: Path, target: Path) -> None:
    """Draw training bpc over symbols from a metrics.jsonl."""
    rows = read_lines(metrics)
    points = [(row["tokens"], row["bpc"]) for row in rows if row.get("bpc") is not None]
    valid = [(row["tokens"], row["valid_bpc"]) for row in rows if row.get("valid_bpc") is not None]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(*zip(*points, strict=True), linewidth=1, label="training")
    if valid:
        axes.plot(*zip(*valid, strict=True), "o-", label="validation")
        axes.legend()
    axes.set(xlabel="symbols", ylabel="bits per symbol", title="Loss")
    axes.grid(alpha=0.3)
    figure.savefig(target, dpi=120)
    plt.close(figure)


def plot_slimming(bpc: Mapping[str, float], baselines: Mapping[str, float], target: Path) -> None:
    """Draw held-out bpc against the number of active experts, with baselines as horizontal lines."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    ks = [int(k) for k in bpc if k.isdigit()]
    if ks:
        axes.plot(ks, [bpc[str(k)] for k in ks], "o-", label="model")
        axes.set_xscale("log", base=2)
        axes.set_xticks(ks, [str(k) for k in ks])
    for name, value in {**{k: v for k, v in bpc.items() if not k.isdigit()}, **baselines}.items():
        axes.axhline(value, linestyle="--", linewidth=1, color="grey")
        axes.annotate(name, (1.0, value), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    axes.set(xlabel="active experts k", ylabel="bits per symbol", title="Slimming")
    axes.grid(alpha=0.3)
    figure.savefig(target, dpi=120)
    plt.close(figure)
