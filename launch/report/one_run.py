"""The report's page of one run: its quality at each k, its training, its health, and its options.

launch/report/steps.py has the sections about the inside of a step (experts, time, exchange).
"""

from dataclasses import replace
from math import isfinite
from typing import Any

from foreroute.engine.config import Config, to_plain
from foreroute.engine.config.option import by_full_name
from foreroute.launch.page.parts import Chart, Curve, KeyFigure, Line, Page, Section, Table
from foreroute.launch.page.words import byte_text, count_text, duration
from foreroute.launch.report.charts import QUALITY_OVER, X_LABELS, curve, line_of, section, text
from foreroute.launch.report.run_data import POINTS, RunData, metric_series, number, plain_dict
from foreroute.launch.report.steps import exchange, experts, time
from foreroute.launch.runs.folder import MEASURED, OF_MACHINE
from foreroute.launch.runs.plots import BASELINES
from foreroute.launch.start.help import value_text

LEAD = (
    "Drag in a chart to zoom, double-click to go back. Press a name above a chart to hide its line. A table beneath "
    "each chart has its numbers; of long lines it has some."
)
_STATES = {
    "running": "or killed: the files cannot tell",
    "stopped": "by a signal; train.resume=true continues",
    "failed": "its terminal output has the reason",
    "complete": "",
}
HIDDEN = {*OF_MACHINE, "kernels.backend"}
"""Options that say where the steps are computed; the backend that a run writes follows from its device."""


def run_page(run: RunData) -> Page:
    """Describe one run."""
    steps = steps_of(run)
    of = f" of {steps:,.0f}" if isfinite(steps) else ""
    return Page(
        title=f"Run {run.name}",
        lead=f"State: {state_of(run)}, after step {step_of(run):,}{of}. {LEAD}",
        figures=_figures(run),
        sections=[
            *_slimming(run),
            *_quality(run),
            *experts(run),
            *time(run),
            *exchange(run),
            *_health(run),
            *section("The run", _missing(run), _facts(run), _changed_options(run)),
        ],
        footer="Written by python -m launch.report from the files in the run's folder.",
    )


def state_of(run: RunData) -> str:
    """Return the run's state as one word."""
    return str(run.state.get("state", "unknown"))


def step_of(run: RunData) -> int:
    """Return the number of steps that the run is known to have finished."""
    logged = int(run.lines[-1]["step"]) if run.lines else 0
    recorded = number(run.state.get("step"))
    return max(logged, int(recorded) if isfinite(recorded) else 0)


def steps_of(run: RunData) -> float:
    """Return the number of steps that the run was asked for; nan if unknown."""
    return number(run.facts.get("steps", run.options.get("train.steps")))


def parameters_of(run: RunData) -> float:
    """Return the number of the model's parameters; nan if unknown."""
    return number(run.facts.get("parameters", run.summary.get("parameters")))


def tokens_per_second_of(run: RunData) -> float:
    """Return the mean speed over all ranks; nan if unknown."""
    seconds = run.last("seconds")
    return run.last("tokens") / seconds if seconds > 0 else run.mean("tokens_per_second")


def memory_peak(run: RunData) -> float:
    """Return the largest memory in bytes that rank 0's process is known to have used; nan if unknown."""
    known = [run.most("peak_memory_bytes"), number(run.summary.get("peak_memory_bytes"))]
    return max((value for value in known if isfinite(value)), default=float("nan"))


def by_arithmetic(run: RunData) -> list[tuple[float, float]]:
    """Return pairs of FLOP per symbol (forward pass) and held-out bpc, ascending, for each k (or dense) of which both
    are known."""
    flops = plain_dict(run.facts.get("flops_per_symbol"))
    found = [(number(flops.get(k)), bpc) for k, bpc in run.bpc_by_k.items()]
    return sorted(point for point in found if isfinite(point[0]))


def by_k(run: RunData) -> list[tuple[int, float]]:
    """Return pairs of k and held-out bpc, ascending in k; empty for a dense run or before the end."""
    return sorted((int(k), bpc) for k, bpc in run.bpc_by_k.items() if k.isdigit())


def _figures(run: RunData) -> list[KeyFigure]:
    quality = run.quality
    state = state_of(run)
    steps = f"after step {step_of(run):,} of {text(steps_of(run))}"
    note = _STATES.get(state, "")
    flops, mfu, wire = run.last("flops"), run.mean("mfu"), run.mean("wire_bytes")
    device = run.most("peak_device_memory_bytes")
    k = run.last("k")
    found = [
        KeyFigure("State", state, f"{steps}; {note}" if note else steps),
        KeyFigure("Bits per symbol", text(quality.bpc, "{:.3f}"), quality.source),
        KeyFigure("Symbols per second", text(tokens_per_second_of(run)), "of training, over all ranks; mean"),
        KeyFigure("Training time", duration(run.last("seconds")), "of steps alone"),
    ]
    if isfinite(k) and run.options.get("moe.router") != "dense":
        note = f"of {run.options.get('moe.experts', '?')}, in the last step logged"
        found.append(KeyFigure("Active experts k", f"{k:.0f}", note))
    if isfinite(flops):
        note = "forward and backward, all ranks; recomputation not counted"
        found.append(KeyFigure("Training arithmetic", f"{count_text(flops)}FLOP", note))
    if mfu > 0:
        found.append(KeyFigure("Model FLOPs utilisation", f"{mfu:.1%}", str(run.facts.get("peak_source", ""))))
    if device > 0:
        found.append(KeyFigure("Peak device memory", byte_text(device), "of rank 0"))
    if isfinite(memory_peak(run)):
        found.append(KeyFigure("Peak memory", byte_text(memory_peak(run)), "of rank 0's process"))
    if wire > 0:
        found.append(KeyFigure("Bytes on the wire", byte_text(wire), "of a step, all ranks, mean of the logged"))
    return found


def _quality(run: RunData) -> list[Section]:
    """Make one chart of all bits per symbol that are known; the reader chooses the quantity of the x axis."""
    charts: list[Chart] = [
        Curve("Bits per symbol", X_LABELS[x], "bits per symbol", lines, choice=choice)
        for x, choice in QUALITY_OVER.items()
        if (lines := _quality_lines(run, x))
    ]
    k = curve(run, "Active experts over steps", "active experts k", {"k": "k"}, y_from=0)
    varies = len({number(line.get("k")) for line in run.lines}) > 1
    each = -(-len(run.lines) // POINTS)
    note = f"Each point of the training line is the mean of {each} lines of metrics.jsonl." if each > 1 else ""
    missing = (
        "Not over training arithmetic: the run did not log it." if charts and not isfinite(run.last("flops")) else ""
    )
    return section("Quality", note, missing, charts, k if varies else [])


def _quality_lines(run: RunData, x: str) -> list[Line]:
    lines = [
        line_of("training", metric_series(run.lines, "bpc", x)),
        line_of("validation", metric_series(run.valid, "valid_bpc", x)),
    ]
    if run.bpc_by_k and isfinite(run.last(x)):
        lines.append(Line(run.quality.source, [run.last(x)], [run.quality.bpc]))
    return [replace(line, hue=hue) for hue, line in enumerate(lines) if line.x]


def _slimming(run: RunData) -> list[Section]:
    if not run.bpc_by_k:
        return []
    charts: list[Chart] = []
    points, arithmetic = by_k(run), by_arithmetic(run)
    baselines = {label: number(run.summary.get(name)) for label, name in BASELINES.items()}
    if points:
        k = [float(k) for k, _ in points]
        lines = [Line("model", k, [bpc for _, bpc in points]), *_levels(baselines, k[0], k[-1])]
        charts.append(Curve("Bits per symbol over k", "active experts k", "bits per symbol", lines, x_log=True))
    if len(arithmetic) > 1:
        flops = [flops for flops, _ in arithmetic]
        lines = [Line("model", flops, [bpc for _, bpc in arithmetic]), *_levels(baselines, flops[0], flops[-1])]
        x_label = "FLOP per symbol, forward pass"
        charts.append(Curve("Bits per symbol over inference arithmetic", x_label, "bits per symbol", lines))
    symbols = number(run.summary.get("symbols"))
    words = (
        f"Held-out {run.summary.get('split', '')} split, {text(symbols)} symbols. Every k is the same trained model."
        " Order 2, order 3 and bzip2 are baselines without a network: they count the same text."
    )
    return section("Slimming", words, charts, _slimming_table(run, baselines))


def _levels(baselines: dict[str, float], first: float, last: float) -> list[Line]:
    return [Line(label, [first, last], [bpc, bpc], dashed=True) for label, bpc in baselines.items() if isfinite(bpc)]


def _slimming_table(run: RunData, baselines: dict[str, float]) -> Table:
    best = min(run.bpc_by_k.values())
    active, flops = (plain_dict(run.facts.get(name)) for name in ("active_parameters", "flops_per_symbol"))
    by_byte = plain_dict(run.summary.get("bits_per_byte"))
    others = by_byte != run.bpc_by_k and any(isfinite(number(bits)) for bits in by_byte.values())

    def row(label: str, bpc: float, k: str = "") -> list[str]:
        costs = [count_text(number(costs.get(k))) for costs in (active, flops)]
        bits = [text(number(by_byte.get(k)), "{:.4f}")] if others else []
        return [label, f"{bpc:.4f}", f"{100 * (bpc / best - 1):+.1f}%", *bits, *costs]

    rows = [row(k if k == "dense" else f"k = {k}", bpc, k) for k, bpc in run.bpc_by_k.items()]
    rows += [[], *(row(label, bpc) for label, bpc in baselines.items() if isfinite(bpc))]
    heads = ["", "bpc", "to best", *(["bits per byte"] if others else []), "active parameters", "FLOP per symbol"]
    return Table(heads, rows)


def _health(run: RunData) -> list[Section]:
    memory = {
        "process": "memory_bytes",
        "process, peak": "peak_memory_bytes",
        "device": "device_memory_bytes",
        "device, peak": "peak_device_memory_bytes",
    }
    norm, skew = {"gradient norm": "grad_norm"}, {"skew": "rank_skew"}
    slowest = curve(run, "Slowest rank over the median", "own time, slowest / median", skew, upper=True)
    return section(
        "Health",
        curve(run, "Gradient norm", "global norm before clipping", norm, upper=True, y_log=True),
        curve(run, "Auxiliary loss", "nats per symbol", {"balance and z-loss": "auxiliary_loss"}),
        curve(run, "Learning rate", "learning rate", {"learning rate": "learning_rate"}, y_from=0),
        curve(run, "Memory of rank 0", "GB (1e9 bytes)", memory, factor=1e-9, y_from=0),
        slowest if run.most("rank_skew") > 1 else [],
    )


def _missing(run: RunData) -> str:
    """Name the files and metrics that the run's folder lacks."""
    absent = [name for name in ("flops", "layer_load", "rank_own_ms") if run.lines and name not in run.lines[-1]]
    words = [*run.missing, *(f"the metric {name}" for name in absent)]
    if not words:
        return ""
    return f"Missing in this folder, because the run has not ended or is of an earlier version: {', '.join(words)}."


def _facts(run: RunData) -> Table:
    facts, options = run.facts, run.options
    corpus, code, versions = (plain_dict(facts.get(name)) for name in ("corpus", "code", "versions"))
    parameters = parameters_of(run)
    sha256 = str(corpus.get("sha256", run.summary.get("corpus_sha256", "")))[:16]
    commit = str(code.get("commit") or "")[:12] + (", with changes" if code.get("changed") else "")
    nodes, started = number(facts.get("nodes")), facts.get("started")
    ranks = f"{facts['ranks']}, expert groups of {facts.get('expert_ranks', '?')}" if "ranks" in facts else ""
    first, num_experts = number(options.get(MEASURED)), number(options.get("moe.experts"))
    name = corpus.get("name", options.get("corpus.name", ""))
    known = {
        "router": facts.get("router", options.get("moe.router")),
        "parameters": text(parameters) if isfinite(parameters) else "",
        "ranks": f"{ranks}, on {nodes:.0f} node{'s' if nodes > 1 else ''}" if ranks and isfinite(nodes) else ranks,
        "device": facts.get("device"),
        "measured at the start": f"masked products from k = {first:.0f} on" if first <= num_experts else "",
        "text": f"{name}, sha256 {sha256}..." if sha256 else options.get("corpus.name"),
        "version": code.get("version"),
        "commit": commit,
        "libraries": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "started": ", ".join(map(str, started)) if isinstance(started, list) else "",
        "folder": run.folder,
    }
    rows = [[name, str(value)] for name, value in known.items() if value]
    return Table([], rows, text_columns=2)


def changed_options(run: RunData) -> dict[str, tuple[Any, Any]]:
    """Return the options of the experiment that differ from the defaults, as pairs of the run's value and the default;
    the default is None for an option that does not exist."""
    defaults = by_full_name(to_plain(Config()))
    return {
        name: (value, defaults.get(name))
        for name, value in run.options.items()
        if name not in HIDDEN and (name not in defaults or value != defaults[name])
    }


def _changed_options(run: RunData) -> list[Table]:
    rows = [[name, value_text(value), value_text(default)] for name, (value, default) in changed_options(run).items()]
    caption = "Options that differ from the defaults"
    return [Table(["option", "this run", "default"], rows, caption, text_columns=3)] if rows else []
