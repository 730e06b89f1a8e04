"""A model of the time of one optimizer step, from exact counts of its rows and the rates of a cluster.

Unlike the counts it is not exact; benchmarks/bench_certify.py measures its error. The ranks of an expert group wait for
each other in every layer, so a layer takes as long as its busiest rank. All groups wait for the slowest one.

    step = attention + experts + rest + exchange that nothing hides + gradients + optimizer + n-gram tables

Rows leave through two bottlenecks at once: a rank's own port, and the link of its node for rows to other nodes. The
slower one counts. With chunks, rows of one chunk travel while experts compute another. DeepSpeed's collectives do not
overlap with computation. That is so at ZeRO-0 to 2; at ZeRO-3 a GPU may be faster.

Letters: as in engine/certificate/counts/replay.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import ceil, log2

import numpy as np
from numpy.typing import NDArray

from foreroute.engine.certificate.counts.layout import FORWARD, Layout, Trips
from foreroute.engine.certificate.counts.placement import Placement
from foreroute.engine.certificate.counts.replay import Counts, StepCounts
from foreroute.engine.certificate.counts.traffic import hops
from foreroute.engine.certificate.memory.sizes import Parameters, count_parameters
from foreroute.engine.certificate.time.cluster import ClusterConfig
from foreroute.engine.certificate.time.operations import (
    expert_seconds,
    model_seconds,
    optimizer_seconds,
    packing_seconds,
    passes,
    shared_seconds,
)
from foreroute.engine.certificate.time.table_time import table_seconds


@dataclass(frozen=True, slots=True)
class StepTime:
    """Modelled seconds of a step, of the slowest rank."""

    attention: float
    experts: float
    rest: float
    exchange: float  # that does not overlap
    gradients: float  # summed over the ranks, and weights gathered
    optimizer: float
    hidden: float  # exchange that overlaps with computation; not part of the sum
    tables: float = 0.0  # n-gram tables: their rows' exchange, reading and update

    @property
    def total(self) -> float:
        """The whole step."""
        parts: list[float] = [getattr(self, f.name) for f in fields(self) if f.name != "hidden"]
        return sum(parts)

    @staticmethod
    def mean(times: "Sequence[StepTime]") -> "StepTime":
        """Average several steps, part by part."""
        names = [f.name for f in fields(StepTime)]
        return StepTime(**{name: sum(getattr(time, name) for time in times) / len(times) for name in names})


class StepModel:
    """Models the steps of one run on one cluster.

    Args:
        layout: of a hashed run; the placement's expert_ranks and ranks_per_node count, not the configuration's and the
            cluster's.
        vocab: symbols.
        shares: of the symbols that each cluster has (engine/model/adaptive.py).
    """

    def __init__(self, layout: Layout, cluster: ClusterConfig, vocab: int, shares: Sequence[float] = ()) -> None:
        self.layout, self.cluster = layout, cluster
        self._parameters = count_parameters(layout, vocab)
        self._model = model_seconds(layout, cluster, vocab, shares)
        self._gradients = gradient_seconds(layout, cluster, self._parameters)

    def time(self, counts: StepCounts, landed: Sequence[float] = ()) -> StepTime:
        """Model one step.

        Args:
            counts: of a step of this layout, or of one expert group of it.
            landed: of each n-gram table, distinct rows that a rank reads in the step.
        """
        train, cluster, place, model = self.layout.config.train, self.cluster, self.layout.placement, self._model
        accumulation = train.accumulation
        slower = cluster.slowdown(min(place.ranks_per_node, place.world_size))
        layers = layer_times(self.layout, cluster, counts)
        starts = model.operations
        if not cluster.host_copies:  # the host starts operations ahead of the device that runs them
            starts = max(0.0, starts - model.attention - model.rest)
        updated = self._parameters.part if train.zero_stage else self._parameters.numbers
        optimizer = optimizer_seconds(self.layout.item_bytes, cluster, self._parameters.numbers, updated)
        return StepTime(
            attention=slower * accumulation * model.attention,
            experts=slower * layers.experts,
            rest=slower * accumulation * (model.rest + starts),
            exchange=layers.exchange,
            gradients=self._gradients,
            optimizer=slower * optimizer,
            hidden=layers.hidden,
            tables=table_seconds(self.layout, cluster, landed) if landed else 0.0,
        )


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """All expert layers of a step, of the slowest expert group."""

    experts: float
    exchange: float
    hidden: float


def layer_times(layout: Layout, cluster: ClusterConfig, counts: StepCounts) -> LayerTimes:
    """Model the expert layers of a step: arguments as for StepModel, experts' time without the ranks' sharing of
    cores."""
    config, placement, tokens = layout.config, layout.placement, layout.tokens
    if not layout.expert_layers:
        return LayerTimes(0.0, 0.0, 0.0)
    ranks = placement.expert_ranks
    gather = layout.exchange(counts.k) == "gather"
    received = counts.received_ymgP.astype(np.float64)
    if gather:
        received = np.full_like(received, tokens * ranks)
    chunks = min(config.parallel.chunks, tokens) if ranks > 1 else 1
    experts = chunks * expert_seconds(layout, cluster, counts.k, counts.computed_ymgP / chunks, received / chunks)
    if ranks > 1 and not gather:
        packing = packing_seconds(layout, cluster, received / chunks, tokens / chunks)
        experts = experts + chunks * packing
    experts_ymg = experts.max(axis=3)
    shared = experts_ymg[..., 0].size * shared_seconds(layout, cluster)
    if ranks == 1:
        return LayerTimes(float(experts_ymg.sum(axis=(0, 1)).max()) + shared, 0.0, 0.0)
    kind = "gather" if gather else "tokens"
    hops_ymgPP = hops(counts, kind, placement, tokens)
    trips = layout.trips
    trip = _trip(layout, cluster, hops_ymgPP, gathered=tokens if gather else 0, chunks=chunks)
    exchange_ymg = trip.weighed(trips)
    hidden_ymg = np.zeros_like(exchange_ymg)
    if chunks > 1:
        # forward and backward each hide what waits for the link, up to what their experts compute meanwhile
        forward = np.minimum(trip.hideable(FORWARD, chunks), experts_ymg / passes(config.train))
        rest = Trips(trips.to_experts - 1, trips.to_tokens - 1)
        backward = np.minimum(trip.hideable(rest, chunks), experts_ymg * (1 - 1 / passes(config.train)))
        hidden_ymg = cluster.overlap * (forward + backward)
    total_g = (experts_ymg + exchange_ymg - hidden_ymg).sum(axis=(0, 1))
    group = int(total_g.argmax())
    experts_s, exchange_s, hidden_s = (
        float(x.sum(axis=(0, 1))[group]) for x in (experts_ymg, exchange_ymg, hidden_ymg)
    )
    return LayerTimes(experts_s + shared, exchange_s - hidden_s, hidden_s)


@dataclass(frozen=True, slots=True)
class _Trip:
    """Seconds of all chunks' rows from tokens to experts and back, one way each [y, m, g]."""

    to_experts: NDArray[np.float64]
    to_tokens: NDArray[np.float64]
    waiting_to_experts: NDArray[np.float64]  # of it, without the computing processor
    waiting_to_tokens: NDArray[np.float64]

    def weighed(self, trips: Trips) -> NDArray[np.float64]:
        """Time of so many trips."""
        return trips.to_experts * self.to_experts + trips.to_tokens * self.to_tokens

    def hideable(self, trips: Trips, chunks: int) -> NDArray[np.float64]:
        """Time that computation may hide: the first chunk's way there and the last one's way back have none beside
        them."""
        waiting = trips.to_experts * self.waiting_to_experts + trips.to_tokens * self.waiting_to_tokens
        return waiting * (chunks - 1) / chunks


def _trip(layout: Layout, cluster: ClusterConfig, hops_ymgPP: Counts, *, gathered: int, chunks: int) -> _Trip:
    """Time the ways of one layer's rows.

    An all-gather goes round a ring, as NCCL's reduce-scatter does: all rows but a rank's own pass each link between
    nodes once. Without NCCL rows come back by an all-to-all, rank to rank (engine/parallel/collectives.py).

    Args:
        gathered: rows of a rank that all ranks gather; 0 if rows go where they are needed.
    """
    placement, row_bytes = layout.placement, layout.row_bytes
    ranks, nodes = placement.expert_ranks, placement.group_nodes
    crosses = nodes > 1
    link = cluster.between if crosses else cluster.inside
    doubling = gathered and not cluster.host_copies  # NCCL's; gloo sends to each rank
    messages = ceil(log2(ranks)) if doubling else ranks - 1
    start = chunks * messages * link.message_us * 1e-6
    bytes_ymgPP = hops_ymgPP * float(row_bytes)
    sent, got = bytes_ymgPP.sum(axis=4), bytes_ymgPP.sum(axis=3)
    port_s = np.maximum(sent, got).max(axis=3) / (cluster.inside.gb_per_s * 1e9)
    pairs_s = ring_s = np.zeros_like(port_s)
    if crosses:
        far = bytes_ymgPP * ~placement.same_node_PP
        shape = (*port_s.shape, nodes, ranks // nodes)
        out = far.sum(axis=4).reshape(shape).sum(axis=4)
        into = far.sum(axis=3).reshape(shape).sum(axis=4)
        pairs_s = np.maximum(out, into).max(axis=3) / (cluster.between.gb_per_s * 1e9)
        ring_bytes = (ranks - 1) * gathered * row_bytes
        ring_s = np.full_like(port_s, ring_bytes / (cluster.between.gb_per_s * 1e9))
    ways = []
    for link_s in (ring_s if gathered else pairs_s, ring_s if doubling else pairs_s):
        way = start + np.maximum(port_s, link_s)
        waiting = np.maximum(0.0, link_s - port_s) if cluster.host_copies else way
        ways.append((way, waiting))
    (there, waiting_there), (back, waiting_back) = ways
    return _Trip(there, back, waiting_there, waiting_back)


def gradient_seconds(layout: Layout, cluster: ClusterConfig, parameters: Parameters) -> float:
    """Model the collectives of DeepSpeed in a step, by ZeRO stage; nothing hides them."""
    config, placement = layout.config, layout.placement
    stage, accumulation = config.train.zero_stage, config.train.accumulation
    total = 0.0
    for number, group in enumerate(parameters.groups):  # experts, if shared out, are the second
        if group.ranks == 1:
            continue
        ring = _Ring(cluster, placement, group.ranks, placement.expert_ranks if number else 1)
        gradient, weights = 4.0 * group.numbers, float(layout.item_bytes * group.numbers)
        if stage < 3:
            total += (accumulation if stage == 2 else 1) * 2 * ring.half(gradient)
            total += ring.half(weights) if stage else 0.0
        else:
            times = 3 if config.train.recompute else 2
            reduce = (2 if cluster.host_copies else 1) * ring.half(gradient)  # gloo's is an all-reduce
            total += accumulation * (reduce + times * ring.half(weights, len(group.numels)))
    return total


@dataclass(frozen=True, slots=True)
class _Ring:
    """Collectives of `size` ranks that stand `stride` apart."""

    cluster: ClusterConfig
    placement: Placement
    size: int
    stride: int

    def half(self, num_bytes: float, messages: int = 1) -> float:
        """Time a reduce-scatter or an all-gather, each half of an all-reduce: round a ring, or by a tree when that is
        faster.

        Args:
            messages: tensors that are gathered one by one.
        """
        inside, between, node = self.cluster.inside, self.cluster.between, self.placement.ranks_per_node
        crosses = (self.size - 1) * self.stride >= min(node, self.placement.world_size)
        message_s = (between if crosses else inside).message_us * 1e-6
        bytes_per_s = inside.gb_per_s * 1e9
        if crosses:  # rings of the ranks between these share the nodes' links
            bytes_per_s = min(bytes_per_s, between.gb_per_s * 1e9 / min(self.stride, node))
        steps = ceil(log2(self.size))
        ring = (self.size - 1) * message_s + (self.size - 1) / self.size * num_bytes / bytes_per_s
        tree = steps * message_s + num_bytes / bytes_per_s
        return min(ring, tree) + (messages - 1) * steps * message_s
