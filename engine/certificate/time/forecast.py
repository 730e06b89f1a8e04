"""The time part of a certificate: steps of a run on a cluster, how it scales, and the best way to lay it out.

All of it is a model (engine/certificate/time/step_time.py) of exact counts. Counts come from a few steps of each k and
one expert group: of the first ranks, whose streams are as long and as many as a rank of the run has.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields, replace
from functools import cache
from itertools import groupby, product
from typing import Any

from foreroute.engine.certificate.counts.exact import exchange_of, frame_of
from foreroute.engine.certificate.counts.placement import Placement
from foreroute.engine.certificate.counts.replay import StepCounts, replay
from foreroute.engine.certificate.time.cluster import ClusterConfig
from foreroute.engine.certificate.time.step_time import StepModel, StepTime
from foreroute.engine.config import Config, MoEConfig, ParallelConfig, ScheduleConfig
from foreroute.engine.config.enums import Builder, ExchangeKind, MatmulPrecision
from foreroute.engine.data.streams import Ids
from foreroute.engine.errors import UserError
from foreroute.engine.routing.k_schedule import active_experts
from foreroute.engine.routing.tables import Table

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
    """What a certificate says about time; a model."""

    cluster: str
    ranks_per_node: int
    forecast: Forecast
    exchanges: list[StepsOfK]  # as the run is configured
    auto: list[StepsOfK]  # as exchange=auto chooses with the cluster's rates
    weak: list[ScalingPoint]  # streams of a rank stay
    strong: list[ScalingPoint]  # streams of all ranks stay
    choices: list[LayoutChoice]  # fastest first; empty if not searched
    left_out: list[str]  # what this run does and the model does not know


class Forecaster:
    """Models layouts of one run on one cluster."""

    def __init__(
        self,
        config: Config,
        cluster: ClusterConfig,
        ids: Ids,
        vocab: int,
        tables_of: Callable[[MoEConfig], Sequence[Table]],
    ) -> None:
        """Take what stays the same.

        Args:
            ids: the training split.
            tables_of: builds the run's tables with other options.
        """
        self.config, self.cluster, self.ids, self.vocab = config, cluster, ids, vocab
        self._tables_of = tables_of
        self._counts: dict[object, list[StepCounts]] = {}

    def forecast(self, config: Config, placement: Placement) -> Forecast:
        """Model all steps of a layout.

        Args:
            config: the run's with other data.streams, moe.builder, moe.pack or parallel; parallel.expert_ranks is the
                placement's.
        """
        counts = self._count(config, placement)
        model = StepModel(config, self.cluster, placement, self.vocab)
        by_k, total = [], 0.0
        symbols = config.symbols_per_step
        for part in steps_of_k(config, placement):
            time = StepTime.mean([model.time(step) for step in counts if step.k == part.k])
            total += part.steps * time.total
            by_k.append(TimeOfK(part.k, part.steps, part.exchange, time, time.total, symbols / time.total))
        return Forecast(by_k, total, symbols * config.train.steps / total)

    def weak(self, placement: Placement) -> list[ScalingPoint]:
        """Model more and fewer ranks with the streams of a rank as they are."""
        streams = self.config.data.streams // placement.world_size
        return self._scale(placement, lambda world: streams * world)

    def strong(self, placement: Placement) -> list[ScalingPoint]:
        """Model more and fewer ranks with all streams as they are, as far as they can be shared out."""
        return self._scale(placement, lambda world: self.config.data.streams)

    def choices(self, placement: Placement) -> list[LayoutChoice]:
        """Model every expert group, exchange, number of chunks and kind of table on the ranks, fastest first."""
        found = []
        for config, here in self._candidates(placement):
            step_s = self.forecast(config, here).run_s / config.train.steps
            found.append(LayoutChoice(_overrides(self.config, config), step_s, config.moe == self.config.moe))
        return sorted(found, key=lambda choice: choice.step_s)

    def automatic(self, placement: Placement) -> Config:
        """Give the run with exchange=auto and the cluster's rates."""
        return replace(self.config, parallel=auto_rates(self.config, self.cluster, placement))

    def _scale(self, placement: Placement, streams_of: Callable[[int], int]) -> list[ScalingPoint]:
        found: list[ScalingPoint] = []
        for world in worlds(placement):
            ranks = min(placement.expert_ranks, world)
            streams = streams_of(world)
            if streams % (world * self.config.train.accumulation):
                continue
            try:
                here = Placement(world, ranks, placement.ranks_per_node)
                config = replace(self.config, data=replace(self.config.data, streams=streams))
                result = self.forecast(config, here)
            except UserError:  # not that many experts for a group, or too little text for that many streams
                continue
            each = result.tokens_per_s / world
            first = each if not found else found[0].tokens_per_s / found[0].ranks
            step_s = result.run_s / config.train.steps
            found.append(ScalingPoint(world, ranks, streams, step_s, result.tokens_per_s, each / first))
        return found

    def _candidates(self, placement: Placement) -> Iterator[tuple[Config, Placement]]:
        config, experts, world = self.config, self.config.moe.experts, placement.world_size
        for ranks in range(1, min(world, experts) + 1):
            if world % ranks or experts % ranks:
                continue
            try:
                here = Placement(world, ranks, placement.ranks_per_node)
            except UserError:  # groups that would lie on the nodes in different ways
                continue
            if ranks == 1:
                alone = replace(config.parallel, expert_ranks=1, chunks=1)
                yield replace(config, parallel=alone), here
                continue
            packed = replace(config.moe, builder=Builder.packed, pack=experts // ranks)
            tables = [config.moe] if packed == config.moe else [config.moe, packed]
            kinds = ExchangeKind.tokens, ExchangeKind.gather, ExchangeKind.auto
            for moe, kind, chunks in product(tables, kinds, CHUNKS):
                parallel = replace(config.parallel, expert_ranks=ranks, exchange=kind, chunks=chunks)
                found = replace(config, moe=moe, parallel=parallel)
                if kind is ExchangeKind.auto:
                    found = replace(found, parallel=auto_rates(found, self.cluster, here))
                    kinds_used = {part.exchange for part in steps_of_k(found, here)}
                    if len(kinds_used) == 1:  # the same as one of the fixed kinds
                        continue
                yield found, here

    def _count(self, config: Config, placement: Placement) -> list[StepCounts]:
        """Count a few steps of each k, of one expert group."""
        group = replace(placement, world_size=placement.expert_ranks)
        streams = config.data.streams // placement.world_size * placement.expert_ranks
        key = (group, streams, config.moe.builder, config.moe.pack)
        if key not in self._counts:
            one = replace(config, data=replace(config.data, streams=streams))
            steps = sorted(step for part in steps_of_k(config, placement) for step in _sampled(part))
            moe = config.moe
            if moe != self.config.moe:  # to see what travels, one table is as good as one for each layer
                moe = replace(moe, share_table=True)
            tables = self._tables_of(moe)
            self._counts[key] = list(replay(one, self.ids, tables, group, steps))
        return self._counts[key]


def time_part(forecaster: Forecaster, placement: Placement, *, search: bool = True) -> TimePart:
    """Model a run, its scaling, and other layouts of it on its ranks.

    Args:
        search: look for the best layout, which builds further tables.
    """
    config = forecaster.config
    return TimePart(
        cluster=forecaster.cluster.name,
        ranks_per_node=placement.ranks_per_node,
        forecast=forecaster.forecast(config, placement),
        exchanges=steps_of_k(config, placement),
        auto=steps_of_k(forecaster.automatic(placement), placement),
        weak=forecaster.weak(placement),
        strong=forecaster.strong(placement),
        choices=forecaster.choices(placement) if search else [],
        left_out=_left_out(config, forecaster.cluster),
    )


def worlds(placement: Placement) -> list[int]:
    """Give the numbers of ranks at which scaling is modelled: one, the run's own, and those that double.

    Doubling starts at 1, or at the expert group if that is no power of two: other numbers would hold no whole groups.
    """
    ranks = placement.expert_ranks
    first = 1 if ranks.bit_count() == 1 else ranks
    doubled = {first << i for i in range(MOST_RANKS.bit_length()) if first << i <= MOST_RANKS}
    return sorted({1, placement.world_size, *doubled})


def _left_out(config: Config, cluster: ClusterConfig) -> list[str]:
    """Name what the run does and engine/certificate/time/step_time.py does not know."""
    train, kernels, on_cpu = config.train, config.kernels, cluster.host_copies
    lines = {
        "train.offload: weights are updated as if on the device, and nothing travels between host and device": (
            train.offload
        ),
        "train.zero_stage=3: DeepSpeed sends weights and gradients beside computation, here nothing hides them": (
            train.zero_stage == 3 and not on_cpu
        ),
        f"model.ngram={config.model.ngram}: looking up the input's rows and writing their gradient takes no time": (
            config.model.ngram > 0
        ),
        f"kernels.precision={kernels.precision.value}: products run at the rate of product_fp32": (
            kernels.precision is not MatmulPrecision.ieee
        ),
        "kernels.masked_from_k: a run measures it at its start; here all experts are grouped, as below it": (
            on_cpu and kernels.masked_from_k is None
        ),
    }
    return [line for line, true in lines.items() if true]


def steps_of_k(config: Config, placement: Placement) -> list[StepsOfK]:
    """Say from which step on a run uses each k, and by which exchange."""
    frame = frame_of(config, placement)
    parts = _parts_of_schedule(astuple(config.schedule), config.train.steps)
    return [StepsOfK(k, first, steps, exchange_of(config, frame, k)) for k, first, steps in parts]


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


def auto_rates(config: Config, cluster: ClusterConfig, placement: Placement) -> ParallelConfig:
    """Give the parallel options with which exchange=auto knows the cluster's rates."""
    crosses = placement.group_nodes > 1
    link = cluster.between if crosses else cluster.inside
    sharing = min(placement.ranks_per_node, placement.world_size) if crosses else 1
    return replace(
        config.parallel,
        expert_ranks=placement.expert_ranks,
        exchange=ExchangeKind.auto,
        link_gb_per_s=link.gb_per_s / sharing,
        message_us=link.message_us,
        memory_gb_per_s=cluster.memory_gb_per_s,
    )


def _sampled(part: StepsOfK) -> set[int]:
    """Choose steps of one k, spread over them; k grows and never shrinks."""
    return {part.first + part.steps * (2 * i + 1) // (2 * SAMPLED) for i in range(SAMPLED)}


def _overrides(before: Config, after: Config) -> list[str]:
    """Options of the command line that turn one layout into the other; parallel.expert_ranks always."""
    found = [f"parallel.expert_ranks={after.parallel.expert_ranks}"]
    for section in ("parallel", "moe"):
        old, new = getattr(before, section), getattr(after, section)
        for f in fields(old):
            value = getattr(new, f.name)
            if value != getattr(old, f.name) and f.name != "expert_ranks":
                text = (
                    value.name
                    if hasattr(value, "name")
                    else "null"
                    if value is None
                    else f"{value:g}"
                    if isinstance(value, float)
                    else value
                )
                found.append(f"{section}.{f.name}={text}")
    return found
