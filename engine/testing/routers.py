"""Short forms of planned routers for tests."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.routing.plan import Plan, Route
from foreroute.engine.routing.planned.hashed import HashedRouter
from foreroute.engine.routing.planned_router import Draw, GroupTokens, PlannedRouter
from foreroute.engine.routing.tables import Table


def hashed(table: Table, *, rank: int = 0, ranks: int = 1, **options: Any) -> HashedRouter:
    """Make the router of a table, at a place in an expert group; options of HashedRouter."""
    return HashedRouter(table, **options).place(Mesh(rank, ranks, ranks))


def hashed_of(tables: Sequence[Table], mesh: Mesh) -> list[HashedRouter]:
    """Make the router of each table, at this rank's place."""
    return [HashedRouter(table).place(mesh) for table in tables]


def plan_of(
    router: PlannedRouter, ids_PBQ: Tensor, left_PBC: Tensor, k: int, draw: Draw | None = None, **options: Any
) -> Plan:
    """Plan ids of a whole expert group; options of PlannedRouter.plan."""
    return router.plan(GroupTokens(ids_PBQ, left_PBC, draw=draw), k, **options)


def route_of(router: PlannedRouter, ids_BQ: Tensor, left_BC: Tensor, k: int) -> Route:
    """Route the ids of one rank."""
    return router.route(GroupTokens(ids_BQ[None], left_BC[None]), k)
