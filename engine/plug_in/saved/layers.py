"""The expert layers of a saved model: their options, their places in it, k, seed, passes and tables."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from foreroute.engine.checkpoint.parameters import Reader
from foreroute.engine.config import to_plain
from foreroute.engine.errors import require
from foreroute.engine.plug_in.planned_experts import PlannedExperts
from foreroute.engine.plug_in.saved.model import PlacedModel

_OF_LAYERS = (
    *("experts", "router", "expert_width", "activation", "shared_width", "residual", "constant_experts"),
    *("copy_experts", "null_experts", "ngram", "keys", "weights", "gate", "gate_normalised", "gate_scale"),
    "share_table",
)
"""Options of MoEConfig that a saved model and the model that loads it must share; the tables are loaded."""


def described(saved: PlacedModel, experts: PlannedExperts, key: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return what belongs to the layers of one call of replace_feed_forwards; tensors go to `tensors`."""
    state = {name: value for name, value in experts.state_dict().items() if name != "place"}
    return {"moe": to_plain(experts.moe), "modules": saved.layers_of(experts), "state": _split(state, key, tensors)}


def check_layers(path: Path, saved: list[dict[str, Any]], here: PlacedModel) -> None:
    """Raise UserError unless the model has the same expert layers."""
    names = [one["modules"] for one in saved]
    own = [here.layers_of(one) for one in here.experts]
    for option in _OF_LAYERS:
        there = [one["moe"].get(option) for one in saved]
        mine = [to_plain(one.moe)[option] for one in here.experts]
        require(
            len(there) != len(mine) or there == mine,
            f"{path}: was saved with moe.{option}={words(there)}: must be so here, not {words(mine)}",
        )
    require(names == own, f"{path}: has expert layers {words(names)}: must be those of this model, {words(own)}")


def words(values: list[Any]) -> str:
    """Return values, and lists of values, as text."""
    items = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return ", ".join(str(item) for item in dict.fromkeys(items))


def _split(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """Return nested values as JSON has them, with the tensors in `tensors` by their keys."""
    if isinstance(value, Tensor):
        tensors[key] = value
        return {"tensor": key}
    if isinstance(value, Mapping):
        return {name: _split(item, f"{key}/{name}", tensors) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_split(item, f"{key}/{i}", tensors) for i, item in enumerate(value)]
    return value


def joined(value: Any, reader: Reader) -> Any:
    """Return the nested values that `_split` returned, with their tensors."""
    if isinstance(value, dict):
        if list(value) == ["tensor"]:
            return reader.get(value["tensor"])
        return {name: joined(item, reader) for name, item in value.items()}
    return [joined(item, reader) for item in value] if isinstance(value, list) else value
