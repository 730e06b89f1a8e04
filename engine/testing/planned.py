"""The plans of all ranks together, for tests of planned routers."""

import copy
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from foreroute.engine.certificate.counts.layout import Layout
from foreroute.engine.data.planned_batches import group_batch, plan_batch
from foreroute.engine.data.tokens.vocab import Ids
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.routing.plan import Plan
from foreroute.engine.routing.planned_router import GroupTokens, PlannedRouter


def plans_of(router: PlannedRouter, tokens: GroupTokens, k: int, *, chunks: int = 1) -> list[Plan]:
    """Plan a micro-batch on every rank of its expert group; the weights must not be live."""
    ranks = tokens.shape[0]
    return [copy.copy(router).place(Mesh(rank, ranks, ranks)).plan(tokens, k, chunks=chunks) for rank in range(ranks)]


def planned_weights(plans: Sequence[Plan]) -> dict[tuple[int, int], float]:
    """Return the weight of each pair of a token of the group, numbered rank by rank, and an expert that it uses.

    Raises:
        AssertionError: two ranks compute the same pair.
    """
    found: dict[tuple[int, int], float] = {}
    for plan in plans:
        local = plan.count_E.numel() // len(plans)
        for chunk in plan.chunks:
            assert chunk.weight_N is not None
            token_N = chunk.rows.source_N if chunk.received_R is None else chunk.received_R[chunk.rows.source_N]
            expert_N = plan.rank * local + chunk.rows.expert_N()
            pairs = list(zip(token_N.tolist(), expert_N.tolist(), strict=True))
            assert len(set(pairs)) == len(pairs) and not found.keys() & set(pairs)
            found |= dict(zip(pairs, chunk.weight_N.tolist(), strict=True))
    return found


def planned_counts(
    layout: Layout, ids: Ids, routers: Sequence[PlannedRouter], step: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Count the rows in the plans of a step's layers and micro-batches: sent_ymgPP and count_ymgE, as
    engine/certificate/counts/replay.py has them from the tables alone."""
    place, accumulation = layout.placement, layout.config.train.accumulation
    streams, k = layout.read(ids), layout.k(step)
    sizes = layout.config.model.layers, accumulation, place.groups, place.expert_ranks
    sent_ymgPP = np.zeros((*sizes, place.expert_ranks), np.int64)
    count_ymgPL = np.full((*sizes, layout.local_experts), -1, np.int64)
    for micro in range(accumulation):
        for rank in range(place.world_size):
            mesh = Mesh(rank, place.world_size, place.expert_ranks)
            shares = [
                streams.streams_of(other, micro, world=place.world_size, accumulation=accumulation)
                for other in mesh.ep_ranks
            ]
            batch = group_batch([streams.batch(step, share) for share in shares], mesh.ep_rank)
            own = [copy.copy(router).place(mesh) for router in routers]
            routing = plan_batch(batch, k, own).routing
            for layer in range(sizes[0]):
                plan = routing.plan_of(layer)
                assert plan is not None
                at = layer, micro, rank // place.expert_ranks
                sent_ymgPP[*at, mesh.ep_rank] = plan.send_splits
                count_PL = plan.count_E.numpy().reshape(place.expert_ranks, -1)
                count_ymgPL[*at, :, : count_PL.shape[1]] = count_PL
    return sent_ymgPP, count_ymgPL.reshape(*sizes[:3], -1)
