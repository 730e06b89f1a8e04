"""Routing methods by name: `moe.router=NAME` is the file of that name in engine/routing/planned/ or live/,
`moe.router=package.module:Class` a class of the user's, and `dense` is none.
"""

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec

from foreroute.engine.config import Keys, ModelConfig, MoEConfig, RouteWeights
from foreroute.engine.config.model import expert_sections
from foreroute.engine.errors import UserError, require
from foreroute.engine.routing.live_router import LiveRouter
from foreroute.engine.routing.planned_router import PlannedRouter

Method = type[PlannedRouter] | type[LiveRouter]

_ZERO_EXPERTS = "constant_experts", "copy_experts", "null_experts"
_FOLDERS = tuple(f"{__package__}.{kind}" for kind in ("planned", "live"))


def method_of(moe: MoEConfig) -> Method | None:
    """Return the class of a configuration's routers; None for dense.

    Raises:
        UserError: a class of the user's cannot be imported or is no router, or the method has no experts without rows,
            no strata or no keys to shuffle, and these are asked for.
    """
    if moe.dense:
        return None
    method = _method(moe.router)
    for option in _ZERO_EXPERTS:
        number = getattr(moe, option)
        has_them = number == 0 or option in method.uses
        require(has_them, f"moe.{option}={number}: must be 0 with moe.router={moe.router}, which has none")
    has_strata = moe.strata == 1 or "strata" in method.uses
    require(has_strata, f"moe.strata={moe.strata}: must be 1 with moe.router={moe.router}, which has one")
    is_keyed = moe.keys is Keys.own or "keys" in method.uses
    require(is_keyed, f"moe.keys={moe.keys.name}: must be own with moe.router={moe.router}, which looks up no keys")
    return method


@cache
def _method(name: str) -> Method:
    if ":" not in name:
        module = next(f"{folder}.{name}" for folder in _FOLDERS if find_spec(f"{folder}.{name}"))
        built_in: Method = import_module(module).ROUTER
        return built_in
    module, _, attribute = name.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"moe.router={name}: cannot be imported ({error})") from error
    is_router = isinstance(found, type) and issubclass(found, PlannedRouter | LiveRouter)
    require(is_router, f"moe.router={name}: must be a class derived from PlannedRouter or LiveRouter")
    router: Method = found
    return router


def planned_method(moe: MoEConfig) -> type[PlannedRouter] | None:
    """Return the class of planned routers; None for live ones and dense."""
    method = method_of(moe)
    return method if method is not None and issubclass(method, PlannedRouter) else None


def live_method(moe: MoEConfig) -> type[LiveRouter] | None:
    """Return the class of live routers; None for planned ones and dense."""
    method = method_of(moe)
    return method if method is not None and issubclass(method, LiveRouter) else None


def planned_methods(model: ModelConfig, moe: MoEConfig) -> list[type[PlannedRouter]]:
    """List the classes of the run's planned routers, one for each expert layer that has one."""
    return [method for method in map(planned_method, expert_sections(model, moe)) if method is not None]


def live_methods(model: ModelConfig, moe: MoEConfig) -> list[type[LiveRouter]]:
    """List the classes of the run's live routers, one for each expert layer that has one."""
    return [method for method in map(live_method, expert_sections(model, moe)) if method is not None]


def training_passes(model: ModelConfig, moe: MoEConfig) -> int:
    """Count the forward and backward passes that each training symbol goes through."""
    return max([1, *(method.passes for method in planned_methods(model, moe))])


def has_live_gate(moe: MoEConfig) -> bool:
    """Return whether a learned gate weighs planned experts (engine/moe/gate.py)."""
    method = planned_method(moe)
    return method is not None and moe.weights is RouteWeights.live and "weights" in method.uses


def expert_slices(moe: MoEConfig) -> Sequence[int]:
    """Return of how many of moe.experts each expert consists (PlannedRouter.slices)."""
    planned = planned_method(moe)
    return [1] * moe.experts if planned is None else planned.slices(moe)


def option_uses(model: ModelConfig, moe: MoEConfig) -> set[str]:
    """Return the options of the section `moe` that the run's routers read, or that its tables at the input are made
    with, besides those of all routers."""
    return {name for method in _methods(model, moe) for name in method.uses}


def idle_options(model: ModelConfig, moe: MoEConfig) -> dict[str, str]:
    """Return those of them that no router reads as another option is set, with this option and its value.

    Example: moe.weights=uniform leaves {"spread": "moe.weights=uniform", ...} of hashed, but not of top_p, whose
    numbers of experts depend on it.
    """
    found = {}
    for name in option_uses(model, moe):
        needs = [method.only_with.get(name) for method in _methods(model, moe) if name in method.uses]
        unmet = [need for need in needs if need is not None and getattr(moe, need[0]) is not need[1]]
        if len(unmet) == len(needs):
            found[name] = f"moe.{unmet[0][0]}={getattr(moe, unmet[0][0]).name}"
    return found


def _methods(model: ModelConfig, moe: MoEConfig) -> list[Method]:
    tables: list[Method] = [_method("hashed")] if model.signatures else []
    return [*planned_methods(model, moe), *live_methods(model, moe), *tables]
