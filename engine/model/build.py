"""From a configuration to the objects of a run: routers with their tables, and the initialised model."""

from collections.abc import Sequence
from pathlib import Path

import torch

from foreroute.engine.config import Config, Keys, Router, Split
from foreroute.engine.data.corpus import PreparedCorpus
from foreroute.engine.model.input_tables import Signatures
from foreroute.engine.model.transformer_xl import TransformerXL
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.routing.planner import mixing_weights
from foreroute.engine.routing.routers import DrawnRouter, HashedRouter, PlannedRouter, routers_of
from foreroute.engine.routing.tables import Table, build_tables


def build_routers(config: Config, corpus: PreparedCorpus, mesh: Mesh | None = None) -> list[PlannedRouter] | None:
    """Build the planned routers, for a hashed one with its table from the cache if it is there; None for live routers
    and dense.

    Args:
        mesh: this rank's place; one rank alone by default.
    """
    tables = _build_tables(config, corpus) if config.moe.router is Router.hashed else []
    return planned_routers(config, tables, mesh or Mesh())


def planned_routers(config: Config, tables: Sequence[Table], mesh: Mesh) -> list[PlannedRouter] | None:
    """Make the run's planned routers for this rank, of hashed routing by these tables; None for live routers and
    dense."""
    router = config.moe.router
    if router is Router.hashed:
        return list(routers_of(tables, mesh, shuffled=config.moe.keys is Keys.shuffled))
    if router in (Router.dense, Router.frozen, Router.learned):
        return None
    if router not in (Router.fresh, Router.stochastic):
        raise NotImplementedError(f"planned_routers makes no router of moe.router={router.name}")
    return [
        DrawnRouter(
            config.moe.experts,
            each_token=router is Router.fresh,
            seed=config.train.seed,
            index=index,
            rank=mesh.ep_rank,
            ranks=mesh.ep_size,
        )
        for index in range(config.num_tables)
    ]


def router_tables(routers: Sequence[PlannedRouter] | None) -> list[Table]:
    """Give the tables of planned routers, a part of the model; others have none."""
    return [router.table for router in routers or () if isinstance(router, HashedRouter)]


def fill_signatures(model: TransformerXL, config: Config, corpus: PreparedCorpus) -> None:
    """Give a model with signatures those of the tables that hashed routing would have; others are left as they are."""
    if isinstance(model.input_tables, Signatures):
        tables = _build_tables(config, corpus)
        model.input_tables.fill([mixing_weights(t, config.schedule.k_max) for t in tables])


def _build_tables(config: Config, corpus: PreparedCorpus) -> list[Table]:
    return build_tables(
        config.moe,
        corpus.vocab.size,
        corpus.split(Split.train),
        num_tables=config.num_tables,
        seed=config.train.seed,
        cache_dir=Path(config.corpus.cache_dir) / "tables",
    )


def build_model(config: Config, vocab_size: int, *, weights_seed: int | None = None) -> TransformerXL:
    """Build the model with fp32 weights drawn from train.seed (sets PyTorch's global generator).

    Args:
        weights_seed: of the weights alone, instead of train.seed; the keys at the input are always those of train.seed.
    """
    torch.manual_seed(config.train.seed if weights_seed is None else weights_seed)
    model = TransformerXL(config.model, config.moe, config.kernels, vocab_size, seed=config.train.seed)
    model.recompute = config.train.recompute
    return model
