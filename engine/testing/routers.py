"""Short forms of planned routers for tests, and files for those that need some."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from foreroute.engine.config import MoEConfig, Split
from foreroute.engine.config.model import router_names
from foreroute.engine.data.corpus import PreparedCorpus
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.routing.methods import method_of
from foreroute.engine.routing.plan import Plan, Route
from foreroute.engine.routing.planned.given import create_routes, finish_routes
from foreroute.engine.routing.planned.hashed import HashedRouter
from foreroute.engine.routing.planned_router import Draw, GroupTokens, PlannedRouter
from foreroute.engine.routing.tables import Table


def routers_without_files() -> list[str]:
    """List the routers that come with this program and need no file; dense is one of them."""
    return [name for name in router_names() if not getattr(method_of(MoEConfig(router=name)), "needs_file", False)]


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


def with_files(moe: MoEConfig, corpus: PreparedCorpus, folder: Path, layers: int) -> MoEConfig:
    """Return the section with files of random routes in a folder if moe.router=given needs them."""
    if moe.router != "given":
        return moe
    files = {}
    for split in Split:
        path = folder / f"given-{split.name}.npy"
        files["file" if split is Split.train else f"{split.name}_file"] = str(path)
        if path.with_suffix(".json").exists():  # perhaps mapped by another run
            continue
        ids = corpus.split(split)
        found, weights = create_routes(path, (len(ids), layers, moe.experts))
        drawn = np.random.default_rng(0).random(found.shape)
        found[:], weights[:] = drawn.argsort(axis=2), 1.0 / moe.experts
        finish_routes(path, ids, moe.experts)
    return replace(moe, options=files)
