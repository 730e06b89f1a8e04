"""The exact part of a certificate: rows and bytes of a run's steps, summed up for each k and for all.

Counts are exact, whatever the ranks' speed: no model of time is in them. Bytes are of rows of experts' inputs and
results and of their gradients, and apart from them those of n-gram tables; what data parallelism, checkpoints and
planning send is not in them.

Letters: as in engine/certificate/counts/replay.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from foreroute.engine.certificate.counts.layout import Layout, Trips
from foreroute.engine.certificate.counts.placement import Placement
from foreroute.engine.certificate.counts.replay import Counts, StepCounts, replay
from foreroute.engine.certificate.counts.series import SeriesCollector, StepSeries
from foreroute.engine.certificate.counts.table_rows import RowCounter, TableCounts, TableStatistics, TableTally
from foreroute.engine.certificate.counts.tally import Spread, Tally
from foreroute.engine.certificate.counts.traffic import KINDS, hops, leaving
from foreroute.engine.data.documents import NO_STARTS, Starts
from foreroute.engine.data.tokens.vocab import Ids
from foreroute.engine.routing.planned_router import PlannedRouter
from foreroute.engine.routing.plans.row_plan import TableKeys


@dataclass(frozen=True, slots=True)
class Idle:
    """Steps in which a rank, or an expert, gets no row in some layer, micro-batch and expert group."""

    steps: int
    first_step: int | None  # counted from 1


@dataclass(frozen=True, slots=True)
class Static:
    """Shapes that never overflow, and the share of their rows that would be padding."""

    pair_rows: int  # that one rank sends another, as an even all-to-all needs it: the received rows are P times as many
    pair_padding: float
    expert_rows: int  # of one expert
    expert_padding: float


@dataclass(frozen=True, slots=True)
class Bytes:
    """Bytes that one kind of exchange sends; spreads are over ranks and steps, all layers and directions together."""

    rank: Spread  # leaves a rank in a step
    inside: Spread  # of it to ranks of the same node
    between: Spread  # of it to other nodes
    total: int  # of all ranks in all counted steps


@dataclass(frozen=True, slots=True)
class StepStatistics:
    """Steps at one k, or all of them."""

    k: int | None  # None: all
    steps: int  # counted
    exchange: str  # that the run uses: tokens, gather, local (one rank: nothing moves), or mixed
    received_rows: (
        Spread  # over layers, micro-batches and ranks: rows that a rank receives by `tokens`, its own included
    )
    computed_rows: Spread  # over the same: expert rows that a rank computes
    received_layers: Spread  # over micro-batches and ranks: received_rows, all layers added up
    computed_layers: Spread  # over the same: computed_rows
    expert_rows: Spread  # over layers, micro-batches and experts of a group: rows of an expert
    idle_rank: Idle
    idle_expert: Idle
    static: Static
    bytes: dict[str, Bytes]  # by kind of exchange (engine/certificate/counts/traffic.py)


@dataclass(frozen=True, slots=True)
class Certificate:
    """Rows and bytes of the steps of a run."""

    placement: Placement
    steps: int  # the first so many of the run
    sample: int  # every so manieth of them was counted; 1: all
    layers: int  # with experts; 0 in a dense run, whose rows are those of n-gram tables alone
    experts: int  # of the layer that has the most
    tokens: int  # of a rank in a micro-batch
    row_bytes: int  # of one row on the wire
    trips: Trips  # of a layer's rows in one micro-batch
    whole: StepStatistics
    by_k: list[StepStatistics]
    series: StepSeries  # over the counted steps
    tables: TableStatistics | None = None  # None: there are no n-gram tables


def certify(
    layout: Layout,
    ids: Ids,
    routers: Sequence[PlannedRouter],
    *,
    document_starts: Starts = NO_STARTS,
    steps: int | None = None,
    sample: int = 1,
    table_keys: Sequence[TableKeys] = (),
    also: Callable[[StepCounts, TableCounts | None], None] | None = None,
) -> Certificate:
    """Count what a run does on its ranks; a pure function of its arguments.

    Args:
        ids: the training split.
        routers: of the run, one for each layer or one for all; none in a dense run.
        document_starts: of the training split.
        steps: count the first so many; None for train.steps.
        sample: count every so manieth only; maxima and bounds then hold for those steps alone.
        table_keys: of the run's n-gram tables.
        also: called with the counts of each step, such as Record.add (engine/certificate/record.py).

    Raises:
        UserError: the run cannot be laid out on these ranks, its routes are not known beforehand, or steps or sample is
            out of range.
    """
    chosen = layout.counted_steps(steps, sample)
    layout.check()
    sums: dict[int, _Sums] = {}
    exchange: dict[int, str] = {}
    series = SeriesCollector()
    counter = RowCounter(layout, table_keys, layout.read(ids, document_starts))
    tally, rows = TableTally(layout, table_keys), None
    for counts in replay(layout, ids, routers, chosen, document_starts):
        k, left = counts.k, bytes_left(layout, counts)
        if k not in sums:
            sums[k], exchange[k] = _Sums(), layout.exchange(k)
        sums[k].add(counts, left)
        series.add(counts, left[counted_kind(exchange[k])].all_gP)
        if table_keys:
            rows = counter.count(counts.step)
            tally.add(rows, counts.step, counts.times)
        if also is not None:
            also(counts, rows)
    mixed = exchange[min(sums)] if len(set(exchange.values())) == 1 else "mixed"
    return Certificate(
        placement=layout.placement,
        steps=chosen.stop,
        sample=sample,
        layers=layout.expert_layers,
        experts=max(layout.experts_y, default=0),
        tokens=layout.tokens,
        row_bytes=layout.row_bytes,
        trips=layout.trips,
        whole=_statistics(None, mixed, list(sums.values())),
        by_k=[_statistics(k, exchange[k], [found]) for k, found in sorted(sums.items())],
        series=series.series(),
        tables=tally.statistics() if table_keys else None,
    )


def counted_kind(exchange: str) -> str:
    """Return the kind of exchange by which the bytes of a run's exchange at one k are counted."""
    return "tokens" if exchange == "local" else exchange  # local: nothing moves by any kind


@dataclass(frozen=True, slots=True)
class _Left:
    """Bytes that leave each rank in a step; layers and micro-batches added up."""

    all_gP: Counts
    inside_gP: Counts  # to ranks of the same node


def bytes_left(layout: Layout, counts: StepCounts) -> dict[str, _Left]:
    """Count what leaves the ranks in a step by each kind of exchange."""
    near_PP = layout.placement.same_node_PP
    found = {}
    for kind in KINDS:
        hops_ymgPP = hops(counts, kind, layout.placement, layout.tokens)
        all_gP, inside_gP = (
            leaving(hops_ymgPP, layout.layer_trips, near).sum(axis=(0, 1)) * layout.row_bytes
            for near in (None, near_PP)
        )
        found[kind] = _Left(all_gP, inside_gP)
    return found


@dataclass(slots=True)
class _Sums:
    """Counts of the steps of one k."""

    steps: int = 0
    tallies: dict[str, Tally] = field(default_factory=dict)
    idle: dict[str, Idle] = field(default_factory=dict)

    def add(self, counts: StepCounts, left: Mapping[str, _Left]) -> None:
        """Take in a step, with what leaves the ranks in it by each kind of exchange."""
        self.steps += counts.times
        rows = {
            "received": counts.received_ymgP,
            "computed": counts.computed_ymgP,
            "expert": counts.experts,
            "pair": counts.sent_ymgPP,
        }
        for name in ("received", "computed"):
            rows[f"{name} layers"] = rows[name].sum(axis=0)
        for name, values in rows.items():
            self._tally(name).add(values, counts.step, counts.times)
        for name in ("received", "expert"):
            before = self.idle.get(name, Idle(0, None))
            if rows[name].size and rows[name].min() == 0:
                first = counts.step + 1 if before.first_step is None else before.first_step
                before = Idle(before.steps + counts.times, first)
            self.idle[name] = before
        for kind, sent in left.items():
            parts = {"": sent.all_gP, " inside": sent.inside_gP, " between": sent.all_gP - sent.inside_gP}
            for name, bytes_gP in parts.items():
                self._tally(kind + name).add(bytes_gP, counts.step, counts.times)

    def _tally(self, name: str) -> Tally:
        return self.tallies.setdefault(name, Tally())


def _statistics(k: int | None, exchange: str, sums: Sequence[_Sums]) -> StepStatistics:
    """Sum up one k, or several."""
    names = sums[0].tallies
    spreads = {name: Tally.spread([part.tallies[name] for part in sums]) for name in names}
    return StepStatistics(
        k=k,
        steps=sum(part.steps for part in sums),
        exchange=exchange,
        received_rows=spreads["received"],
        computed_rows=spreads["computed"],
        received_layers=spreads["received layers"],
        computed_layers=spreads["computed layers"],
        expert_rows=spreads["expert"],
        idle_rank=_idle([part.idle["received"] for part in sums]),
        idle_expert=_idle([part.idle["expert"] for part in sums]),
        static=Static(
            pair_rows=spreads["pair"].max,
            pair_padding=_padding(spreads["pair"]),
            expert_rows=spreads["expert"].max,
            expert_padding=_padding(spreads["expert"]),
        ),
        bytes={
            kind: Bytes(
                rank=spreads[kind],
                inside=spreads[f"{kind} inside"],
                between=spreads[f"{kind} between"],
                total=Tally.total([part.tallies[kind] for part in sums]),
            )
            for kind in KINDS
        },
    )


def _padding(rows: Spread) -> float:
    """Return the share of padding if every place had as many rows as the one with the most."""
    return 1 - rows.mean / rows.max if rows.max else 0.0


def _idle(parts: Sequence[Idle]) -> Idle:
    first = [part.first_step for part in parts if part.first_step is not None]
    return Idle(sum(part.steps for part in parts), min(first, default=None))
