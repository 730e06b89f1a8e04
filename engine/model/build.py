"""From a configuration to the objects of a run: tables, routers, and the initialised model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from foreroute.engine.config import Config, Keys, MoEConfig, Router, Split
from foreroute.engine.data.corpus import PreparedCorpus
from foreroute.engine.model.input_tables import Signatures
from foreroute.engine.model.transformer_xl import TransformerXL
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.routing.planner import mixing_weights
from foreroute.engine.routing.routers import DrawnRouter, HashedRouter, PlannedRouter, routers_of
from foreroute.engine.routing.tables import Table, build_tables


@dataclass(frozen=True, slots=True)
class RunModel:
    """A run's model with its routers, its text and the configuration that made it."""

    config: Config
    corpus: PreparedCorpus
    model: TransformerXL
    routers: Sequence[PlannedRouter] | None  # planned ones; None for live routers and dense


def run_tables(config: Config, corpus: PreparedCorpus) -> list[Table]:
    """Build the tables of a run's hashed routing, or read them from the cache."""
    starts = corpus.document_starts(Split.train)
    return build_tables(
        config.moe,
        corpus.vocab.size,
        corpus.split(Split.train),
        documents=starts if len(starts) else None,
        num_tables=config.num_tables,
        seed=config.train.seed,
        cache_dir=Path(config.corpus.cache_dir) / "tables",
    )


def build_routers(config: Config, corpus: PreparedCorpus, mesh: Mesh | None = None) -> list[PlannedRouter] | None:
    """Build the planned routers, a hashed one with its table; None for live routers and dense.

    Args:
        mesh: this rank's place; one rank alone by default.
    """
    tables = run_tables(config, corpus) if config.moe.router is Router.hashed else []
    return planned_routers(config.moe, tables, mesh or Mesh(), num_tables=config.num_tables, seed=config.train.seed)


def planned_routers(
    moe: MoEConfig, tables: Sequence[Table], mesh: Mesh, *, num_tables: int, seed: int
) -> list[PlannedRouter] | None:
    """Make the planned routers of one rank; None for live routers and dense.

    Args:
        tables: of hashed routing.
        num_tables: orders that a router draws at each pass.
        seed: of what a router draws.
    """
    if moe.router is Router.hashed:
        return list(routers_of(tables, mesh, shuffled=moe.keys is Keys.shuffled))
    if moe.router in (Router.dense, Router.frozen, Router.learned):
        return None
    if moe.router not in (Router.fresh, Router.stochastic):
        raise NotImplementedError(f"planned_routers makes no router of moe.router={moe.router.name}")
    return [
        DrawnRouter(
            moe.experts,
            each_token=moe.router is Router.fresh,
            seed=seed,
            index=index,
            rank=mesh.ep_rank,
            ranks=mesh.ep_size,
        )
        for index in range(num_tables)
    ]


def router_tables(routers: Sequence[PlannedRouter] | None) -> list[Table]:
    """Return the tables of planned routers, a part of the model; others have none."""
    return [router.table for router in routers or () if isinstance(router, HashedRouter)]


def build_model(config: Config, vocab_size: int, *, weights_seed: int | None = None) -> TransformerXL:
    """Build the model with fp32 weights drawn from train.seed (sets PyTorch's global generator).

    Args:
        weights_seed: of the weights alone, instead of train.seed; the keys at the input are always those of train.seed.
    """
    torch.manual_seed(config.train.seed if weights_seed is None else weights_seed)
    model = TransformerXL(config.model, config.moe, config.kernels, vocab_size, seed=config.train.seed)
    model.recompute = config.train.recompute
    return model


def fill_signatures(run: RunModel) -> None:
    """Fill in the signatures of the tables that hashed routing would have, if the model has signatures."""
    if isinstance(run.model.input_tables, Signatures):
        tables = run_tables(run.config, run.corpus)
        run.model.input_tables.fill([mixing_weights(table, run.config.schedule.k_max) for table in tables])
