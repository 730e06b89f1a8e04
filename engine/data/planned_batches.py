"""The batches of each step with their plans: a pure function of (step, micro-batch), configuration and tables.

The loader (engine/data/loader.py) has them read and planned in its thread, ahead of the step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from foreroute.engine.config import Config, PeerIds, Split
from foreroute.engine.data.streams import Batch, Streams
from foreroute.engine.parallel.cpu_group import CpuGroup
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.routing.k_schedule import active_experts
from foreroute.engine.routing.methods import training_passes
from foreroute.engine.routing.plan import Plan, Routing, layer_seeds
from foreroute.engine.routing.planned_router import Draw, GroupTokens, Places, PlannedRouter, plan_all
from foreroute.engine.routing.plans.exchange_choice import gathers
from foreroute.engine.routing.plans.row_plan import NO_ROWS, TableKeys, TableRows, plan_rows

_SECOND_SEED = 2**31  # beyond all steps: seeds of first passes are neighbours


@dataclass(frozen=True, slots=True)
class GroupBatch:
    """A rank's own batch, and the ids and contexts of the whole expert group, rank by rank, for planning."""

    own: Batch
    ids_PBQ: Tensor  # int64
    left_PBC: Tensor  # int64
    stream_PB: Tensor  # int64: global stream of each row
    new_document_PBX: Tensor | None = None  # bool: as Batch.new_document_BX
    place_PB: Tensor | None = None  # int64: as Batch.place_B
    real_PBQ: Tensor | None = None  # bool: as Batch.real_BQ; all batches of a group have one, or none has


@dataclass(frozen=True, slots=True)
class PlannedBatch:
    """A batch and everything its forward pass needs to know about routing."""

    group: GroupBatch  # on the host
    batch: Batch  # this rank's own
    routing: Routing
    copied: torch.cuda.Event | None = None  # of the copy to a GPU
    prepare_ms: float = field(default=0.0, compare=False)
    """The time in which the loader's thread read and planned the batch."""


def group_batch(batches: Sequence[Batch], own: int = 0) -> GroupBatch:
    """Stack the batches of an expert group; `own` is this rank's number in it."""
    marks = [mark_BX for batch in batches if (mark_BX := batch.new_document_BX) is not None]
    places = [batch.place_B for batch in batches if batch.place_B is not None]
    real = [batch.real_BQ for batch in batches if batch.real_BQ is not None]
    return GroupBatch(
        batches[own],
        torch.stack([batch.ids_BQ for batch in batches]),
        torch.stack([batch.left_BC for batch in batches]),
        torch.stack([batch.stream_B for batch in batches]),
        torch.stack(marks) if marks else None,
        torch.stack(places) if places else None,
        torch.stack(real) if real else None,
    )


def share_ids(alone: GroupBatch, cpu_group: CpuGroup) -> GroupBatch:
    """Add what the other ranks of the expert group read, by one exchange of ids, left contexts, stream numbers and
    places, and of the starts of documents where they are known; streams have no padding."""
    own, mark_PBX, place_PB = alone.own, alone.new_document_PBX, alone.place_PB
    parts = [own.left_BC, own.ids_BQ, own.stream_B[:, None]]
    if place_PB is not None:
        parts.append(place_PB[0, :, None].view(torch.int32))
    if mark_PBX is not None:
        parts.append(mark_PBX[0])
    found = torch.from_numpy(cpu_group.all_gather(torch.cat(parts, dim=1).numpy().astype(np.int32)))
    split = iter(found.split([part.shape[1] for part in parts], dim=2))
    left_PBC, ids_PBQ, stream_PB1 = (next(split).long().contiguous() for _ in range(3))
    if place_PB is not None:
        place_PB = next(split).clone(memory_format=torch.contiguous_format).view(torch.int64)[..., 0]
    if mark_PBX is not None:
        mark_PBX = next(split).bool()
    return GroupBatch(own, ids_PBQ, left_PBC, stream_PB1[..., 0], mark_PBX, place_PB)


def plan_batch(
    group: GroupBatch,
    k: int,
    routers: Sequence[PlannedRouter] | None,
    *,
    gather: bool = False,
    chunks: int = 1,
    passes: int = 1,
    split: Split = Split.train,
    held_out: bool = False,
    cutoffs: Sequence[int] = (),
    dropout_seed: int = 0,
    layers: int = 0,
    reset_memory: bool = False,
    table_rows: TableRows = NO_ROWS,
) -> PlannedBatch:
    """Plan the batch for each router; without routers, pass it on with its k.

    Args:
        gather: for the exchange of all rows (engine/routing/plans/exchange_choice.py says when).
        chunks: parts that are exchanged one after the other.
        passes: over the batch, 1 or 2, each with plans of its own.
        split: of which the group's places are.
        held_out: the batch is not trained on; what is drawn then depends on batch.index and streams alone.
        cutoffs: of the model's adaptive softmax, if it has one.
        dropout_seed: of (run, step), for the experts' stateless dropout.
        layers: expert layers, which have a seed of it each; 0 where there is no dropout.
        reset_memory: attention and memory stop at document starts, as keys do (data.reset_memory).
        table_rows: of the batch, as plan_rows finds them.
    """
    segment = group.ids_PBQ.shape[2]
    token_PT = (group.stream_PB[..., None] * segment + torch.arange(segment)).flatten(1)
    draw = Draw(token_PT.numpy(), group.own.index, held_out)

    own = group.own
    token_T = token_PT.flatten()
    tails = tail_tokens(group.own.targets_BQ, cutoffs)
    places = None if group.place_PB is None else Places(split, group.place_PB)
    tokens = GroupTokens(
        group.ids_PBQ, group.left_PBC, group.new_document_PBX, draw, places=places, real_PBQ=group.real_PBQ
    )

    def routing(number: int) -> Routing:
        plans: tuple[Plan, ...] | None = None
        if routers is not None:
            plans = plan_all(routers, tokens.at_pass(number), k, gather=gather, chunks=chunks)
        return Routing(
            k,
            plans,
            token_T,
            dropout_seed=layer_seeds(dropout_seed + number * _SECOND_SEED, layers) if layers else 0,
            position_BQ=own.position_BQ if reset_memory else None,
            tail_tokens=tails,
            real_T=None if own.real_BQ is None else own.real_BQ.flatten(),
            row_plans=table_rows.plans if number == 0 else (),
            landed_BQH=table_rows.landed_BQH,
            second=routing(1) if number + 1 < passes else None,
        )

    return PlannedBatch(group, group.own, routing(0))


def tail_tokens(targets_BQ: Tensor, cutoffs: Sequence[int]) -> tuple[Tensor, ...]:
    """Return for each cluster that begins at a cut-off the tokens whose targets it has, int64, in order.

    Example: targets [[0, 7, 3, 5]] and cut-offs 3 and 6 give [2, 3] and [1].
    """
    target_T = targets_BQ.flatten()
    ends = zip(cutoffs, [*cutoffs[1:], torch.iinfo(torch.int64).max], strict=True) if cutoffs else ()
    return tuple(((target_T >= first) & (target_T < stop)).nonzero().squeeze(1) for first, stop in ends)


@dataclass(frozen=True, slots=True)
class TrainingBatches:
    """One rank's batches."""

    config: Config
    streams: Streams
    mesh: Mesh
    routers: Sequence[PlannedRouter] | None  # planned ones; None for live routers and dense
    planning_group: CpuGroup = field(default_factory=CpuGroup)  # asks the expert group for its ids
    table_keys: Sequence[TableKeys] = ()  # of the model
    planning: CpuGroup = field(default_factory=CpuGroup)  # tells all ranks which rows of the tables are read
    rows_of_step: dict[int, list[TableRows]] = field(default_factory=dict)  # of the last step that was planned

    def planned(self, step: int, micro: int) -> PlannedBatch:
        """Read a micro-batch and plan it at the k of its step."""
        return self.plan(self.read(step, micro), self.k(step), self._table_rows(step, micro))

    def read(self, step: int, micro: int) -> GroupBatch:
        """Read a micro-batch: all streams of the expert group, or this rank's and, by an exchange, the others."""
        mesh = self.mesh
        alone = mesh.ep_size == 1 or self.config.parallel.peer_ids is PeerIds.exchange
        batches = [
            self.streams.batch(step, self.streams_of(rank, micro)) for rank in ([mesh.rank] if alone else mesh.ep_ranks)
        ]
        if alone:
            return share_ids(group_batch(batches), self.planning_group)
        return group_batch(batches, mesh.ep_rank)

    def _table_rows(self, step: int, micro: int) -> TableRows:
        """Plan the rows of all micro-batches of a step with its first one."""
        if self.table_keys and step not in self.rows_of_step:
            own = self.passes(step, self.mesh.rank)
            self.rows_of_step.clear()
            self.rows_of_step[step] = plan_rows(self.table_keys, own, self.hosts(step))
        return self.rows_of_step[step][micro] if self.table_keys else NO_ROWS

    def hosts(self, step: int) -> CpuGroup:
        """Return all ranks' hosts, who ask each other for the rows of a step."""
        return self.planning

    def passes(self, step: int, rank: int) -> list[Batch]:
        """Read all micro-batches of a rank in a step."""
        micros = range(self.config.train.accumulation)
        return [self.streams.batch(step, self.streams_of(rank, micro)) for micro in micros]

    def plan(self, group: GroupBatch, k: int, table_rows: TableRows = NO_ROWS) -> PlannedBatch:
        """Plan a micro-batch at k active experts, for as many passes as the step makes over it."""
        config, tokens = self.config, group.own.ids_BQ.numel()
        gather = gathers(
            config.parallel,
            config.moe,
            config.model.width,
            config.train.precision,
            ranks=self.mesh.ep_size,
            k=k,
            tokens=tokens,
        )
        return plan_batch(
            group,
            k,
            self.routers,
            gather=gather,
            chunks=self.config.parallel.chunks,
            passes=training_passes(self.config.model, self.config.moe),
            cutoffs=self.config.model.cutoffs,
            dropout_seed=self.config.train.seed * 2**32 + group.own.index,
            layers=self.config.expert_layers if self.config.model.dropout else 0,
            reset_memory=self.config.data.reset_memory,
            table_rows=table_rows,
        )

    def k(self, step: int) -> int:
        """Return the active experts of a step."""
        return active_experts(self.config.schedule, step, self.config.schedule_steps)

    def streams_of(self, rank: int, micro: int) -> range:
        """Return the global streams of a rank in a micro-batch."""
        accumulation = self.config.train.accumulation
        return self.streams.streams_of(rank, micro, world=self.mesh.world, accumulation=accumulation)
