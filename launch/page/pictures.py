"""Draw curves as pictures with matplotlib, on white, for a run's folder and for Markdown pages."""

from pathlib import Path
from typing import Any

from foreroute.launch.page.parts import Curve, hue_of
from foreroute.launch.page.style import LIGHT, MARKED, log_ticks, tick_text

_STYLE: dict[Any, Any] = {"svg.fonttype": "none", "text.parse_math": False, "path.simplify_threshold": 0.2}


def save_picture(chart: Curve, target: Path) -> None:
    """Write a curve as a file; the suffix of the name chooses the format."""
    from matplotlib import rc_context  # here, since its import takes a quarter of a program's start
    from matplotlib.figure import Figure

    with rc_context(_STYLE | {"svg.hashsalt": chart.title}):  # the same bytes for the same chart
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for i, line in enumerate(chart.lines):
            point, colour = len(line.x) == 1, LIGHT[f"c{hue_of(line, i)}"]
            axes.plot(
                line.x,
                line.y,
                "" if point else "--" if line.dashed else "-",
                marker="o" if len(line.x) <= MARKED and not line.dashed else "",
                markersize=8 if point else 4,
                zorder=3 if point else 2,
                linewidth=1.4,
                color=colour,
                label=line.name,
            )
        axes.set(title=chart.title, xlabel=chart.x_label, ylabel=chart.y_label)
        axes.grid(alpha=0.3)
        if chart.x_log:
            ticks = log_ticks([x for line in chart.lines for x in line.x], chart.x_base)
            axes.set_xscale("log", base=chart.x_base)
            axes.set_xticks(ticks, [tick_text(tick) for tick in ticks])
        if len(chart.lines) > 1:
            axes.legend()
        metadata = {"Date": None} if target.suffix == ".svg" else None
        figure.savefig(target, dpi=120, metadata=metadata)
        if target.suffix == ".svg":  # matplotlib ends the lines of a path with spaces
            target.write_text("\n".join(line.rstrip() for line in target.read_text().splitlines()) + "\n")
