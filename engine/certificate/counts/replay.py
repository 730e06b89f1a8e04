"""Replays the routing of a run: the number of rows from rank to rank, for every step and layer.

The ids come from the run's own streams (engine/data/streams.py), rows from its routers, k from its schedule. The ranks'
plans (engine/routing/plans/planner.py) are not built, only their counts. For each k a row's set becomes fields of one
byte, eight to a 64-bit word: a 1 for each expert that the row uses, each rank that holds one of them, and each node
that has such a rank. The sum of the words of at most 255 tokens then counts all fields at once. No field overflows into
its neighbour.

Letters: y layers, m micro-batches of a step, g expert groups, s shares (a rank's tokens of a micro-batch), T tokens of
a share, P ranks of an expert group, h nodes of an expert group, E experts, r table rows, w words, f fields, c runs of
255 tokens, L experts of a rank.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foreroute.engine.ahead import Ahead
from foreroute.engine.certificate.counts.layout import Layout
from foreroute.engine.certificate.counts.placement import Placement
from foreroute.engine.config import Split
from foreroute.engine.data.documents import NO_STARTS, Starts
from foreroute.engine.data.streams import Streams
from foreroute.engine.data.tokens.vocab import Ids
from foreroute.engine.routing.planned_router import GroupTokens, Places, PlannedRouter
from foreroute.engine.routing.row_sets import RowSets

_RUN = 255  # tokens whose fields fit in a byte
_THREADS = 2  # numpy lets go of the interpreter's lock in the long operations
_AHEAD = 4  # steps counted ahead of the one that is asked for

Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepCounts:
    """Rows that one step moves and computes, of all groups, layers and micro-batches."""

    steps: Counts  # ascending, all that do exactly this: same segments, same k, later epochs
    k: int
    sent_ymgPP: Counts  # by source, then destination: each token once to each rank that has one of its experts
    nodes_ymgPh: Counts  # by source, then node of the group: each token once to each node that has one of its experts
    count_ymgE: Counts
    """Rows of each expert; -1 after the last of each rank in a layer that has fewer than others."""

    @property
    def step(self) -> int:
        """The first of the steps."""
        return int(self.steps[0])

    @property
    def times(self) -> int:
        """Number of the steps."""
        return self.steps.size

    @property
    def received_ymgP(self) -> Counts:
        """Rows that a rank receives, its own included, when the exchange is `tokens`."""
        received_ymgP: Counts = self.sent_ymgPP.sum(axis=3)
        return received_ymgP

    @property
    def computed_ymgP(self) -> Counts:
        """Expert rows that a rank computes."""
        ranks, count_ymgE = self.sent_ymgPP.shape[-1], self.count_ymgE.clip(min=0)
        local = count_ymgE.shape[3] // ranks
        computed_ymgP: Counts = count_ymgE.reshape(*count_ymgE.shape[:3], ranks, local).sum(axis=4)
        return computed_ymgP

    @property
    def experts(self) -> Counts:
        """The rows of every expert of every layer, micro-batch and group, in one dimension."""
        return self.count_ymgE[self.count_ymgE >= 0]


class _Work(NamedTuple):
    steps: NDArray[np.int64]
    k: int


def replay(
    layout: Layout,
    ids: Ids,
    routers: Sequence[PlannedRouter],
    steps: Sequence[int],
    document_starts: Starts = NO_STARTS,
) -> Iterator[StepCounts]:
    """Count step after step; a step whose segments and k were counted before is not counted again (see
    StepCounts.steps).

    Args:
        ids: the training split.
        routers: of the run, one for each layer or one for all; none in a dense run.
        steps: 0-based steps of the run, ascending.
        document_starts: of the training split (PreparedCorpus.document_starts).

    Raises:
        UserError: the run cannot be laid out on these ranks, or the text is too short.
    """
    layout.check()
    streams = layout.read(ids, document_starts)
    work = _distinct(layout, streams, steps)
    with ThreadPoolExecutor(_THREADS) as pool:
        for _, same_k in groupby(work, key=lambda item: item.k):
            counter = _Counter(layout, streams, routers)
            counts = Ahead((pool.submit(counter.count, item) for item in same_k), _AHEAD)
            yield from (count.result() for count in counts)


def first_steps(layout: Layout, ids: Ids, steps: Sequence[int]) -> list[int]:
    """Return for each step the first of the steps that does exactly the same (see StepCounts.times); arguments as for
    replay."""
    found: dict[tuple[int, int], int] = {}
    return [found.setdefault(key, step) for step, key in _keys(layout, layout.read(ids), steps)]


def _keys(layout: Layout, streams: Streams, steps: Iterable[int]) -> Iterator[tuple[int, tuple[int, int]]]:
    """Yield each step with its segments and its k, which decide all that it does."""
    for step in steps:
        yield step, (step % streams.segments_per_epoch, layout.k(step))


def _distinct(layout: Layout, streams: Streams, steps: Iterable[int]) -> list[_Work]:
    """Group the steps that do exactly the same, in the order of first steps."""
    found: dict[tuple[int, int], list[int]] = {}
    for step, key in _keys(layout, streams, steps):
        found.setdefault(key, []).append(step)
    return [_Work(np.array(same), k) for (_, k), same in found.items()]


def _pack(sets: RowSets, experts: int, columns: int, placement: Placement) -> NDArray[np.uint64]:
    """Return the words [w, r] of row sets; fields are experts, then ranks, then nodes, then padding."""
    rows = len(sets.order_rK)
    used_rK = None if sets.used_rK is None else sets.used_rK.numpy()
    active_er = np.zeros((columns, rows), np.uint8)
    for choice, expert_r in enumerate(sets.order_rK.numpy().T):
        active_er[expert_r, np.arange(rows)] |= True if used_rK is None else used_rK[:, choice]
    active_Er = active_er[:experts]
    rank_Pr = active_Er.reshape(placement.expert_ranks, -1, rows).max(axis=1)
    node_hr = rank_Pr.reshape(placement.group_nodes, -1, rows).max(axis=1)
    field_fr = np.concatenate([active_Er, rank_Pr, node_hr])
    field_fr = np.pad(field_fr, [(0, -len(field_fr) % 8), (0, 0)])
    return np.ascontiguousarray(np.ascontiguousarray(field_fr.T).view(np.uint64).T)


def _count_fields(word_wr: NDArray[np.uint64], row_sT: NDArray[np.integer[Any]]) -> Counts:
    """Count the fields of every share's table rows [s, f].

    Example: one word, whose rows 0 and 1 have the fields 1 0 1 0 0 0 0 0 and 0 0 1 0 0 0 0 0; a share of rows [0, 1, 1]
    counts 1 0 3 0 0 0 0 0.
    """
    starts = np.arange(0, row_sT.shape[1], _RUN)
    sum_scw = np.stack([np.add.reduceat(word_r.take(row_sT), starts, axis=1) for word_r in word_wr], axis=-1)
    count_sf: Counts = sum_scw.view(np.uint8).sum(axis=1, dtype=np.int64)
    return count_sf


@dataclass(frozen=True, slots=True)
class _Counter:
    """Counts the steps of one k."""

    layout: Layout
    streams: Streams
    routers: Sequence[PlannedRouter]
    words: dict[int, tuple[RowSets, NDArray[np.uint64]]] = field(default_factory=dict)
    """The last row sets of each router, and their words."""

    def count(self, work: _Work) -> StepCounts:
        """Count a step."""
        if not self.routers:
            return self._without_experts(work)
        batch = self.streams.batch(int(work.steps[0]), range(self.streams.streams))
        marks = None if batch.new_document_BX is None else batch.new_document_BX[None]
        assert batch.place_B is not None
        places = Places(Split.train, batch.place_B[None])
        tokens = GroupTokens(batch.ids_BQ[None], batch.left_BC[None], marks, places=places)
        config, place = self.layout.config, self.layout.placement
        accumulation = config.train.accumulation
        # rank by rank, micro-batch by micro-batch, as Streams.streams_of
        shares = place.world_size * accumulation
        found = []
        for number, router in enumerate(self.routers):
            row_PT, sets = router.choose(tokens, work.k)
            field_sf = _count_fields(self._words(number, sets), row_PT.reshape(shares, -1))
            field_mgPf = field_sf.reshape(place.groups, place.expert_ranks, accumulation, -1).transpose(2, 0, 1, 3)
            found.append(self._split(field_mgPf, router.experts))
        layers = np.arange(self.layout.expert_layers) % len(found)  # of one table, or each with its own
        sent_ymgPP, nodes_ymgPh, count_ymgE = (np.stack(parts)[layers] for parts in zip(*found, strict=True))
        if place.expert_ranks == 1:  # it does not send, and keeps tokens without an expert as well
            sent_ymgPP = np.full_like(sent_ymgPP, self.layout.tokens)
        return StepCounts(*work, sent_ymgPP=sent_ymgPP, nodes_ymgPh=nodes_ymgPh, count_ymgE=count_ymgE)

    def _without_experts(self, work: _Work) -> StepCounts:
        """Count a step of a dense run: no layers."""
        place = self.layout.placement
        shape, ranks = (0, self.layout.config.train.accumulation, place.groups), place.expert_ranks
        sent, nodes, counts = (
            np.zeros((*shape, *more), np.int64) for more in ((ranks, ranks), (ranks, place.group_nodes), (0,))
        )
        return StepCounts(*work, sent_ymgPP=sent, nodes_ymgPh=nodes, count_ymgE=counts)

    def _split(self, field_mgPf: Counts, experts: int) -> tuple[Counts, Counts, Counts]:
        """Return a layer's rows to ranks, to nodes and of experts."""
        place = self.layout.placement
        sent, nodes = experts + place.expert_ranks, experts + place.expert_ranks + place.group_nodes
        count_mgE = field_mgPf[..., :experts].sum(axis=2)
        count_mgPL = count_mgE.reshape(*count_mgE.shape[:2], place.expert_ranks, -1)
        missing = self.layout.local_experts - count_mgPL.shape[3]
        count_mgPL = np.pad(count_mgPL, [(0, 0)] * 3 + [(0, missing)], constant_values=-1)
        count_mgE = count_mgPL.reshape(*count_mgE.shape[:2], -1)
        return field_mgPf[..., experts:sent], field_mgPf[..., sent:nodes], count_mgE

    def _words(self, number: int, sets: RowSets) -> NDArray[np.uint64]:
        last, words = self.words.get(number, (None, None))
        if words is None or last is not sets:
            router = self.routers[number]
            words = _pack(sets, router.experts, router.columns, self.layout.placement)
            self.words[number] = sets, words
        return words
