"""Options that a run does not use: each rule has its condition, its reason and its options.

launch/train.py reports those of them that were given. Each rule repeats the option's help text: add one where a user
might expect an effect.
"""

from collections.abc import Iterable
from typing import NamedTuple

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


class Rule(NamedTuple):
    """Whether a run does not use some options, and why."""

    holds: bool
    reason: str
    options: tuple[str, ...]


def rules(config: Config) -> list[Rule]:
    """List the rules of a run."""
    router, router_is = config.moe.router, f"moe.router={config.moe.router.name}"
    dense, no_table = router is Router.dense, router is not Router.hashed and not config.model.signatures
    all_layers = config.expert_layers == config.model.layers
    constant_k = config.schedule.growth is Growth.constant
    return [
        Rule(dense, router_is, _DENSE),
        Rule(dense and not config.model.signatures, router_is, ("schedule.k_max",)),
        Rule(no_table, router_is, _TABLE),
        Rule(no_table and router not in (Router.fresh, Router.stochastic), router_is, ("moe.share_table",)),
        Rule(router is not Router.learned, router_is, _LEARNED),
        Rule(router is not Router.stochastic, router_is, ("moe.consistency",)),
        Rule(all_layers, "moe.layers takes in every layer", ("moe.plain_width",)),
        Rule(config.moe.weights is RouteWeights.uniform, "moe.weights=uniform", ("moe.spread",)),
        Rule(config.model.ngram == 0, "model.ngram=0", ("model.ngram_rows",)),
        Rule(not config.model.cutoffs, "model.cutoffs=[]", ("model.div_val", "model.proj_init_std")),
        Rule(config.model.div_val == 1, "model.div_val=1", ("model.proj_init_std",)),
        Rule(constant_k, "schedule.growth=constant", ("schedule.k_min", "schedule.steps")),
        Rule(config.optim.decay is Decay.constant, "optim.decay=constant", ("optim.final_lr",)),
        Rule(config.train.valid_every == 0, "train.valid_every=0", ("train.valid_symbols",)),
        Rule(config.parallel.expert_ranks == 1, "parallel.expert_ranks=1", _ONE_RANK),
    ]


def unused(found: Iterable[Rule], given: Iterable[str]) -> dict[str, str]:
    """Return the given options, by their full names, that a run with these rules does not use, with the first reason.

    Example: of moe.spread and optim.lr a run with moe.router=learned does not use the first.
    """
    given = set(given)
    reasons: dict[str, str] = {}
    for rule in found:
        for name in rule.options:
            if rule.holds and name in given:
                reasons.setdefault(name, rule.reason)
    return reasons
