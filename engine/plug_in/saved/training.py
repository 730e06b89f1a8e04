"""The state of a user's training beside the model's tensors: the optimizer's options and numbers, the scheduler's, and
random numbers.

Groups of the optimizer may differ between the run that saves and the run that loads.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foreroute.engine.checkpoint.parameters import Reader
from foreroute.engine.errors import require
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.plug_in.saved.layers import words
from foreroute.engine.plug_in.saved.model import PlacedModel

_BY_GROUP = "base_lrs", "_last_lr", "lr_lambdas", "max_lrs", "min_lrs"
"""Of a scheduler's state: lists with a value for each group of the optimizer."""
_SCALE = "cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis"
"""Of DeepSpeed's dynamic loss scaler."""


def training_state(saved: PlacedModel, scheduler: Any) -> dict[str, Any]:
    """Return the state of training that is no tensor.

    Raises:
        UserError: the scheduler's state is more than numbers and text.
    """
    state, scheduler = saved.state, scheduler or saved.scheduler
    schedule = None if scheduler is None else _plain(scheduler.state_dict(), "the scheduler's state")
    return {
        "kinds": state.kinds(),
        "optimizer": {"class": state.optimizer_name, "groups": state.groups(), "numbers": state.numbers()},
        "counters": saved.counters(),
        "loss_scale": loss_scale(saved.scaler),
        "scheduler": schedule,
    }


def check_training(
    path: Path, training: dict[str, Any] | None, here: PlacedModel, scheduler: Any
) -> dict[str, Any] | None:
    """Check that training can go on here; return the state for the scheduler, if there is one.

    Raises:
        UserError: it cannot.
    """
    if training is None:
        return None
    theirs, ours = training["optimizer"]["class"], here.state.optimizer_name
    require(
        theirs == ours or ("adam" in theirs.lower() and "adam" in ours.lower()),
        f"{path}: was saved with the optimizer {theirs}: must be so here, not {ours}, or weights_only=True",
    )
    here.state.check(training["optimizer"]["numbers"], options_of(training))
    if scheduler is None:
        return None
    state = training["scheduler"]
    require(state is not None, f"{path}: was saved without a scheduler: save it with scheduler=..")
    group_of = {name: i for i, group in enumerate(training["optimizer"]["groups"]) for name in group["parameters"]}
    picks = []
    for group in here.state.groups():
        known = [name for name in group["parameters"] if name in group_of]
        require(bool(known), f"{path}: the optimizer had none of {words(group['parameters'])} when it was saved")
        picks.append(group_of[known[0]])
    return _regrouped(_from_plain(state), picks, scheduler)


def forget_idle(reader: Reader, training: dict[str, Any]) -> None:
    """Drop the odd numbers of parameters that have had no gradient yet, which ZeRO steps with the others."""
    numbers = training["optimizer"]["numbers"]
    (common, _), *others = Counter(str(found) for found in numbers.values() if found).most_common() or [("", 0)]
    odd = {name for name, found in numbers.items() if str(found) != common} if others else set()
    stepped = set()
    for key in reader.keys:
        kind, _, place = key.partition("/")
        name = next((name for name in (place, place.rpartition("/")[0]) if name in odd), None)
        if kind in training["kinds"] and name is not None and reader.get(key).any():
            stepped.add(name)
    training["optimizer"]["numbers"] = {name: n for name, n in numbers.items() if name not in odd - stepped}


def options_of(training: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the optimizer's options of each parameter."""
    groups = training["optimizer"]["groups"]
    return {name: group["options"] for group in groups for name in group["parameters"]}


def _regrouped(state: dict[str, Any], picks: Sequence[int], scheduler: Any) -> dict[str, Any]:
    """Return a scheduler's state for other groups of the optimizer.

    Args:
        picks: for each group here, the number of the saved group that its parameters were in.
    """
    found = dict(state)
    for name, value in state.items():
        if name in _BY_GROUP and isinstance(value, list):
            found[name] = [value[i] for i in picks]
        elif isinstance(getattr(scheduler, name, None), Counter):
            found[name] = Counter(value)
        elif name == "_schedulers":
            inner = zip(value, getattr(scheduler, name), strict=True)
            found[name] = [_regrouped(one, picks, there) for one, there in inner]
    return found


def _plain(value: Any, what: str) -> Any:
    """Return nested values as JSON can hold them; a mapping with keys that are no text becomes pairs."""
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: _plain(item, what) for key, item in value.items()}
        return {"": [[_plain(key, what), _plain(item, what)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_plain(item, what) for item in value]
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    known = value is None or isinstance(value, bool | int | float | str)
    require(known, f"{what} has a {type(value).__name__}: must be numbers and text")
    return value


def _from_plain(value: Any) -> Any:
    """Return what `_plain` was given; tuples as lists."""
    if isinstance(value, dict):
        if list(value) == [""]:
            return {key: _from_plain(item) for key, item in value[""]}
        return {key: _from_plain(item) for key, item in value.items()}
    return [_from_plain(item) for item in value] if isinstance(value, list) else value


def loss_scale(scaler: Any) -> dict[str, float]:
    """Return the state of DeepSpeed's dynamic loss scale, for fp16; empty for a static one."""
    return {name: getattr(scaler, name) for name in _SCALE} if getattr(scaler, "dynamic", False) else {}


def set_loss_scale(scaler: Any, state: Mapping[str, float]) -> None:
    """Set a dynamic loss scale to what `loss_scale` returned; a static one stays."""
    for name, value in state.items() if getattr(scaler, "dynamic", False) else ():
        setattr(scaler, name, value)


def random_state(rank: int) -> dict[str, Tensor]:
    """Return the state of PyTorch's random numbers, by the keys of this rank."""
    found = {_rng(rank): torch.get_rng_state()}
    return found | ({_rng(rank, "cuda"): torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def restore_random_state(reader: Reader, mesh: Mesh) -> None:
    """Restore what `random_state` returned, if as many ranks in equal groups saved it."""
    if (reader.manifest["ranks"], reader.manifest["expert_ranks"]) != (mesh.world, mesh.ep_size):
        return
    torch.set_rng_state(reader.get(_rng(mesh.rank)))
    if torch.cuda.is_available() and _rng(mesh.rank, "cuda") in reader.keys:
        torch.cuda.set_rng_state(reader.get(_rng(mesh.rank, "cuda")))


def _rng(rank: int, kind: str = "torch") -> str:
    return f"rng/{kind}/rank-{rank:05d}"
