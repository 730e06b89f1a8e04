"""Make charts of a run's metrics for the sections of a report; a metric that the run lacks makes no chart."""

from collections.abc import Mapping, Sequence
from math import isfinite

import numpy as np

from foreroute.launch.page.parts import COLOURS, Areas, Chart, Curve, HeatMap, Line, Part, Section, Table, Verdict
from foreroute.launch.report.run_data import MetricSeries, RunData, metric_grid, metric_series

X_LABELS = {"step": "step", "tokens": "symbols trained on", "flops": "FLOP of training", "seconds": "training time, s"}
QUALITY_OVER = {"tokens": "symbols", "flops": "FLOP", "seconds": "time"}


def curve(
    run: RunData,
    title: str,
    y_label: str,
    names: Mapping[str, str],
    *,
    factor: float = 1,
    y_from: float | None = None,
    upper: bool = False,
    y_log: bool = False,
    x: str = "step",
) -> list[Chart]:
    """Return one chart of some metrics over a quantity; none if no metric has a number other than 0.

    Args:
        names: the metrics, by their names in the chart.
        factor: multiplies the values.
        upper: draw a band up to the largest neighbour, where lines were thinned.
    """
    lines, thinned = [], 1
    for label, name in names.items():
        found = metric_series(run.lines, name, x)
        if any(value for value in found.mean if isfinite(value)):
            lines.append(line_of(label, found, factor=factor, upper=upper))
            thinned = max(thinned, found.lines)
    if not lines:
        return []
    band = "up to the largest nearby" if upper and thinned > 1 else ""
    return [Curve(title, X_LABELS[x], y_label, lines, y_from=y_from, y_log=y_log, band=band)]


def line_of(label: str, found: MetricSeries, *, factor: float = 1, upper: bool = False) -> Line:
    """Return a chart's line of a series."""
    most = [factor * value for value in found.most] if upper and found.lines > 1 else None
    return Line(label, found.x, [factor * value for value in found.mean], most)


def by_place(
    run: RunData,
    name: str,
    title: str,
    value_label: str,
    *,
    of: str,
    factor: float = 1,
    middle: float | None = None,
    y_from: float | None = 0,
) -> list[Chart]:
    """Return one chart of a metric of each rank or layer over steps: lines if there are few, a heat map if there are
    many.

    Args:
        of: the name of one place, such as "rank".
        middle: of the heat map.
    """
    found = metric_grid(run, name, axes=1)
    if not found or (of == "rank" and found.values.shape[1] == 1):
        return []  # what a single rank has is that of all
    values = (factor * found.values).T.tolist()
    if len(values) > COLOURS:
        rows = [str(i) for i in range(len(values))]
        return [HeatMap(title, "step", of, value_label, found.steps, rows, values, middle)]
    lines = [Line(f"{of} {i}", found.steps, row) for i, row in enumerate(values)]
    return [Curve(title, "step", value_label, lines, y_from=y_from)]


def expert_maps(run: RunData) -> list[Chart]:
    """Return a heat map for each layer: token rows of each expert over the mean, over steps."""
    found = metric_grid(run, "expert_rows", axes=2)
    known = ~np.isnan(found.values)
    if not known.any():
        return []
    mean = np.nansum(found.values, axis=2, keepdims=True) / known.sum(axis=2, keepdims=True).clip(min=1)
    over = found.values / mean.clip(min=1e-30)
    experts = known.any(axis=0).sum(axis=1).tolist()  # of each layer
    ends = float(over[known].min()), float(over[known].max())  # one scale, so that layers can be compared
    return [
        HeatMap(
            f"Layer {layer}: load of the experts",
            "step",
            "expert",
            "rows over the mean",
            found.steps,
            [str(expert) for expert in range(number)],
            over[:, layer, :number].T.tolist(),
            middle=1.0,
            ends=ends,
        )
        for layer, number in enumerate(experts)
    ]


def areas(title: str, y_label: str, x: Sequence[float], parts: Mapping[str, Sequence[float]]) -> list[Chart]:
    """Return stacked areas over steps of the parts that are not 0 everywhere."""
    lines = [Line(name, x, y) for name, y in parts.items() if any(value > 0 for value in y)]
    return [Areas(title, "step", y_label, lines)] if lines else []


def section(title: str, *parts: Part | list[Chart] | list[Table] | list[Verdict]) -> list[Section]:
    """Return a section of parts and lists of parts; none if it had no more than text."""
    flat: list[Part] = []
    for part in parts:
        if isinstance(part, list):
            flat += part
        else:
            flat.append(part)
    flat = [part for part in flat if part != ""]
    return [Section(title, flat)] if any(not isinstance(part, str) for part in flat) else []


def text(value: float, form: str = "{:,.0f}") -> str:
    """Write a number, or a dash where there is none."""
    return form.format(value) if isfinite(value) else "-"
