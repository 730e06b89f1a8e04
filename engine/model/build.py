"""From a configuration to the objects of a run: tables, routers, and the initialised model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from foreroute.engine.config import Config, CorpusConfig, Split
from foreroute.engine.data.corpus import PreparedCorpus
from foreroute.engine.errors import require
from foreroute.engine.model.input_tables import Signatures
from foreroute.engine.model.transformer_xl import TransformerXL
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.routing.live_router import LiveRouter
from foreroute.engine.routing.methods import planned_method
from foreroute.engine.routing.planned.hashed import HashedRouter
from foreroute.engine.routing.planned_router import PlannedRouter, RouterInputs


@dataclass(frozen=True, slots=True)
class RunModel:
    """A run's model with its routers, its text and the configuration that made it."""

    config: Config
    corpus: PreparedCorpus
    model: TransformerXL
    routers: Sequence[PlannedRouter] | None  # planned ones; None for live routers and dense


def build_routers(config: Config, corpus: PreparedCorpus, mesh: Mesh | None = None) -> list[PlannedRouter] | None:
    """Build the planned routers, those with tables from the text or the cache; None for live routers and dense.

    Args:
        mesh: this rank's place; one rank alone by default.
    """
    method = planned_method(config.moe)
    if method is None:
        return None
    inputs = router_inputs(corpus, config.corpus, config.num_tables, config.train.seed)
    return _placed(method.build(config.moe, inputs), mesh)


def restore_routers(
    config: Config,
    states: Sequence[Mapping[str, Tensor]],
    vocab_size: int,
    mesh: Mesh | None = None,
    *,
    corpus: PreparedCorpus | None = None,
) -> list[PlannedRouter] | None:
    """Make the planned routers again from what router_states returned; None for live routers and dense.

    Args:
        corpus: of the run, for routers whose routes belong to its text.
    """
    method = planned_method(config.moe)
    if method is None:
        return None
    splits = None if corpus is None else corpus.split
    inputs = RouterInputs(vocab_size, config.train.seed, config.num_tables, splits=splits)
    return _placed(method.restore(config.moe, inputs, states), mesh)


def router_states(routers: Sequence[PlannedRouter] | None) -> list[dict[str, Tensor]]:
    """Return what of planned routers belongs to the model and is saved with it; others have none."""
    return [state for router in routers or () if (state := router.state())]


def router_inputs(corpus: PreparedCorpus, where: CorpusConfig, number: int, seed: int) -> RouterInputs:
    """Return what the planned routers of a run are made from.

    Args:
        number: of routers.
    """
    starts = corpus.document_starts(Split.train)
    return RouterInputs(
        corpus.vocab.size,
        seed,
        number,
        corpus.split(Split.train),
        starts if len(starts) else None,
        Path(where.cache_dir) / "tables",
        corpus.split,
    )


def _placed(routers: Sequence[PlannedRouter], mesh: Mesh | None) -> list[PlannedRouter]:
    return [router.place(mesh or Mesh()) for router in routers]


def build_model(config: Config, vocab_size: int, *, weights_seed: int | None = None) -> TransformerXL:
    """Build the model with fp32 weights drawn from train.seed (sets PyTorch's global generator).

    Args:
        weights_seed: of the weights alone, instead of train.seed; the keys at the input are always those of train.seed.

    Raises:
        UserError: the live router takes fewer experts of a token than training or evaluation ask for.
    """
    torch.manual_seed(config.train.seed if weights_seed is None else weights_seed)
    model = TransformerXL(config.model, config.moe, config.kernels, vocab_size, seed=config.train.seed)
    model.recompute = config.train.recompute
    for router in (module for module in model.modules() if isinstance(module, LiveRouter)):
        for name, k in (("schedule.k_max", config.schedule.k_max), ("eval.k", max(config.eval.k, default=0))):
            require(k <= router.most, f"{name}={k}: must be at most {router.most} for moe.router={config.moe.router}")
    return model


def fill_signatures(run: RunModel) -> None:
    """Fill in the signatures of the tables that hashed routing would have, if the model has signatures."""
    if isinstance(run.model.input_tables, Signatures):
        config, columns = run.config, run.config.moe.columns
        inputs = router_inputs(run.corpus, config.corpus, config.num_tables, config.train.seed)
        routers = HashedRouter.build(config.moe, inputs)
        sets = [router.row_sets(config.schedule.k_max) for router in routers]
        run.model.input_tables.fill([found.dense_weights(columns) for found in sets])
