"""From a configuration to the objects of a run: routers with their tables, and the initialised model."""

from pathlib import Path

import torch

from engine.config import Config, Router, Split
from engine.corpus import PreparedCorpus
from engine.model import TransformerXL
from engine.moe.routers import HashedRouter, routers_of
from engine.moe.tables import build_tables
from engine.parallel.mesh import Mesh


def build_routers(
    config: Config, corpus: PreparedCorpus, mesh: Mesh | None = None
) -> list[HashedRouter] | None:
    """Build a planned router for each table (or load the tables from the cache); None for live routers and dense.

    Args:
        mesh: this rank's place; one rank alone by default.
    """
    if config.moe.router is not Router.hashed:
        return None
    tables = build_tables(
        config.moe,
        corpus.vocab.size,
        corpus.split(Split.train),
        num_tables=1 if config.moe.share_table else config.model.layers,
        seed=config.train.seed,
        cache_dir=Path(config.corpus.cache_dir) / "tables",
    )
    return routers_of(tables, mesh or Mesh())


def build_model(config: Config, vocab_size: int) -> TransformerXL:
    """Build the model with fp32 weights drawn from train.seed (sets PyTorch's global generator)."""
    torch.manual_seed(config.train.seed)
    model = TransformerXL(config.model, config.moe, config.kernels, vocab_size)
    model.recompute = config.train.recompute
    return model
