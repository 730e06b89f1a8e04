"""From a configuration to the objects of a run: routers with their tables, and the initialised model."""

from pathlib import Path

import torch

from engine.config import Config, Router, Split
from engine.corpus import PreparedCorpus
from engine.model import TransformerXL
from engine.moe.routers import HashedRouter
from engine.moe.tables import build_tables


def build_routers(config: Config, corpus: PreparedCorpus) -> list[HashedRouter] | None:
    """Build a planned router for each table (or load the tables from the cache); None for live routers and dense."""
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
    return [HashedRouter(table) for table in tables]


def build_model(config: Config, vocab_size: int) -> TransformerXL:
    """Build the model with fp32 weights drawn from train.seed (sets PyTorch's global generator)."""
    torch.manual_seed(config.train.seed)
    model = TransformerXL(config.model, config.moe, config.kernels, vocab_size)
    model.recompute = config.train.recompute
    return model
