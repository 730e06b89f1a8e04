"""The time part of a certificate: steps of a run on a cluster, how it scales, and the best way to lay it out.

All of it is a model (engine/certificate/time/step_time.py) of exact counts. The counts are of a few steps of each k and
of one expert group, the first ranks. Its ranks have as many and as long streams as any rank of the run.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields, replace
from functools import cache
from itertools import groupby, product
from typing import Any, NamedTuple

from foreroute.engine.certificate.counts.layout import Layout
from foreroute.engine.certificate.counts.placement import Placement
from foreroute.engine.certificate.counts.replay import StepCounts, replay
from foreroute.engine.certificate.counts.table_rows import RowCounter
from foreroute.engine.certificate.time.cluster import ClusterConfig
from foreroute.engine.certificate.time.left_out import left_out
from foreroute.engine.certificate.time.step_time import StepModel, StepTime
from foreroute.engine.config import MoEConfig, ScheduleConfig
from foreroute.engine.config.enums import Builder, ExchangeKind
from foreroute.engine.data.documents import NO_STARTS, Starts
from foreroute.engine.data.tokens.vocab import Ids
from foreroute.engine.errors import UserError
from foreroute.engine.model.adaptive import clusters, target_shares
from foreroute.engine.ngram_tables.tables import table_keys
from foreroute.engine.routing.k_schedule import active_experts
from foreroute.engine.routing.methods import planned_method
from foreroute.engine.routing.planned_router import PlannedRouter

SAMPLED = 2  # steps of each k
MOST_RANKS = 1024  # to which scaling is modelled
CHUNKS = 1, 2, 4


@dataclass(frozen=True, slots=True)
class StepsOfK:
    """The steps of a run with one k."""

    k: int
    first: int  # counted from 0
    steps: int
    exchange: str  # tokens, gather or local


@dataclass(frozen=True, slots=True)
class TimeOfK:
    """A step at one k."""

    k: int
    steps: int
    exchange: str
    time: StepTime
    step_s: float
    tokens_per_s: float  # of all ranks


@dataclass(frozen=True, slots=True)
class Forecast:
    """A run on a cluster."""

    by_k: list[TimeOfK]
    run_s: float
    tokens_per_s: float  # of all ranks, over the whole run


@dataclass(frozen=True, slots=True)
class ScalingPoint:
    """A run on another number of ranks."""

    ranks: int
    expert_ranks: int
    streams: int  # of all ranks
    step_s: float  # mean over the run
    tokens_per_s: float
    efficiency: float  # tokens per second and rank, against the fewest ranks


@dataclass(frozen=True, slots=True)
class LayoutChoice:
    """A way to lay the run out on its ranks."""

    overrides: list[str]  # of the command line
    step_s: float  # mean over the run
    own_tables: bool  # routes, and so the model that is trained, stay as they are


@dataclass(frozen=True, slots=True)
class TimePart:
    """The time part of a certificate; a model."""

    cluster: str
    ranks_per_node: int
    forecast: Forecast
    exchanges: list[StepsOfK]  # as the run is configured
    auto: list[StepsOfK]  # as exchange=auto chooses with the cluster's rates
    weak: list[ScalingPoint]  # streams of a rank stay
    strong: list[ScalingPoint]  # streams of all ranks stay
    choices: list[LayoutChoice]  # fastest first; empty without a search
    left_out: list[str]  # what this run does and the model leaves out


class _Counted(NamedTuple):
    """One step of one expert group."""

    counts: StepCounts
    landed: list[float]  # of each n-gram table, the distinct rows that a rank reads, on the mean


class Forecaster:
    """Models layouts of one run on one cluster."""

    def __init__(
        self,
        layout: Layout,
        cluster: ClusterConfig,
        ids: Ids,
        vocab: int,
        routers_of: Callable[[MoEConfig], Sequence[PlannedRouter]],
        document_starts: Starts = NO_STARTS,
    ) -> None:
        """Take the run.

        Args:
            layout: the run on its own ranks.
            ids: the training split.
            routers_of: builds the run's routers with other options.
            document_starts: of the training split.
        """
        self.layout, self.cluster, self.ids, self.vocab = layout, cluster, ids, vocab
        self._shares = target_shares(ids, clusters(layout.config.model, vocab))
        self._routers_of, self._document_starts = routers_of, document_starts
        self._table_keys = table_keys(layout.config.ngram_tables, vocab, layout.config.train.seed)
        self._counts: dict[object, list[_Counted]] = {}

    def forecast(self, layout: Layout) -> Forecast:
        """Model all steps of a layout.

        Args:
            layout: the run with other data.streams, moe.builder, moe.pack or parallel, on its own or other ranks.
        """
        counts = self._count(layout)
        model = StepModel(layout, self.cluster, self.vocab, self._shares)
        by_k, total = [], 0.0
        symbols = layout.config.symbols_per_step
        for part in steps_of_k(layout):
            time = StepTime.mean([model.time(step, landed) for step, landed in counts if step.k == part.k])
            total += part.steps * time.total
            by_k.append(TimeOfK(part.k, part.steps, part.exchange, time, time.total, symbols / time.total))
        return Forecast(by_k, total, symbols * layout.config.train.steps / total)

    def weak(self) -> list[ScalingPoint]:
        """Model more and fewer ranks with the streams of a rank as they are."""
        streams = self.layout.config.data.streams // self.layout.placement.world_size
        return self._scale(lambda world: streams * world)

    def strong(self) -> list[ScalingPoint]:
        """Model more and fewer ranks with all streams as they are, as far as they can be shared out."""
        return self._scale(lambda world: self.layout.config.data.streams)

    def choices(self) -> list[LayoutChoice]:
        """Model every expert group, exchange, number of chunks and kind of table on the ranks, fastest first."""
        found, run = [], self.layout.config
        for layout in self._candidates():
            step_s = self.forecast(layout).run_s / run.train.steps
            found.append(LayoutChoice(_overrides(self.layout, layout), step_s, layout.config.moe == run.moe))
        return sorted(found, key=lambda choice: choice.step_s)

    def automatic(self) -> Layout:
        """Return the run with exchange=auto and the cluster's rates."""
        return with_rates(self.layout, self.cluster)

    def _scale(self, streams_of: Callable[[int], int]) -> list[ScalingPoint]:
        config, placement = self.layout.config, self.layout.placement
        found: list[ScalingPoint] = []
        for world in worlds(placement):
            ranks = min(placement.expert_ranks, world)
            streams = streams_of(world)
            if streams % (world * config.train.accumulation):
                continue
            try:
                here = Placement(world, ranks, placement.ranks_per_node)
                result = self.forecast(Layout(replace(config, data=replace(config.data, streams=streams)), here))
            except UserError:  # not that many experts for a group, or too little text for that many streams
                continue
            each = result.tokens_per_s / world
            first = each if not found else found[0].tokens_per_s / found[0].ranks
            step_s = result.run_s / config.train.steps
            found.append(ScalingPoint(world, ranks, streams, step_s, result.tokens_per_s, each / first))
        return found

    def _candidates(self) -> Iterator[Layout]:
        config, experts, world = self.layout.config, self.layout.config.moe.experts, self.layout.placement.world_size
        if not self.layout.expert_layers:
            return
        method = planned_method(config.moe)
        has_tables = method is not None and "builder" in method.uses and config.moe.columns == experts
        for ranks in range(1, min(world, experts) + 1):
            if world % ranks or experts % ranks:
                continue
            try:
                here = Placement(world, ranks, self.layout.placement.ranks_per_node)
            except UserError:  # groups that would lie on the nodes in different ways
                continue
            if ranks == 1:
                alone = replace(config.parallel, expert_ranks=1, chunks=1)
                yield Layout(replace(config, parallel=alone), here)
                continue
            tables = [config.moe]
            if (
                has_tables
                and (packed := replace(config.moe, builder=Builder.packed, pack=experts // ranks)) != config.moe
            ):
                tables.append(packed)
            kinds = ExchangeKind.tokens, ExchangeKind.gather, ExchangeKind.auto
            for moe, kind, chunks in product(tables, kinds, CHUNKS):
                parallel = replace(config.parallel, expert_ranks=ranks, exchange=kind, chunks=chunks)
                found = Layout(replace(config, moe=moe, parallel=parallel), here)
                if kind is ExchangeKind.auto:
                    found = with_rates(found, self.cluster)
                    kinds_used = {part.exchange for part in steps_of_k(found)}
                    if len(kinds_used) == 1:  # the same as one of the fixed kinds
                        continue
                yield found

    def _count(self, layout: Layout) -> list[_Counted]:
        """Count a few steps of each k, of one expert group."""
        config, placement = layout.config, layout.placement
        group = replace(placement, world_size=placement.expert_ranks)
        streams = config.data.streams // placement.world_size * placement.expert_ranks
        key = (group, streams, config.moe.builder, config.moe.pack)
        if key not in self._counts:
            one = replace(config, data=replace(config.data, streams=streams))
            steps = [  # spread over those of each k; k grows and never shrinks
                part.first + part.steps * (2 * i + 1) // (2 * SAMPLED)
                for part in steps_of_k(layout)
                for i in range(SAMPLED)
            ]
            moe = config.moe
            if moe != self.layout.config.moe:  # to see what travels, one table is as good as one for each layer
                moe = replace(moe, share_table=True)
            routers = self._routers_of(moe)
            here = Layout(one, group)
            found = replay(here, self.ids, routers, sorted(set(steps)), self._document_starts)
            rows = RowCounter(here, self._table_keys, here.read(self.ids, self._document_starts))
            self._counts[key] = [_Counted(counts, rows.landed(counts.step)) for counts in found]
        return self._counts[key]


def time_part(forecaster: Forecaster, *, search: bool = True) -> TimePart:
    """Model a run, its scaling, and other layouts of it on its ranks.

    Args:
        search: look for the best layout, which builds further tables.
    """
    layout = forecaster.layout
    return TimePart(
        cluster=forecaster.cluster.name,
        ranks_per_node=layout.placement.ranks_per_node,
        forecast=forecaster.forecast(layout),
        exchanges=steps_of_k(layout),
        auto=steps_of_k(forecaster.automatic()),
        weak=forecaster.weak(),
        strong=forecaster.strong(),
        choices=forecaster.choices() if search else [],
        left_out=left_out(layout, forecaster.cluster),
    )


def worlds(placement: Placement) -> list[int]:
    """Return the numbers of ranks at which scaling is modelled: one, the run's own, and those that double.

    Doubling starts at 1, or at the expert group if that is no power of two: other numbers would hold no whole groups.
    """
    ranks = placement.expert_ranks
    first = 1 if ranks.bit_count() == 1 else ranks
    doubled = {first << i for i in range(MOST_RANKS.bit_length()) if first << i <= MOST_RANKS}
    return sorted({1, placement.world_size, *doubled})


def steps_of_k(layout: Layout) -> list[StepsOfK]:
    """List each k of a run with its first step, its number of steps and its exchange."""
    parts = _parts_of_schedule(astuple(layout.config.schedule), layout.config.train.steps)
    return [StepsOfK(k, first, steps, layout.exchange(k)) for k, first, steps in parts]


@cache
def _parts_of_schedule(schedule: tuple[Any, ...], steps: int) -> list[tuple[int, int, int]]:
    """List each k of a schedule with its first step and its number of steps."""
    config = ScheduleConfig(*schedule)
    total = config.steps or steps
    ks = (active_experts(config, step, total) for step in range(steps))
    found, first = [], 0
    for k, group in groupby(ks):
        number = sum(1 for _ in group)
        found.append((k, first, number))
        first += number
    return found


def with_rates(layout: Layout, cluster: ClusterConfig) -> Layout:
    """Return the run with exchange=auto, which knows the cluster's rates."""
    placement = layout.placement
    crosses = placement.group_nodes > 1
    link = cluster.between if crosses else cluster.inside
    sharing = min(placement.ranks_per_node, placement.world_size) if crosses else 1
    parallel = replace(
        layout.config.parallel,
        expert_ranks=placement.expert_ranks,
        exchange=ExchangeKind.auto,
        link_gb_per_s=link.gb_per_s / sharing,
        message_us=link.message_us,
        memory_gb_per_s=cluster.memory_gb_per_s,
    )
    return replace(layout, config=replace(layout.config, parallel=parallel))


def _overrides(before: Layout, after: Layout) -> list[str]:
    """Return the options of the command line that turn one layout into the other; parallel.expert_ranks always."""
    found = [f"parallel.expert_ranks={after.config.parallel.expert_ranks}"]
    for section in ("parallel", "moe"):
        old, new = getattr(before.config, section), getattr(after.config, section)
        for f in fields(old):
            value = getattr(new, f.name)
            if value != getattr(old, f.name) and f.name != "expert_ranks":
                text = "null" if value is None else f"{value:g}" if isinstance(value, float) else value
                text = getattr(value, "name", text)
                found.append(f"{section}.{f.name}={text}")
    return found
