"""Options that a run does not use: each rule has its condition, its reason and its options.

launch/train.py reports those of them that were given. Each rule repeats the option's help text: add one where a user
might expect an effect.
"""

from collections.abc import Iterable, Iterator

from foreroute.engine.config.enums import Decay, Growth, Router, RouteWeights
from foreroute.engine.config.run import Config

_DENSE = (
    "schedule.growth",
    "schedule.k_min",
    "schedule.steps",
    "eval.k",
    "kernels.backend",
    "kernels.mode",
    "kernels.debug",
    "kernels.masked_from_k",
    "parallel.exchange",
    "parallel.wire",
    "parallel.chunks",
    "parallel.expert_ranks",
)
_TABLE = ("moe.ngram", "moe.rows", "moe.builder", "moe.pack", "moe.weights", "moe.spread")
_LEARNED = ("moe.balance_loss", "moe.balance_over", "moe.z_loss")
_ONE_RANK = ("parallel.exchange", "parallel.wire", "parallel.chunks", "parallel.peer_ids")


def rules(config: Config) -> Iterator[tuple[bool, str, tuple[str, ...]]]:
    """Yield (whether the run does not use the options, the reason, the options) of each rule."""
    router, router_is = config.moe.router, f"moe.router={config.moe.router.name}"
    dense, no_table = router is Router.dense, router is not Router.hashed and not config.model.signatures
    yield dense, router_is, _DENSE
    yield dense and not config.model.signatures, router_is, ("schedule.k_max",)
    yield no_table, router_is, _TABLE
    yield no_table and router not in (Router.fresh, Router.stochastic), router_is, ("moe.share_table",)
    yield router is not Router.learned, router_is, _LEARNED
    yield router is not Router.stochastic, router_is, ("moe.consistency",)
    all_layers = config.expert_layers == config.model.layers
    yield all_layers, "moe.layers takes in every layer", ("moe.plain_width",)
    yield config.moe.weights is RouteWeights.uniform, "moe.weights=uniform", ("moe.spread",)
    yield config.model.ngram == 0, "model.ngram=0", ("model.ngram_rows",)
    constant_k = config.schedule.growth is Growth.constant
    yield constant_k, "schedule.growth=constant", ("schedule.k_min", "schedule.steps")
    yield config.optim.decay is Decay.constant, "optim.decay=constant", ("optim.final_lr",)
    yield config.train.valid_every == 0, "train.valid_every=0", ("train.valid_symbols",)
    yield config.parallel.expert_ranks == 1, "parallel.expert_ranks=1", _ONE_RANK


def unused(config: Config, given: Iterable[str]) -> dict[str, str]:
    """Return the given options, by their full names, that the run does not use, each with the first reason.

    Example: of moe.spread and optim.lr a run with moe.router=learned does not use the first.
    """
    given = set(given)
    found: dict[str, str] = {}
    for holds, reason, options in rules(config):
        if holds:
            found |= {name: reason for name in options if name in given and name not in found}
    return found
