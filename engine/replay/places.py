"""The places of a run, a rank in a step, that are worth a replay: most rows, most bytes, most memory, and the median.

Every place is counted before (engine/certificate/counts/). Memory of a place is the certificate's formula with the
rows of that place instead of the largest of all. It is computed for the few places of each k that a linear estimate
puts first, since it grows with every one of these rows. Rows of n-gram tables are not looked at in the choice.

Letters: s distinct steps, y layers, m micro-batches, r ranks of the run.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foreroute.engine.certificate.counts.layout import Layout
from foreroute.engine.certificate.counts.replay import StepCounts, replay
from foreroute.engine.certificate.counts.table_rows import OfTable, RowCounter, tables_of_rank
from foreroute.engine.certificate.memory.peak import Memory, memory_of_rows
from foreroute.engine.certificate.memory.sizes import Rows
from foreroute.engine.certificate.record import RankCounts, rank_counts
from foreroute.engine.data.documents import NO_STARTS, Starts
from foreroute.engine.data.tokens.vocab import Ids
from foreroute.engine.routing.planned_router import PlannedRouter
from foreroute.engine.routing.plans.row_plan import TableKeys

_LOOKED_AT = 8  # places of each k whose memory is computed


class Place(NamedTuple):
    """A rank in a step."""

    step: int  # 0-based
    rank: int


@dataclass(frozen=True, slots=True)
class Chosen:
    """A place and why it was chosen."""

    why: str
    place: Place


class _Candidate(NamedTuple):
    estimate: float
    place: Place
    k: int
    rows: Rows


@dataclass(slots=True)
class Places:
    """Takes in a run step by step, and chooses.

    Args:
        ranks: of which the places are; None for all.
        gpu: memory is that of a GPU.
    """

    layout: Layout
    vocab: int
    gpu: bool
    ranks: Sequence[int] | None = None
    _steps: list[int] = field(default_factory=list)
    _rows: list[NDArray[np.int64]] = field(default_factory=list)  # of each step, by rank: expert rows of all layers
    _bytes: list[NDArray[np.int64]] = field(default_factory=list)
    _candidates: dict[int, list[_Candidate]] = field(default_factory=dict)

    def add(self, counts: StepCounts) -> None:
        """Take in a step (certify's `also`)."""
        found = rank_counts(self.layout, counts)
        self._steps.append(counts.step)
        self._rows.append(found.computed_yrm.sum(axis=(0, 2))[self._wanted])
        self._bytes.append(found.bytes_yr.sum(axis=0)[self._wanted])
        self._add_memory(counts, found)

    def choose(self) -> list[Chosen]:
        """Return the places in the order of most rows, most bytes, most memory and the median of rows; one that is
        chosen for several reasons is named once."""
        by_why = {
            "most rows": self._most(self._rows),
            "most bytes": self._most(self._bytes),
            "most memory": self._most_memory(),
            "median of rows": self._median(),
        }
        if self.layout.placement.expert_ranks == 1:
            del by_why["most bytes"]  # nothing moves
        reasons: dict[Place, list[str]] = {}
        for why, place in by_why.items():
            reasons.setdefault(place, []).append(why)
        return [Chosen(", ".join(whys), place) for place, whys in reasons.items()]

    @property
    def _wanted(self) -> list[int]:
        return list(range(self.layout.placement.world_size) if self.ranks is None else self.ranks)

    def _place(self, number: int) -> Place:
        step, rank = divmod(number, len(self._wanted))
        return Place(self._steps[step], self._wanted[rank])

    def _most(self, values: list[NDArray[np.int64]]) -> Place:
        return self._place(int(np.argmax(np.stack(values))))

    def _median(self) -> Place:
        value_x = np.stack(self._rows).ravel()
        return self._place(int(np.argsort(value_x, kind="stable")[value_x.size // 2]))

    def _add_memory(self, counts: StepCounts, found: RankCounts) -> None:
        """Keep the places of a k that may need the most."""
        all_rows = [found.received_yrm.sum(axis=0), found.computed_yrm.sum(axis=0)]  # [r, m]
        received_r, computed_r = (rows_rm.max(axis=1)[self._wanted] for rows_rm in all_rows)
        width, hidden = self.layout.config.model.width, self.layout.config.moe.expert_width
        estimate_r = received_r * width + computed_r * hidden
        here = self._candidates.setdefault(counts.k, [])
        for number in np.argsort(-estimate_r, kind="stable")[:_LOOKED_AT]:
            estimate = float(estimate_r[number])
            if len(here) >= _LOOKED_AT and estimate <= here[-1].estimate:
                break
            rank = self._wanted[number]
            rows = rows_of(self.layout, counts, found, rank)
            here.append(_Candidate(estimate, Place(counts.step, rank), counts.k, rows))
            here.sort(key=lambda candidate: -candidate.estimate)
            del here[_LOOKED_AT:]

    def _most_memory(self) -> Place:
        found = [candidate for kept in self._candidates.values() for candidate in kept]
        best = max(
            found, key=lambda one: memory_of_rows(self.layout, self.vocab, one.k, one.rows, gpu=self.gpu).peak_bytes
        )
        return best.place


def rows_of(layout: Layout, counts: StepCounts, found: RankCounts, rank: int) -> Rows:
    """Return a rank's rows in a step, the most of its micro-batches.

    Args:
        found: rank_counts of the step.
    """
    received_ym, computed_ym = found.received_yrm[:, rank], found.computed_yrm[:, rank]
    group, place = divmod(rank, layout.placement.expert_ranks)
    count_ymE = counts.count_ymgE[:, :, group]
    local = count_ymE.shape[2] // layout.placement.expert_ranks
    return Rows(
        received=int(received_ym.max()),
        computed=int(computed_ym.max()),
        received_all=int(received_ym.sum(axis=0).max()),
        computed_all=int(computed_ym.sum(axis=0).max()),
        expert=int(count_ymE[..., place * local : (place + 1) * local].max()),
    )


class StepTables(NamedTuple):
    """The rows of n-gram tables in one place, as StepRows has them (engine/certificate/check.py)."""

    landed_t: NDArray[np.int64]
    sent_t: NDArray[np.int64]
    table_bytes_1: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Expected:
    """The certificate of one place."""

    k: int
    received_ym: NDArray[np.integer[Any]]
    computed_ym: NDArray[np.integer[Any]]
    bytes_y: NDArray[np.integer[Any]]
    memory: Memory  # of a rank with these rows
    counts: StepCounts  # of all ranks
    tables: StepTables | None  # rows of n-gram tables; None: there are none


def expected_at(
    layout: Layout,
    ids: Ids,
    routers: Sequence[PlannedRouter],
    place: Place,
    *,
    vocab: int,
    gpu: bool,
    document_starts: Starts = NO_STARTS,
    table_keys: Sequence[TableKeys] = (),
) -> Expected:
    """Count one place again; arguments as for certify (engine/certificate/counts/exact.py) and Places."""
    (counts,) = replay(layout, ids, routers, [place.step], document_starts)
    found = rank_counts(layout, counts)
    tables, of_rank = None, list[OfTable]()
    if table_keys:
        rows = RowCounter(layout, table_keys, layout.read(ids, document_starts)).count(place.step)
        of_rank = tables_of_rank(layout, table_keys, rows, place.rank, place.step)
        bytes_P = rows.link_bytes_PP(layout.table_row_bytes)[place.rank]
        landed_t, sent_t = rows.landed_tP[:, place.rank], rows.sent_tP[:, place.rank]
        tables = StepTables(landed_t, sent_t, bytes_P.sum(keepdims=True))
    memory = memory_of_rows(
        layout, vocab, counts.k, rows_of(layout, counts, found, place.rank), gpu=gpu, tables=of_rank
    )
    return Expected(
        counts.k,
        found.received_yrm[:, place.rank],
        found.computed_yrm[:, place.rank],
        found.bytes_yr[:, place.rank],
        memory,
        counts,
        tables,
    )


def with_streams(layout: Layout, streams: int) -> Layout:
    """Return the run with so many streams of a rank in a micro-batch; the text is cut into others."""
    config = layout.config
    total = streams * layout.placement.world_size * config.train.accumulation
    return replace(layout, config=replace(config, data=replace(config.data, streams=total)))
