"""What each step of a run trains on, with its plans: a pure function of (step, micro-batch), configuration and tables.

The trainer's loader (engine/loader.py) calls `read` and `plan` in its thread, ahead of the step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.config import Config, PeerIds
from engine.data import Streams
from engine.loader import GroupBatch, PlannedBatch, group_batch, plan_batch, share_ids
from engine.moe.auto import gathers
from engine.moe.keys import KeyRows
from engine.moe.routers import PlannedRouter
from engine.moe.schedule import active_experts
from engine.parallel.host import Host
from engine.parallel.mesh import Mesh


@dataclass(frozen=True, slots=True)
class TrainingBatches:
    """One rank's batches."""

    config: Config
    streams: Streams
    mesh: Mesh
    routers: Sequence[PlannedRouter] | None  # planned ones; None for live routers and dense
    input_keys: Sequence[KeyRows] = ()  # of the tables at the input of the model
    planning_group: Host = field(default_factory=Host)  # asks the expert group for its ids

    def read(self, step: int, micro: int) -> GroupBatch:
        """Read a micro-batch: all of the expert group's streams, or this rank's, and ask the others for theirs."""
        mesh = self.mesh
        alone = mesh.expert_ranks == 1 or self.config.parallel.peer_ids is PeerIds.exchange
        batches = [
            self.streams.batch(step, self.streams_of(rank, micro))
            for rank in ([mesh.rank] if alone else mesh.group_ranks)
        ]
        if alone:
            return share_ids(group_batch(batches), self.planning_group)
        return group_batch(batches, mesh.expert_rank)

    def plan(self, group: GroupBatch, k: int) -> PlannedBatch:
        """Plan a micro-batch at k active experts, for as many passes as the step makes over it."""
        gather = gathers(self.config, self.mesh.expert_ranks, k, group.own.ids_BQ.numel())
        return plan_batch(
            group, k, self.routers, gather=gather, chunks=self.config.parallel.chunks,
            passes=self.config.training_passes, input_keys=self.input_keys,
        )  # fmt: skip

    def k(self, step: int) -> int:
        """Give the active experts of a step."""
        return active_experts(self.config.schedule, step, self.config.schedule_steps)

    def streams_of(self, rank: int, micro: int) -> range:
        """Give the global streams of a rank in a micro-batch."""
        accumulation = self.config.train.accumulation
        return self.streams.streams_of(
            rank, micro, world=self.mesh.world, accumulation=accumulation
        )
