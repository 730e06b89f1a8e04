"""The report's page of several runs or a sweep: one table of all runs, and curves of the best six in common charts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite, nan
from typing import Any

from foreroute.launch.page.parts import COLOURS, Chart, Curve, KeyFigure, Line, Page, Table
from foreroute.launch.page.words import count_text, duration
from foreroute.launch.report.charts import QUALITY_OVER, X_LABELS, section, text
from foreroute.launch.report.one_run import (
    HIDDEN,
    LEAD,
    by_arithmetic,
    by_k,
    parameters_of,
    state_of,
    step_of,
    tokens_per_second_of,
)
from foreroute.launch.report.run_data import RunData, metric_series, number, plain_dict
from foreroute.launch.start.help import value_text

_OWN = {*HIDDEN, "train.valid_every"}
_FEW = 3  # options
_WIDE = 8  # the largest over the smallest; models that differ more need a logarithmic axis


@dataclass(frozen=True, slots=True)
class Absent:
    """A run of a sweep that left no folder."""

    name: str
    state: str


@dataclass(frozen=True, slots=True)
class _Drawn:
    hue: int
    label: str
    run: RunData

    def line(self, x: Sequence[float], y: Sequence[float]) -> Line:
        return Line(self.label, x, y, hue=self.hue)


def several_page(title: str, runs: Sequence[RunData], absent: Sequence[Absent] = ()) -> Page:
    """Describe several runs. The best run is first in the table and in every chart; a run keeps its colour in all
    charts."""
    runs = sorted(runs, key=lambda run: run.quality)
    differing = differing_options(runs)
    names = [run.name for run in runs]
    labels = names if len(set(names)) == len(names) else [str(run.folder) for run in runs]
    drawn = [_Drawn(hue, *of_run) for hue, of_run in enumerate(zip(labels, runs, strict=True))][:COLOURS]
    cut = f" Charts show the best {COLOURS} of {len(runs)}, the table all." if len(runs) > COLOURS else ""
    states = [state_of(run) for run in runs] + [run.state for run in absent]
    counted = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return Page(
        title=title,
        lead=f"{len(states)} runs: {counted}.{cut} {LEAD}",
        figures=_figures(runs[0], labels[0]) if runs else [],
        sections=[
            *section("Runs", *_words(runs), _table(labels, runs, differing, absent)),
            *section("Slimming", _slimming(drawn)),
            *section(
                "Quality",
                _quality(drawn, "Training: bits per symbol", "lines", "bpc"),
                _quality(drawn, "Validation: bits per symbol", "valid", "valid_bpc"),
            ),
            *section("Speed", _speed(drawn)),
            *section("Missing", _missing(labels, runs)),
        ],
        footer="Written by python -m launch.report from the files in the runs' folders.",
    )


def differing_options(runs: Sequence[RunData]) -> list[str]:
    """Return the names of the options whose known values differ between the runs."""
    known = [run.options for run in runs if run.options]
    names = dict.fromkeys(name for options in known for name in options)
    return [
        name for name in names if name not in _OWN and len({value_text(options.get(name)) for options in known}) > 1
    ]


def _figures(best: RunData, label: str) -> list[KeyFigure]:
    quality = best.quality
    return [
        KeyFigure("Best bits per symbol", text(quality.bpc, "{:.3f}"), f"{label}: {quality.source}"),
        KeyFigure("Its symbols per second", text(tokens_per_second_of(best)), "of training, over all ranks; mean"),
        KeyFigure("Its training time", duration(best.last("seconds")), "of steps alone"),
    ]


def _words(runs: Sequence[RunData]) -> list[str]:
    texts = {str(run.summary["corpus_sha256"]) for run in runs if "corpus_sha256" in run.summary}
    cut = {value_text(run.options.get("corpus.tokens")) for run in runs if run.options}
    words = (
        "These runs read different texts, or cut them into symbols differently: their bits per symbol are not"
        " comparable."
    )
    return [words] if len(texts) > 1 or len(cut) > 1 else []


def _table(
    labels: Sequence[str], runs: Sequence[RunData], differing: Sequence[str], absent: Sequence[Absent]
) -> list[Table]:
    ks = sorted({k for run in runs for k, _ in by_k(run)})

    def option_cell(run: RunData, name: str) -> str:
        return value_text(run.options[name]) if name in run.options else "-"

    def bpc_cell(run: RunData, k: int) -> str:
        return text(dict(by_k(run)).get(k, nan), "{:.3f}")

    options = {name: partial(option_cell, name=name) for name in differing}
    few = len(differing) <= _FEW  # many would push results out of sight
    columns: dict[str, Callable[[RunData], str]] = {
        "bpc": lambda run: text(run.quality.bpc, "{:.3f}"),
        **(options if few else {}),
        **{f"k = {k}": partial(bpc_cell, k=k) for k in ks},
        "symbols/s": lambda run: text(tokens_per_second_of(run)),
        "time": lambda run: duration(run.last("seconds")),
        "FLOP": lambda run: count_text(run.last("flops")),
        "parameters": lambda run: count_text(parameters_of(run)),
        "active": lambda run: count_text(_active_parameters(run)),
    }
    if any(run.quality.order for run in runs):
        columns["of"] = lambda run: run.quality.source
    if absent or any(state_of(run) != "complete" for run in runs):
        columns["state"] = _state
    columns |= {} if few else options
    header = ["run", *columns]
    rows = [[label, *(cell(run) for cell in columns.values())] for label, run in zip(labels, runs, strict=True)]
    rows += [[run.name, *(run.state if name == "state" else "-" for name in columns)] for run in absent]
    notes = [
        "bpc: bits per symbol, the best that is known; k = 1 and so on: of the held-out split at that k. Runs"
        " without a held-out result come last. FLOP: of training, forward and backward, of all ranks. active:"
        " parameters used at the last k."
    ]
    return [Table(header, rows, notes=notes)] if rows else []


def _state(run: RunData) -> str:
    state = state_of(run)
    return state if state == "complete" else f"{state}, step {step_of(run):,}"


def _active_parameters(run: RunData) -> float:
    """Return the number of parameters that were active at the last k that the run logged."""
    active, k = plain_dict(run.facts.get("active_parameters")), run.last("k")
    return number(active.get("dense", active.get(f"{k:.0f}" if isfinite(k) else "")))


def _quality(drawn: Sequence[_Drawn], title: str, lines: str, name: str) -> list[Chart]:
    """Make one chart of a metric of all runs; the reader chooses the quantity of the x axis."""
    charts: list[Chart] = []
    for x, choice in QUALITY_OVER.items():
        found = [(each, metric_series(getattr(each.run, lines), name, x)) for each in drawn]
        of_runs = [each.line(points.x, points.mean) for each, points in found]
        charts += _chart(title, X_LABELS[x], "bits per symbol", of_runs, choice=choice)
    return charts


def _slimming(drawn: Sequence[_Drawn]) -> list[Chart]:
    over_k = [each.line([float(k) for k, _ in by_k(each.run)], [bpc for _, bpc in by_k(each.run)]) for each in drawn]
    over_flops = [
        each.line([flops for flops, _ in points], [bpc for _, bpc in points])
        for each in drawn
        if (points := by_arithmetic(each.run))
    ]
    flops = [x for line in over_flops for x in line.x]
    wide = bool(flops) and max(flops) > _WIDE * min(flops)
    title, x_label = "Bits per symbol over inference arithmetic", "FLOP per symbol, forward pass"
    return [
        *_chart("Bits per symbol over k", "active experts k", "bits per symbol", over_k, x_log=True),
        *_chart(title, x_label, "bits per symbol", over_flops, x_log=wide, x_base=10),
    ]


def _speed(drawn: Sequence[_Drawn]) -> list[Chart]:
    found = [(each, metric_series(each.run.lines, "tokens_per_second")) for each in drawn]
    lines = [each.line(points.x, points.mean) for each, points in found]
    return _chart("Symbols per second over steps", "step", "symbols per second, all ranks", lines, y_from=0)


def _chart(title: str, x_label: str, y_label: str, lines: Sequence[Line], **options: Any) -> list[Chart]:
    """Return a chart of the lines that have points; none without any."""
    shown = [line for line in lines if len(line.x)]
    return [Curve(title, x_label, y_label, shown, **options)] if shown else []


def _missing(labels: Sequence[str], runs: Sequence[RunData]) -> list[Table]:
    rows = [[label, ", ".join(run.missing)] for label, run in zip(labels, runs, strict=True) if run.missing]
    return [Table(["run", "not in its folder, or not whole"], rows, text_columns=2)] if rows else []
