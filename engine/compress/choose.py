"""The choice of the experts of a trained run that are merged or pruned.

Use is exact: the table says which experts a row uses, and the text how often it has the row. Likeness of outputs is
measured on the hidden states that the layer reads on that text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from foreroute.engine.checkpoint.trained_run import SavedRun
from foreroute.engine.compress import groups
from foreroute.engine.compress.groups import Groups
from foreroute.engine.config import Builder, MoEConfig, RouteWeights, Split
from foreroute.engine.errors import require
from foreroute.engine.evaluation.expert_analysis import observe, outputs_of_all
from foreroute.engine.routing.methods import method_of
from foreroute.engine.routing.planned.hashed import HashedRouter
from foreroute.engine.routing.planned_router import RouterInputs
from foreroute.engine.routing.tables import row_uses


class Method(Enum):
    """How a model is made smaller."""

    merge = "merge"  # experts that are alike become one
    prune = "prune"  # the least used experts are dropped
    int8 = "int8"  # experts keep their matrices in a quarter of the bytes, for evaluation alone


class By(Enum):
    """The number by which experts are merged or pruned."""

    outputs = "outputs"  # merged: the distance between two experts' outputs for the same hidden states
    use = "use"  # merged: the share of tokens that use both; pruned: the tokens that use an expert
    random = "random"  # a control


@dataclass(frozen=True, slots=True)
class Request:
    """How the experts of each layer are chosen."""

    method: Method
    by: By
    experts: int  # that are left
    k: int  # at which use is counted
    split: Split  # on which it is counted
    symbols: int  # for outputs: the first so many of the split
    seed: int  # of a random choice


@dataclass(frozen=True, slots=True)
class Choice:
    """The groups of the experts that a table routes to, and their use; layers that share a table have the same."""

    groups: Groups
    use_E: NDArray[np.float64]  # tokens of the text that use each expert


def check_run(moe: MoEConfig, request: Request, ranks: int) -> None:
    """Check that the experts of a run can be merged or pruned.

    Args:
        ranks: that will share the experts.

    Raises:
        UserError: they cannot.
    """
    require(not moe.dense, "moe.router=dense: the run has no experts")
    require(not moe.by_layer, "moe.by_layer: must be empty: experts of layers that differ are not merged or pruned")
    method = method_of(moe)
    has_tables = method is not None and issubclass(method, HashedRouter)
    words = "has no tables of all experts that could be rewritten, as hashed, by_frequency and top_p have"
    require(has_tables, f"moe.router={moe.router}: {words}")
    live = moe.weights is RouteWeights.live
    require(not live, "moe.weights=live: its gate weighs each expert by itself; only fixed weights can be rewritten")
    experts, most = request.experts, moe.experts - 1
    require(1 <= experts <= most, f"experts={experts}: must be 1 to {most}, as the run has {moe.experts}")
    require(experts % ranks == 0, f"experts={experts}: must be divisible by ranks={ranks}, which share them")
    no_outputs = request.method is Method.merge or request.by is not By.outputs
    require(no_outputs, "by=outputs: goes with method=merge; method=prune takes use or random")


def choose(run: SavedRun, request: Request) -> list[Choice]:
    """Choose what becomes of the experts of each table.

    Raises:
        UserError: experts are pruned that were merged before.
    """
    routers, random = _routers(run), np.random.default_rng(request.seed)
    freq_tr = _frequencies(run, routers, request.split)
    use_tE = [groups.uses(router, freq_r, request.k) for router, freq_r in zip(routers, freq_tr, strict=True)]
    if request.method is Method.prune:
        again = any(router.table.order_rE.shape[1] > router.columns for router in routers)
        require(not again, "method=prune: experts of the run were merged, and rows list them unequally often")
        score_tE = [random.random(len(use_E)) if request.by is By.random else use_E for use_E in use_tE]
        found = [groups.kept(score_E, request.experts) for score_E in score_tE]
    else:
        like_tEE = _likeness(run, routers, freq_tr, request, random)
        pairs = zip(use_tE, like_tEE, strict=True)
        found = [groups.merged(use_E, like_EE, request.experts) for use_E, like_EE in pairs]
    return [Choice(*pair) for pair in zip(found, use_tE, strict=True)]


def smaller(moe: MoEConfig, experts: int) -> MoEConfig:
    """Return the section of a run with so many experts, whose tables have no blocks."""
    builder = Builder.balanced if moe.builder is Builder.packed else moe.builder
    return replace(moe, experts=experts, builder=builder, pack=None)


def _routers(run: SavedRun) -> list[HashedRouter]:
    return [router for router in run.routers or () if isinstance(router, HashedRouter)]


def _frequencies(run: SavedRun, routers: Sequence[HashedRouter], split: Split) -> NDArray[np.int64]:
    """Return how many tokens of a split have each row of each table [t, r]."""
    starts = run.corpus.document_starts(split)
    inputs = RouterInputs(
        run.corpus.vocab.size,
        run.config.train.seed,
        len(routers),
        run.corpus.split(split),
        starts if len(starts) else None,
    )
    return row_uses([router.table for router in routers], inputs)


def _likeness(
    run: SavedRun,
    routers: Sequence[HashedRouter],
    freq_tr: NDArray[np.int64],
    request: Request,
    random: np.random.Generator,
) -> list[NDArray[np.float64]]:
    """Return how alike each two experts are, by table."""
    if request.by is By.random:
        return [random.random((router.experts, router.experts)) for router in routers]
    if request.by is By.use:
        return [groups.shared_use(router, freq_r, request.k) for router, freq_r in zip(routers, freq_tr, strict=True)]
    seen = observe(run, k=request.k, symbols=request.symbols, split=request.split)
    like_lEE = [groups.output_likeness(outputs_of_all(layer, request.symbols)) for layer in seen]
    return [np.mean(like_lEE[table :: len(routers)], axis=0) for table in range(len(routers))]
