"""The time section of a certificate's page: a model, and said to be one."""

from collections.abc import Sequence
from itertools import groupby

from foreroute.engine.certificate.counts.placement import Placement
from foreroute.engine.certificate.time.cluster import ClusterConfig
from foreroute.engine.certificate.time.forecast import ScalingPoint, StepsOfK, TimePart, worlds
from foreroute.launch.page import parts as page
from foreroute.launch.page.parts import Code, Curve, KeyFigure, Line, Table
from foreroute.launch.page.words import duration

_SHOWN = 5  # choices
_WORTH = 0.005  # share of the time that a faster layout saves, at least

_MODEL = (
    "A model, not a count: products, bytes and messages of a step over the rates of the cluster."
    " benchmarks/bench_certify.py measures its error on this software's own steps between CPUs; on the described"
    " cluster nobody has. Training steps alone: the start, validation and checkpoints are not in it."
)


def time_figure(found: TimePart) -> KeyFigure:
    """Return the number to see first."""
    whole = found.forecast
    note = f"on {found.cluster}, {whole.tokens_per_s:,.0f} tokens/s over all ranks"
    return KeyFigure("Time of the run (model)", duration(whole.run_s), note)


def layout_verdict(found: TimePart | None) -> KeyFigure:
    """Return whether another layout of the same run is faster, as far as that was modelled."""
    title = "Fastest layout (model)"
    if found is None:
        return KeyFigure(title, "unknown", "cluster=NAME models the time of this and of other layouts")
    best = next((choice for choice in found.choices if choice.own_tables), None)
    if best is None:
        return KeyFigure(title, "unknown", "search=false: no other layout was modelled")
    saved = 1 - best.step_s / _step_s(found)
    if saved < _WORTH:
        return KeyFigure(title, "this one", f"of {len(found.choices)} on {found.cluster}", good=True)
    return KeyFigure(title, "another", f"{saved:.0%} less time with {' '.join(best.overrides)}", good=False)


def _step_s(found: TimePart) -> float:
    return found.forecast.run_s / sum(part.steps for part in found.forecast.by_k)


def time_section(found: TimePart, cluster: ClusterConfig, placement: Placement) -> page.Section:
    """Describe the time part."""
    parts: list[page.Part] = [
        _MODEL,
        *(f"Not modelled: {line}." for line in found.left_out),
        _steps(found),
        *_exchanges(found),
        *_scaling(found, placement),
        *_choices(found, placement),
        _cluster(cluster),
    ]
    return page.Section(f"Time on {found.cluster}: a model", parts)


def _steps(found: TimePart) -> Table:
    parts = ["attention", "experts", "rest", "exchange", "gradients", "optimizer"]
    parts += ["tables"] if any(part.time.tables for part in found.forecast.by_k) else []
    header = ["k", "steps", *parts, "step", "hidden", "tokens/s"]
    rows = []
    for part in found.forecast.by_k:
        values = [*(getattr(part.time, name) for name in parts), part.step_s, part.time.hidden]
        cells = [f"{1e3 * value:,.2f}" for value in values]
        rows.append([str(part.k), f"{part.steps:,}", *cells, f"{part.tokens_per_s:,.0f}"])
    return Table(
        header,
        rows,
        caption="Milliseconds of a step of the slowest rank, from a few replayed steps of each k",
        notes=[
            "exchange: what nothing hides; hidden: what travels while experts compute, not part of the step",
            "gradients: summed over the ranks, and weights gathered (ZeRO)",
            *(["tables: rows of n-gram tables, sent, read and changed"] if "tables" in parts else []),
        ],
    )


def _exchanges(found: TimePart) -> list[page.Part]:
    """Describe where the exchange changes with k, as configured and as auto would choose on this cluster."""
    if {part.exchange for part in found.exchanges} == {"local"}:
        return ["Exchange: local, as an expert group is one rank; auto changes nothing."]
    kinds = {"as configured": found.exchanges, "auto, with the rates of this cluster": found.auto}
    return ["Exchange " + "; ".join(f"{name}: {_changes(parts)}" for name, parts in kinds.items()) + "."]


def _changes(parts: Sequence[StepsOfK]) -> str:
    first, *others = (next(group) for _, group in groupby(parts, lambda part: part.exchange))
    return ", ".join([first.exchange, *(f"{p.exchange} from step {p.first + 1:,} (k = {p.k})" for p in others)])


def _scaling(found: TimePart, placement: Placement) -> list[page.Part]:
    if not found.weak and not found.strong:
        return []
    both = {"weak": found.weak, "strong": found.strong}
    header = ["scaling", "ranks", "expert group", "streams", "step ms", "tokens/s", "efficiency"]
    rows: list[list[str]] = []
    for name, scales in both.items():
        rows += [[]] if rows and scales else []
        rows += [[name, *_scale(scale)] for scale in scales]
    table = Table(
        header,
        rows,
        caption="The same run on other numbers of ranks",
        notes=[
            "weak: every rank keeps the streams that it has in this run; strong: all ranks share this run's streams",
            "efficiency: tokens per second and rank, against the fewest ranks",
            *_not_scaled(found, placement),
        ],
    )
    lines = [
        Line(name, [s.ranks for s in scales], [s.tokens_per_s for s in scales])
        for name, scales in both.items()
        if len(scales) > 1
    ]
    if not lines:
        return [table]
    first = (found.weak or found.strong)[0]
    ideal = [first.ranks, max(s.ranks for s in [*found.weak, *found.strong])]
    each = first.tokens_per_s / first.ranks
    lines.append(Line("ideal", ideal, [each * ranks for ranks in ideal], dashed=True))
    curve = Curve("Scaling (model)", "ranks", "tokens per second, all ranks", lines, x_log=True, y_log=True)
    return [table, curve]


def _not_scaled(found: TimePart, placement: Placement) -> list[str]:
    """List the numbers of ranks that are missing."""
    missing = []
    for name, scales in (("weak", found.weak), ("strong", found.strong)):
        there = {scale.ranks for scale in scales}
        lacks = [f"{world:,}" for world in worlds(placement) if world not in there]
        missing += [f"{name} on {', '.join(lacks)} ranks"] if lacks else []
    why = "streams or expert groups cannot be shared out evenly, or the text is too short for so many streams"
    return [f"left out: {'; '.join(missing)}: {why}"] if missing else []


def _scale(scale: ScalingPoint) -> list[str]:
    return [
        f"{scale.ranks:,}",
        f"{scale.expert_ranks}",
        f"{scale.streams:,}",
        f"{1e3 * scale.step_s:,.2f}",
        f"{scale.tokens_per_s:,.0f}",
        f"{scale.efficiency:.1%}",
    ]


def _choices(found: TimePart, placement: Placement) -> list[page.Part]:
    if not found.choices:
        return []
    shown = list(found.choices[:_SHOWN])
    own = next((choice for choice in found.choices if choice.own_tables), None)
    if own is not None and own not in shown:
        shown.append(own)
    now = _step_s(found)
    rows = [
        [
            " ".join(choice.overrides),
            "" if choice.own_tables else "other",
            f"{1e3 * choice.step_s:,.2f}",
            f"{choice.step_s / now - 1:+.1%}",
        ]
        for choice in shown
    ]
    caption = (
        f"The fastest of {len(found.choices)} layouts on {placement.world_size} ranks: expert group, exchange, chunks,"
        " tables"
    )
    notes = [
        "other tables are other routes, and so another model: packed ones send less",
        "memory is not looked at: certify a layout to know whether it fits, without expert_group=, which overrides"
        " parallel.expert_ranks=",
    ]
    table = Table(["options", "tables", "step ms", "to this run"], rows, caption, text_columns=2, notes=notes)
    best = own or found.choices[0]
    return [table, "Options of the fastest layout with this run's tables:", Code(" ".join(best.overrides))]


def _cluster(cluster: ClusterConfig) -> Table:
    plain: dict[str, str] = {
        "ranks on": "CPUs" if cluster.host_copies else "GPUs",
        "ranks_per_node": str(cluster.ranks_per_node),
        "device_memory_gb": "-" if cluster.device_memory_gb is None else f"{cluster.device_memory_gb:g}",
        "memory_gb_per_s": f"{cluster.memory_gb_per_s:g}",
        "operation_us": f"{cluster.operation_us:g}",
    }
    for name in ("product_fp32", "product_bf16"):
        points = getattr(cluster, name)
        plain[name] = f"{points[0][1]:g} to {max(rate for _, rate in points):g} TFLOP/s"
    known = dict(cluster.sources)
    for level in ("inside", "between"):
        for figure in ("gb_per_s", "message_us"):
            plain[f"{level}.{figure}"] = f"{getattr(getattr(cluster, level), figure):g}"
            if level in known:  # the source of a whole link
                known[f"{level}.{figure}"] = known[level]
    known = {"ranks on": "", "ranks_per_node": "", **known}
    rows = [[name, value, known.get(name, "no source given")] for name, value in plain.items()]
    return Table(["figure", "value", "source"], rows, caption="The cluster", text_columns=3)
