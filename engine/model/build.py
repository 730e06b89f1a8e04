"""From a configuration to the objects of a run: tables, routers, and the initialised model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from foreroute.engine.config import Config, CorpusConfig, ModelConfig, MoEConfig, Split
from foreroute.engine.config.model import expert_sections
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
    inputs = router_inputs(corpus, config.corpus, config.num_tables, config.train.seed)
    return _placed(config.model, config.moe, mesh, lambda method, own, _: method.build(own, inputs))


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
    splits = None if corpus is None else corpus.split
    inputs = RouterInputs(vocab_size, config.train.seed, config.num_tables, splits=splits)

    def restored(method: type[PlannedRouter], moe: MoEConfig, numbers: Sequence[int] | None) -> Sequence[PlannedRouter]:
        own = states if numbers is None else [states[number] for number in numbers if states]
        return method.restore(moe, inputs, [state for state in own if state])

    return _placed(config.model, config.moe, mesh, restored)


def router_states(routers: Sequence[PlannedRouter] | None) -> list[dict[str, Tensor]]:
    """Return what of each planned router belongs to the model and is saved with it; empty if no router has any."""
    states = [router.state() for router in routers or ()]
    return states if any(states) else []


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


_Make = Callable[[type[PlannedRouter], MoEConfig, Sequence[int] | None], Sequence[PlannedRouter]]


def _placed(model: ModelConfig, moe: MoEConfig, mesh: Mesh | None, make: _Make) -> list[PlannedRouter] | None:
    """Make the planned routers of all expert layers, or the one that they share, and let them plan for a rank.

    Layers of the same section `moe` are made together, as if all layers had it: a layer's router then is the one that
    it would have in such a run.

    Args:
        make: returns the routers of a class: those of these numbers among all planned ones, or those of all layers,
            which it also returns for None.
    """
    if not moe.by_layer:
        method = planned_method(moe)
        routers = [] if method is None else make(method, moe, None)
        return None if method is None else [router.place(mesh or Mesh()) for router in routers]
    sections = expert_sections(model, moe)
    layers = [layer for layer, section in enumerate(sections) if planned_method(section) is not None]
    found: dict[int, PlannedRouter] = {}
    for number, layer in enumerate(layers):
        if number in found:
            continue
        same = [other for other, at in enumerate(layers) if sections[at] == sections[layer]]
        method = planned_method(sections[layer])
        assert method is not None
        routers = make(method, sections[layer], same)
        places = range(len(same)) if len(routers) == len(same) else [layers[other] for other in same]
        found |= {other: routers[place] for other, place in zip(same, places, strict=True)}
    return [found[number].place(mesh or Mesh()) for number in range(len(layers))] or None


def build_model(config: Config, vocab_size: int, *, weights_seed: int | None = None) -> TransformerXL:
    """Build the model with fp32 weights drawn from train.seed (sets PyTorch's global generator).

    Args:
        weights_seed: of the weights alone, instead of train.seed; the keys at the input are always those of train.seed.

    Raises:
        UserError: the live router takes fewer experts of a token than training or evaluation ask for.
    """
    torch.manual_seed(config.train.seed if weights_seed is None else weights_seed)
    model = TransformerXL(
        config.model, config.moe, config.kernels, vocab_size, seed=config.train.seed, ngram_tables=config.ngram_tables
    )
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
