"""Options that a run does not use: each rule has its condition, its reason and its options.

launch/train.py reports those of them that were given. Each rule repeats the option's help text: add one where a user
might expect an effect.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from typing import NamedTuple

from foreroute.engine.config.enums import Decay, Growth
from foreroute.engine.config.model import expert_layers
from foreroute.engine.config.ngram_tables import NgramTablesConfig
from foreroute.engine.config.option import option_names
from foreroute.engine.config.run import Config

_DENSE = option_names(
    schedule=("growth", "k_min", "steps"),
    eval=("k",),
    kernels=("backend", "mode", "debug", "masked_from_k"),
    parallel=("exchange", "wire", "chunks", "expert_ranks"),
    moe=("residual",),
)
_ROUTERS = {
    *("ngram", "rows", "builder", "pack", "weights", "spread", "share_table", "options"),
    *("gate", "gate_normalised", "gate_scale", "balance_loss", "balance_over", "z_loss", "consistency"),
}
"""Options of the section `moe` that not all routers read."""
_TABLES = tuple(f"ngram_tables.{item.name}" for item in fields(NgramTablesConfig) if item.name != "rows")
_SPARSE = option_names(ngram_tables=("updates", "moments", "lr_factor", "wire"))
_ONE_RANK = ("parallel.exchange", "parallel.wire", "parallel.chunks", "parallel.peer_ids")


class Rule(NamedTuple):
    """Whether a run does not use some options, and why."""

    holds: bool
    reason: str
    options: tuple[str, ...]


def rules(config: Config, uses: Collection[str], idle: Mapping[str, str]) -> list[Rule]:
    """List the rules of a run.

    Args:
        uses: options of the section `moe` that its routers read (PlannedRouter.uses, LiveRouter.uses).
        idle: those of them that have no effect in this configuration, and why (engine.routing.methods.idle_options).
    """
    dense, router_is = config.moe.dense, f"moe.router={config.moe.router}"
    all_layers = len(expert_layers(config.model, config.moe)) == config.model.layers
    constant_k = config.schedule.growth is Growth.constant
    return [
        Rule(dense, router_is, _DENSE),
        Rule(dense and not config.model.signatures, router_is, ("schedule.k_max",)),
        Rule(True, router_is, tuple(f"moe.{name}" for name in sorted(_ROUTERS.difference(uses)))),
        *(Rule(True, reason, (f"moe.{name}",)) for name, reason in idle.items()),
        Rule(all_layers, "moe.layers takes in every layer", ("moe.plain_width",)),
        Rule(config.ngram_tables.rows == 0, "ngram_tables.rows=0", _TABLES),
        Rule(config.ngram_tables.dense, "ngram_tables.optimizer=dense", _SPARSE),
        Rule(config.model.ngram == 0, "model.ngram=0", ("model.ngram_rows",)),
        Rule(not config.model.cutoffs, "model.cutoffs=[]", ("model.div_val", "model.proj_init_std")),
        Rule(config.model.div_val == 1, "model.div_val=1", ("model.proj_init_std",)),
        Rule(constant_k, "schedule.growth=constant", ("schedule.k_min", "schedule.steps")),
        Rule(config.optim.decay is Decay.constant, "optim.decay=constant", ("optim.final_lr",)),
        Rule(config.train.valid_every == 0, "train.valid_every=0", ("train.valid_symbols",)),
        Rule(config.parallel.expert_ranks == 1, "parallel.expert_ranks=1", _ONE_RANK),
    ]


def unused(found: Iterable[Rule], given: Collection[str]) -> dict[str, str]:
    """Return the given options, by their full names, that a run with these rules does not use, with the first reason.

    Example: of moe.spread and optim.lr a run with moe.router=learned does not use the first. moe.options.x is unused
    where moe.options is.
    """
    reasons: dict[str, str] = {}
    for rule in found:
        for name in given if rule.holds else ():
            if name in rule.options or name.rpartition(".")[0] in rule.options:
                reasons.setdefault(name, rule.reason)
    return reasons
