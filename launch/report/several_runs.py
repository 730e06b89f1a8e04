"""The report's page of several runs, or of a sweep: one table of all of them, and curves of the best six over each
other."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, nan

from foreroute.launch.page.parts import COLOURS, Chart, Curve, KeyFigure, Line, Page, Table
from foreroute.launch.page.words import count_text, duration
from foreroute.launch.report.charts import OVER, X_LABELS, section, text
from foreroute.launch.report.one_run import (
    LEAD,
    by_arithmetic,
    by_k,
    option_text,
    parameters_of,
    seconds_of,
    state_of,
    step_of,
    tokens_per_second_of,
)
from foreroute.launch.report.run_data import RunData, number, plain_dict, series

# options in which runs differ without being other experiments
_OWN = (
    "train.name",
    "train.runs_dir",
    "train.resume",
    "train.log_every",
    "train.threads",
    "train.valid_every",
    "train.save_every",
    "train.save_minutes",
    "train.keep",
    "data.prefetch",
    "corpus.cache_dir",
    "wandb.group",
)
_IN_A_NAME = 3  # options


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
    """Describe several runs; the best is on top and the first in every chart, in which a run keeps its colour."""
    runs = sorted(runs, key=lambda run: run.quality)
    differing = differing_options(runs)
    labels = labels_of(runs, differing)
    drawn = [_Drawn(hue, *of_run) for hue, of_run in enumerate(zip(labels, runs, strict=True))][:COLOURS]
    left_out = ""
    if len(runs) > COLOURS:
        left_out = f" Charts show the best {COLOURS} of {len(runs)}, the table all."
    states = [state_of(run) for run in runs] + [run.state for run in absent]
    counted = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return Page(
        title=title,
        lead=f"{len(states)} runs: {counted}.{left_out} {LEAD}",
        figures=_figures(runs[0], labels[0]) if runs else [],
        sections=[
            *section("Runs", *_words(runs), _table(runs, differing, absent)),
            *section("Quality", *(_quality(drawn, *which) for which in _QUALITY)),
            *section("Slimming", _slimming(drawn)),
            *section("Speed", _speed(drawn)),
            *section("Missing", _missing(labels, runs)),
        ],
        footer="Written by python -m launch.report from the files in the runs' folders.",
        contents=True,
    )


def differing_options(runs: Sequence[RunData]) -> list[str]:
    """Give the options that are not the same in all runs, as far as these are known."""
    known = [run.options for run in runs if run.options]
    names = dict.fromkeys(name for options in known for name in options)
    return [
        name for name in names if name not in _OWN and len({option_text(options.get(name)) for options in known}) > 1
    ]


def labels_of(runs: Sequence[RunData], differing: Sequence[str]) -> list[str]:
    """Number the runs, and name each by the options in which they differ if these are few and tell them apart, else by
    folder."""
    names = [run.name for run in runs]
    if len(set(names)) < len(runs):
        names = [str(run.folder) for run in runs]
    if 1 <= len(differing) <= _IN_A_NAME:
        last = [name.rpartition(".")[2] for name in differing]
        short = last if len(set(last)) == len(last) else differing
        found = [
            ", ".join(
                f"{word}={option_text(run.options.get(name))}" for word, name in zip(short, differing, strict=True)
            )
            for run in runs
        ]
        names = found if len(set(found)) == len(runs) else names
    return [f"{i}: {name}" for i, name in enumerate(names, 1)]


def _figures(best: RunData, label: str) -> list[KeyFigure]:
    quality = best.quality
    return [
        KeyFigure("Best bits per symbol", text(quality.bpc, "{:.3f}"), f"{label}: {quality.source}"),
        KeyFigure("Its symbols per second", text(tokens_per_second_of(best)), "of training, over all ranks; mean"),
        KeyFigure("Its training time", duration(seconds_of(best)), "of steps alone"),
    ]


def _words(runs: Sequence[RunData]) -> list[str]:
    texts = {str(run.summary["corpus_sha256"]) for run in runs if "corpus_sha256" in run.summary}
    cut = {option_text(run.options.get(name)) for run in runs if run.options for name in ("corpus.tokens",)}
    if len(texts) > 1 or len(cut) > 1:
        return [
            "These runs read different texts, or cut them into symbols differently: their bits per symbol are not"
            " comparable."
        ]
    return []


def _table(runs: Sequence[RunData], differing: Sequence[str], absent: Sequence[Absent]) -> list[Table]:
    ks = sorted({k for run in runs for k, _ in by_k(run)})
    few = len(differing) <= _IN_A_NAME  # many would push the results out of sight
    first, then = (differing, ()) if few else ((), differing)
    header = [
        "run",
        "state",
        *first,
        "bpc",
        "of",
        *(f"k = {k}" for k in ks),
        "symbols/s",
        "time",
        "FLOP",
        "parameters",
        "active",
        *then,
        "folder",
    ]
    rows = [[str(i), *_row(run, first, then, ks)] for i, run in enumerate(runs, 1)]
    rows += [["-", run.state, *["-"] * (len(header) - 3), run.name] for run in absent]
    notes = [
        "Runs have the same numbers in the charts. bpc: bits per symbol, the best that is known; k = 1 and so on: of"
        " the held-out split at that k. Runs without a held-out result come last. FLOP: of training, forward and"
        " backward, all ranks. active: parameters used at the last k."
    ]
    return [Table(header, rows, text_columns=2 + len(first), notes=notes)] if rows else []


def _row(run: RunData, first: Sequence[str], then: Sequence[str], ks: Sequence[int]) -> list[str]:
    found, state = dict(by_k(run)), state_of(run)

    def values(names: Sequence[str]) -> list[str]:
        return [option_text(run.options[name]) if name in run.options else "-" for name in names]

    return [
        state if state == "complete" else f"{state}, step {step_of(run):,}",
        *values(first),
        text(run.quality.bpc, "{:.3f}"),
        run.quality.source,
        *(text(found.get(k, nan), "{:.3f}") for k in ks),
        text(tokens_per_second_of(run)),
        duration(seconds_of(run)),
        count_text(run.last("flops")),
        count_text(parameters_of(run)),
        count_text(_active_parameters(run)),
        *values(then),
        run.name,
    ]


def _active_parameters(run: RunData) -> float:
    """Give the parameters that the run used at the last k that it logged."""
    active, k = plain_dict(run.facts.get("active_parameters")), run.last("k")
    return number(active.get("dense", active.get(f"{k:.0f}" if isfinite(k) else "")))


_QUALITY = (
    ("Training", "lines", "bpc", "tokens"),
    ("Validation", "valid", "valid_bpc", "tokens"),
    ("Training", "lines", "bpc", "flops"),
    ("Training", "lines", "bpc", "seconds"),
)


def _quality(drawn: Sequence[_Drawn], what: str, lines: str, name: str, x: str) -> list[Chart]:
    found = [(each, series(getattr(each.run, lines), name, x)) for each in drawn]
    title = f"{what}: bits per symbol over {OVER[x]}"
    return _chart(title, X_LABELS[x], "bits per symbol", [each.line(points.x, points.mean) for each, points in found])


def _slimming(drawn: Sequence[_Drawn]) -> list[Chart]:
    over_k = [each.line([float(k) for k, _ in by_k(each.run)], [bpc for _, bpc in by_k(each.run)]) for each in drawn]
    over_flops = [
        each.line([flops for flops, _ in points], [bpc for _, bpc in points])
        for each in drawn
        if (points := by_arithmetic(each.run))
    ]
    return [
        *_chart("Bits per symbol over k", "active experts k", "bits per symbol", over_k, x_log=True),
        *_chart(
            "Bits per symbol over inference arithmetic", "FLOP per symbol, forward pass", "bits per symbol", over_flops
        ),
    ]


def _speed(drawn: Sequence[_Drawn]) -> list[Chart]:
    found = [(each, series(each.run.lines, "tokens_per_second")) for each in drawn]
    lines = [each.line(points.x, points.mean) for each, points in found]
    return _chart("Symbols per second over steps", "step", "symbols per second, all ranks", lines, y_from=0)


def _chart(
    title: str, x_label: str, y_label: str, lines: Sequence[Line], *, x_log: bool = False, y_from: float | None = None
) -> list[Chart]:
    """Give a chart of the lines that have points; none without any."""
    shown = [line for line in lines if len(line.x)]
    return [Curve(title, x_label, y_label, shown, x_log=x_log, y_from=y_from)] if shown else []


def _missing(labels: Sequence[str], runs: Sequence[RunData]) -> list[Table]:
    rows = [[label, ", ".join(run.missing)] for label, run in zip(labels, runs, strict=True) if run.missing]
    return [Table(["run", "not in its folder, or not whole"], rows, text_columns=2)] if rows else []
