"""Options that a run does not use: each rule says when, and of which options. launch/train.py names those that somebody
gave.

What an option's own text says of such a case (engine/config/run.py) is the same; a rule is for what a person may set
and wait for.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from foreroute.engine.config.enums import Decay, Growth, Router, RouteWeights
from foreroute.engine.config.run import Config

_TABLE = ("moe.ngram", "moe.rows", "moe.builder", "moe.pack", "moe.weights", "moe.spread")


class _Rule(NamedTuple):
    """If it holds, the options change nothing, for this reason."""

    holds: Callable[[Config], bool]
    reason: Callable[[Config], str]
    options: tuple[str, ...]


def _router(config: Config) -> str:
    return f"moe.router={config.moe.router.name}"


def _without_table(config: Config) -> bool:
    return config.moe.router is not Router.hashed and not config.model.signatures


_RULES = (
    _Rule(
        lambda c: c.moe.router is Router.dense,
        _router,
        (
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
        ),
    ),
    _Rule(lambda c: c.moe.router is Router.dense and not c.model.signatures, _router, ("schedule.k_max",)),
    _Rule(_without_table, _router, _TABLE),
    _Rule(
        lambda c: _without_table(c) and c.moe.router not in (Router.fresh, Router.stochastic),
        _router,
        ("moe.share_table",),
    ),
    _Rule(
        lambda c: c.moe.router is not Router.learned, _router, ("moe.balance_loss", "moe.balance_over", "moe.z_loss")
    ),
    _Rule(lambda c: c.moe.router is not Router.stochastic, _router, ("moe.consistency",)),
    _Rule(
        lambda c: c.expert_layers == c.model.layers, lambda c: "moe.layers takes in every layer", ("moe.plain_width",)
    ),
    _Rule(lambda c: c.moe.weights is RouteWeights.uniform, lambda c: "moe.weights=uniform", ("moe.spread",)),
    _Rule(lambda c: c.model.ngram == 0, lambda c: "model.ngram=0", ("model.ngram_rows",)),
    _Rule(
        lambda c: c.schedule.growth is Growth.constant,
        lambda c: "schedule.growth=constant",
        ("schedule.k_min", "schedule.steps"),
    ),
    _Rule(lambda c: c.optim.decay is Decay.constant, lambda c: "optim.decay=constant", ("optim.final_lr",)),
    _Rule(lambda c: c.train.valid_every == 0, lambda c: "train.valid_every=0", ("train.valid_symbols",)),
    _Rule(
        lambda c: c.parallel.expert_ranks == 1,
        lambda c: "parallel.expert_ranks=1",
        ("parallel.exchange", "parallel.wire", "parallel.chunks", "parallel.peer_ids"),
    ),
)


def unused(config: Config, given: Iterable[str]) -> dict[str, str]:
    """Give those of the options, by their full names, that the run does not use, each with the reason.

    Example: of moe.spread and optim.lr a run with moe.router=learned does not use the first.
    """
    given = set(given)
    found: dict[str, str] = {}
    for rule in _RULES:
        if rule.holds(config):
            found |= {name: rule.reason(config) for name in rule.options if name in given and name not in found}
    return found
