"""Lays a certificate out as a page: what the run is, its key figures, the exact counts, and charts of them.

Everything here is exact and counted; what others add (memory, a model of the time) comes in as sections of their own.
"""

from collections.abc import Callable, Sequence

from foreroute.engine.certificate.counts.exact import Bytes, Certificate, Idle, StepStatistics, counted_kind
from foreroute.engine.certificate.counts.layout import Layout
from foreroute.engine.certificate.counts.series import MeanAndMax
from foreroute.engine.certificate.counts.table_rows import TableStatistics
from foreroute.engine.certificate.counts.tally import Spread
from foreroute.engine.certificate.counts.traffic import KINDS
from foreroute.engine.config import Split
from foreroute.engine.data.corpus import PreparedCorpus
from foreroute.launch.page import parts as page
from foreroute.launch.page.parts import Bar, Bars, Curve, KeyFigure, Line, Page, Table
from foreroute.launch.page.words import byte_text

_WORKED = (
    ("received by a rank", "received_rows"),
    ("computed by a rank", "computed_rows"),
    ("of an expert", "expert_rows"),
)


def certificate_page(
    found: Certificate,
    layout: Layout,
    corpus: PreparedCorpus,
    further: Sequence[page.Section] = (),
    figures: Sequence[KeyFigure] = (),
    verdicts: Sequence[KeyFigure] = (),
) -> Page:
    """Describe a certificate.

    Args:
        layout: of the run.
        further: sections that follow the counted ones.
        figures: key figures of theirs.
        verdicts: answers that stand on top.
    """
    parts = [*found.by_k, found.whole] if len(found.by_k) > 1 else found.by_k
    return Page(
        title=f"Certificate of {layout.config.train.name}",
        lead=_lead(found),
        figures=[*_figures(found), *figures],
        verdicts=verdicts,
        sections=[
            _run(found, layout, corpus),
            *([_rows(found, parts)] if found.layers else []),
            *([_bytes(found, parts)] if found.layers and not _alone(found) else []),
            *([] if found.tables is None else [_table_rows(found.tables)]),
            *([_fixed_shapes(found, parts)] if found.layers else []),
            *further,
        ],
        footer="Written by python -m launch.certify; certificate.json beside it holds every number and option.",
    )


def _lead(found: Certificate) -> str:
    text = (
        "What the run's steps compute and send, known before it starts: the routes follow from its text, its tables and"
        " the schedule of k alone, so they were replayed and counted. Counts are exact, whatever the machines' speed."
    )
    if found.sample > 1:
        text += (
            f" Counted: {found.whole.steps:,} of the first {found.steps:,} steps, one in {found.sample}; means, maxima,"
            " bounds and idle steps are of these alone."
        )
    return text


def counts_verdict(found: Certificate) -> KeyFigure:
    """Return whether every step was counted."""
    if found.sample > 1:
        return KeyFigure("Exact", f"1 step in {found.sample}", f"{found.whole.steps:,} of {found.steps:,} were counted")
    return KeyFigure("Exact", "yes", f"rows and bytes of all {found.steps:,} steps were counted", good=True)


def _alone(found: Certificate) -> bool:
    """Whether a rank has all experts, so that nothing moves and all ranks compute as many rows."""
    return found.placement.expert_ranks == 1


def _figures(found: Certificate) -> list[KeyFigure]:
    whole = found.whole
    if not found.layers:
        return _table_figures(found)
    idle_expert = KeyFigure(
        "Steps with an idle expert",
        f"{whole.idle_expert.steps:,}",
        f"of {whole.steps:,}: an expert gets no row in some layer and micro-batch",
    )
    if _alone(found):
        busiest = max(part.expert_rows.max / part.expert_rows.mean for part in found.by_k)
        note = f"in one layer and micro-batch; at most {busiest:.2f} x the mean of the same k"
        return [KeyFigure("Rows of the busiest expert", f"{whole.expert_rows.max:,}", note), idle_expert]
    kinds = " or ".join(sorted({part.exchange for part in found.by_k}))
    load = max(part.computed_rows.max / part.computed_rows.mean for part in found.by_k)
    of_k = "" if len(found.by_k) == 1 else " of the same k"
    rows = f"in one layer and micro-batch; at most {load:.2f} x the mean{of_k}"
    (mean, most), (far_mean, far_most) = (_used(found, values) for values in ("rank", "between"))
    sent = f"of a rank in a step; at most {byte_text(most)}, exchange {kinds}"
    far = f"of a rank in a step; at most {byte_text(far_most)}"
    idle = f"of {whole.steps:,}: a rank gets no row in some layer and micro-batch"
    padding = "of rows, if all steps sent equally many to each rank"
    return [
        KeyFigure("Rows of the busiest rank", f"{whole.computed_rows.max:,}", rows),
        KeyFigure("Bytes a rank sends", byte_text(mean), sent),
        KeyFigure("Bytes between nodes", byte_text(far_mean), far),
        KeyFigure("Steps with an idle rank", f"{whole.idle_rank.steps:,}", idle),
        idle_expert,
        KeyFigure("Padding of fixed shapes", f"{whole.static.pair_padding:.1%}", padding),
    ]


def _table_figures(found: Certificate) -> list[KeyFigure]:
    """Return the key figures of a dense run."""
    tables = found.tables
    assert tables is not None  # or there would be nothing to certify
    rows = f"distinct rows of a step, of all tables; at most {sum(table.landed.max for table in tables.tables):,}"
    read = KeyFigure("Rows a rank reads", f"{sum(table.landed.mean for table in tables.tables):,.0f}", rows)
    if found.placement.world_size == 1:
        return [read]
    sent = f"for n-gram tables, of a rank in a step; at most {byte_text(tables.rank.max)}"
    far = f"of a rank in a step; at most {byte_text(tables.between.max)}"
    return [
        read,
        KeyFigure("Bytes a rank sends", byte_text(tables.rank.mean), sent),
        KeyFigure("Bytes between nodes", byte_text(tables.between.mean), far),
    ]


def _used(found: Certificate, values: str) -> tuple[float, int]:
    """Return mean and maximum over steps and ranks of a field of Bytes, by the exchange of the run at each k."""
    total, most = 0.0, 0
    for part in found.by_k:
        spread: Spread = getattr(part.bytes[counted_kind(part.exchange)], values)
        total += spread.mean * part.steps
        most = max(most, spread.max)
    return total / found.whole.steps, most


def _run(found: Certificate, layout: Layout, corpus: PreparedCorpus) -> page.Section:
    place, config, moe = layout.placement, layout.config, layout.config.moe
    accumulation = config.train.accumulation
    micro = "1 micro-batch" if accumulation == 1 else f"{accumulation} micro-batches"
    nodes = "1 node" if place.group_nodes == 1 else f"{place.group_nodes} nodes"
    groups = "1 expert group" if place.groups == 1 else f"{place.groups} expert groups"
    k = [part.k for part in found.by_k]
    grown = f"k = {k[0]}" if len(k) == 1 else f"k from {k[0]} to {k[-1]}, {config.schedule.growth.name}"
    pack = f" in blocks of {moe.pack}" if moe.pack else ""
    source = f"{config.corpus.path} ({config.corpus.name.name})" if config.corpus.path else config.corpus.name.name
    symbols = len(corpus.split(Split.train))
    scope = "all counted" if found.sample == 1 else f"{found.whole.steps:,} of them counted, one in {found.sample}"
    kinds = {part.exchange for part in found.by_k}
    exchange = ", ".join(f"{part.exchange} at k = {part.k}" for part in found.by_k) if len(kinds) > 1 else kinds.pop()
    layers = f"{found.layers} layers" if found.layers else "dense layers"
    tables = "one for all layers" if moe.share_table else "one for each layer"
    experts = {
        "experts": f"{found.experts}, {found.experts // place.expert_ranks} on a rank; active for a token: {grown}",
        "exchange": f"{exchange}; {found.row_bytes:,} bytes a row; in a step and layer rows go to experts"
        f" {found.trips.to_experts} times and results come back {found.trips.to_tokens} times",
        "tables": f"{moe.ngram}-gram keys, {moe.rows:,} rows, builder {moe.builder.name}{pack}, {tables}",
    }
    rows = {
        "ranks": f"{place.world_size}, {min(place.ranks_per_node, place.world_size)} on a node, in {groups} of"
        f" {place.expert_ranks}, each on {nodes}",
        "a rank's share": f"{found.tokens:,} tokens in a micro-batch, {micro} in a step; {layers}",
        **(experts if found.layers else {}),
        "text": f"{source}: {symbols:,} symbols to train on, sha256 {corpus.sha256[:16]}...",
        "steps": f"the first {found.steps:,}, {scope}",
    }
    return page.Section("The run", [Table([], list(rows.items()), text_columns=2)])


def _rows(found: Certificate, parts: Sequence[StepStatistics]) -> page.Section:
    header = ["rows", "k", "steps", "mean", "p99", "max", "load", "worst step"]
    rows: list[list[str]] = []
    for what, name in _WORKED[2:] if _alone(found) else _WORKED:
        rows += [[]] if rows and len(parts) > 1 else []
        for part in parts:
            spread: Spread = getattr(part, name)
            load = f"{spread.max / spread.mean:.2f}"
            mean, p99, most, worst = _spread(spread, "{:,.0f}")
            rows.append([what, _k(part), f"{part.steps:,}", mean, p99, most, load, worst])
    notes = [
        "received: tokens that a rank gets by exchange=tokens, its own included, each once however many of its"
        " experts it uses. computed: rows that go through a rank's experts, k for each token.",
        "p99: 99 % of all values do not exceed it. load: max / mean. worst step: the first step with the maximum.",
    ]
    idle = [_idle_row("an expert gets no row", found.whole.idle_expert, found.whole.steps)]
    if _alone(found):
        del notes[0]
    else:
        idle.insert(0, _idle_row("a rank receives no row", found.whole.idle_rank, found.whole.steps))
    words = (
        "How many rows ranks and experts work on in one layer and micro-batch, over all layers, micro-batches, ranks"
        " (or experts of a group) and counted steps."
    )
    tables = [Table(header, rows, notes=notes), Table(["steps in which", "steps", "of", "first step"], idle)]
    return page.Section("Rows", [words, _load_over_steps(found), *tables])


def _idle_row(what: str, idle: Idle, steps: int) -> list[str]:
    first = "-" if idle.first_step is None else f"{idle.first_step:,}"
    return [what, f"{idle.steps:,}", f"{steps:,}", first]


def _bytes(found: Certificate, parts: Sequence[StepStatistics]) -> page.Section:
    header = ["exchange", "k", "mean", "p99", "max", "worst step", "mean in node", "mean between", "max between"]
    rows: list[list[str]] = []
    for kind in KINDS:
        rows += [[]] if rows and len(parts) > 1 else []
        for part in parts:
            sent = part.bytes[kind]
            mark = "*" if kind == part.exchange else ""
            near = [f"{value / 1e6:,.3f}" for value in (sent.inside.mean, sent.between.mean, sent.between.max)]
            rows.append([kind + mark, _k(part), *_spread(sent.rank, "{:,.3f}", 1e-6), *near])
    notes = [
        "* the exchange that the run uses. tokens: each token once to each rank that has one of its experts. gather:"
        " all tokens to all ranks, counted as if sent to each by itself; round a ring fewer cross between nodes."
        " two_level: each token once to each other node, and from there to that node's ranks; the engine does not run"
        " it, the count says what it would send."
    ]
    words = (
        "What leaves a rank in one step, in MB (1e6 bytes): rows of experts' inputs and results and of their gradients,"
        " all layers, micro-batches and directions added up. What data parallelism, checkpoints and planning send is"
        " not in it."
    )
    table = Table(header, rows, notes=notes)
    return page.Section("Bytes", [words, _bytes_over_k(found), _bytes_over_steps(found), table])


def _table_rows(tables: TableStatistics) -> page.Section:
    """Describe the rows of n-gram tables."""
    header = ["table at", "rows", "heads", "read: mean", "p99", "max", "worst step", "changed: mean", "max"]
    rows = []
    for table in tables.tables:
        changed = [f"{table.touched.mean:,.0f}", f"{table.touched.max:,}"]
        read = _spread(table.landed, "{:,.0f}")
        rows.append([table.place, f"{table.rows:,}", f"{table.heads}", *read, *changed])
    sent = [
        [what, *_spread(spread, "{:,.3f}", 1e-6)]
        for what, spread in (
            ("leaves a rank", tables.rank),
            ("of it to other nodes", tables.between),
            ("of it row numbers, between hosts", tables.ids),
            ("from one rank to another", tables.link),
        )
    ]
    return page.Section(
        "N-gram tables",
        [
            (
                "Distinct rows that a rank reads in one step, and rows of a rank that one step changes. Each travels"
                f" once from its owner to each rank that reads it, and its gradient back: {tables.row_bytes:,} bytes"
                f" each, of {tables.width} numbers."
            ),
            Table(header, rows),
            "Bytes of one step for n-gram tables, in MB (1e6 bytes); those of the experts are not among them.",
            Table(["bytes", "mean", "p99", "max", "worst step"], sent),
        ],
    )


def _fixed_shapes(found: Certificate, parts: Sequence[StepStatistics]) -> page.Section:
    columns: list[tuple[str, Callable[[StepStatistics], str]]] = [
        ("k", _k),
        ("rows from rank to rank", lambda part: f"{part.static.pair_rows:,}"),
        ("padding", lambda part: f"{part.static.pair_padding:.1%}"),
        ("rows of an expert", lambda part: f"{part.static.expert_rows:,}"),
        ("padding", lambda part: f"{part.static.expert_padding:.1%}"),
    ]
    if _alone(found):
        del columns[1:3]
    header = [name for name, _ in columns]
    rows = [[cell(part) for _, cell in columns] for part in parts]
    words = (
        "The fewest rows of a layer and micro-batch that would never overflow if all steps had the same shapes, and the"
        " share of such rows that would be padding. The run itself pads nothing."
    )
    return page.Section("Fixed shapes", [words, Table(header, rows)])


def _load_over_steps(found: Certificate) -> Curve:
    series = found.series
    lines = {"busiest expert": series.expert_load}
    if not _alone(found):
        ranks = {"busiest rank, received": series.received_load, "busiest rank, computed": series.computed_load}
        lines = ranks | lines
    return _over_steps(found, "Load over steps", "rows, maximum / mean", lines, y_from=1)


def _bytes_over_steps(found: Certificate) -> Curve:
    lines = {"busiest rank": found.series.busiest_rank_bytes, "mean rank": found.series.mean_rank_bytes}
    return _over_steps(found, "Bytes over steps", "MB that leave a rank in a step", lines, factor=1e-6, y_from=0)


def _over_steps(
    found: Certificate, title: str, y_label: str, series: dict[str, MeanAndMax], *, y_from: float, factor: float = 1
) -> Curve:
    """Draw means over steps, with a band up to the maximum where a point stands for several steps."""
    thinned = found.series.first_step != found.series.last_step
    lines = []
    for name, values in series.items():
        mean, most = ([factor * value for value in each] for each in (values.mean, values.max))
        lines.append(Line(name, found.series.first_step, mean, most if thinned else None))
    return Curve(title, "step", y_label, lines, y_from=y_from, band="up to the worst step nearby" if thinned else "")


def _bytes_over_k(found: Certificate) -> Bars:
    nodes = found.placement.group_nodes > 1

    def bar(kind: str) -> Bar:
        sent: list[Bytes] = [part.bytes[kind] for part in found.by_k]
        means = [[of.inside.mean / 1e6 for of in sent], [of.between.mean / 1e6 for of in sent]]
        return Bar(kind, means if nodes else means[:1], [of.rank.max / 1e6 for of in sent])

    return Bars(
        title="Bytes over k, by kind of exchange",
        x_label="active experts k",
        y_label="MB that leave a rank in a step",
        groups=[str(part.k) for part in found.by_k],
        bars=[bar(kind) for kind in KINDS],
        stack=["mean, inside the node", "mean, between nodes"] if nodes else ["mean"],
        mark="maximum of both" if nodes else "maximum",
    )


def _k(part: StepStatistics) -> str:
    return "all" if part.k is None else str(part.k)


def _spread(spread: Spread, form: str, factor: float = 1) -> list[str]:
    """Write mean, p99, max and worst step."""
    values = [form.format(factor * value) for value in (spread.mean, spread.p99, spread.max)]
    return [*values, f"{spread.worst_step:,}"]
