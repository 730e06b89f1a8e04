"""A user's model with expert layers on disk: saved by any number of ranks at any ZeRO stage, loaded by any other.

    save_pretrained(engine, folder)      # every rank
    load_pretrained(engine, folder)      # every rank of another run, after replace_feed_forwards and initialize

A folder is whole or absent. It has

    foreroute.json                 MoEConfig, k, seed, passes, names of modules; options and numbers of the optimizer;
                                   a checksum of every file of weights
    foreroute-00000.safetensors..  from each rank its share of the whole model: fp32 weights, expert by expert, tables,
                                   and the optimizer's tensors (engine/checkpoint/parameters.py)
    model.safetensors              the parameters outside the expert layers, in their own number format, for other
                                   programs; a model with a save_pretrained of its own writes its files instead

`load_pretrained` reads foreroute's files only, which hold all parameters. Nothing is pickled.
"""

import contextlib
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch import distributed as dist

from foreroute.engine.checkpoint import files
from foreroute.engine.checkpoint.parameters import Reader, buffers, local_experts, own_state
from foreroute.engine.config import to_plain
from foreroute.engine.errors import require
from foreroute.engine.moe.experts import Experts
from foreroute.engine.optim.model_state import WEIGHT, ModelState, state_of
from foreroute.engine.parallel.cpu_group import CpuGroup, GlooGroup
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.plug_in.planned_experts import PlannedExperts
from foreroute.engine.plug_in.planned_layer import PlannedFeedForward
from foreroute.engine.sealed_files import sync

NAMES = files.Names("foreroute.json", "foreroute")
_MODEL = "model.safetensors"
_COUNTERS = "global_steps", "global_samples", "skipped_steps"
"""Of a DeepSpeed engine."""
_OF_LAYERS = (
    *("experts", "router", "expert_width", "activation", "shared_width", "residual", "constant_experts"),
    *("copy_experts", "null_experts", "ngram", "keys", "weights", "gate", "gate_normalised", "gate_scale"),
    "share_table",
)
"""Options of MoEConfig that a saved model and the model that loads it must share; the tables are loaded."""
_BY_GROUP = "base_lrs", "_last_lr", "lr_lambdas", "max_lrs", "min_lrs"
"""Of a scheduler's state: lists with a value for each group of the optimizer."""


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any = None,
    weights_only: bool = False,
) -> Path:
    """Write a model, its tables and the state of its training to a folder; return the folder.

    Every rank of the run calls it between optimizer steps; all see the same folder. A folder that it wrote before is
    replaced, and files of others in it are kept. Gradients are not saved.

    Args:
        model: a DeepSpeed engine, or the model.
        optimizer: in plain PyTorch the optimizer, to go on with training; a DeepSpeed engine has its own.
        scheduler: the learning-rate scheduler; by default that of the engine.
        weights_only: leave out the optimizer, the scheduler and the random state.

    Raises:
        UserError: the folder holds something else, a step is incomplete, or the optimizer keeps tensors of another
            shape than their parameter's.
        OSError: on every rank: it could not be written, and an older folder is untouched.
    """
    saved = _Model(model, optimizer)
    target = Path(folder).resolve()
    training = None if weights_only or not saved.trains else _training(saved, scheduler or _scheduler_of(model))
    own: dict[str, Tensor] = {}

    def tensors() -> dict[str, Tensor]:
        found = dict(own_state(_noted(saved, own, weights_only=training is None), saved.mesh, saved.is_expert))
        if training is not None:
            found |= _random_state(saved.mesh.rank)
        if saved.mesh.rank == 0:
            found |= {f"buffer/{name}": value for name, value in buffers(saved.module).items()}
            found |= shared
        return _unshared(found)

    def header(new: Path) -> dict[str, Any]:
        _write_own(saved, own, new)
        wrote = sorted(file.name for file in new.iterdir() if not NAMES.is_shard(file.name))
        for name in wrote:
            sync(new / name)
        beside = {name: files.describe(new / name) for name in wrote if name.endswith(".safetensors")}
        _keep_others(target, new)
        place = {"ranks": saved.mesh.world, "expert_ranks": saved.mesh.ep_size}
        facts = {"format": files.FORMAT, **place, "experts": experts, "training": training}
        return {**facts, files.BESIDE: beside, "wrote": wrote}

    shared: dict[str, Tensor] = {}
    experts = [_described(saved, one, f"experts/{i}", shared) for i, one in enumerate(saved.experts)]
    with saved.all_ranks() as cpu_group:
        _agree_on(target, cpu_group)
        temporary = files.temporary_name(0)
        files.write_whole(target, cpu_group, tensors, header, temporary=temporary, names=NAMES)
    return target


def load_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any = None,
    weights_only: bool = False,
) -> None:
    """Load what `save_pretrained` wrote into a model whose feed-forwards were replaced in the same way.

    Every rank of the run calls it, and reads only what it holds. The number of ranks, the size of expert groups, the
    ZeRO stage and the grouping of the optimizer's parameters may differ. The learning rate and other options of the
    optimizer become those that were saved. The random state is restored if as many ranks in equal groups saved it.

    Args:
        model: a DeepSpeed engine, or the model.
        optimizer: in plain PyTorch the optimizer, to go on with training; a DeepSpeed engine has its own.
        scheduler: the learning-rate scheduler; by default that of the engine.
        weights_only: begin training anew, with these weights: leave the options and the scheduler as they are.

    Raises:
        UserError: on every rank, before anything is changed: a file is missing or damaged (the message names it), or
            the model or its training differ.
    """
    here = _Model(model, optimizer)
    path = Path(folder).resolve()
    with here.all_ranks() as cpu_group:
        reader = Reader(path, cpu_group, NAMES, here.is_expert)
    _check_experts(path, reader.manifest["experts"], here)
    training = None
    if here.trains and not weights_only:
        training = reader.manifest["training"]
        require(training is not None, f"{path}: was saved without an optimizer: load it with weights_only=True")
        if here.state.shares_numbers:
            _forget_idle(reader, training)
    kinds = training["kinds"] if training else []
    reader.check_fits(here.module, here.state.shapes(), [WEIGHT], here.mesh.ep_size, optional=kinds)
    scheduler = scheduler or _scheduler_of(model)
    schedule = _schedule(path, training, here, scheduler)
    for one, saved in zip(here.experts, reader.manifest["experts"], strict=True):
        one.load_state_dict({**_joined(saved["state"], reader), "place": one.state_dict()["place"]})
    _load_parameters(reader, here, training)
    reader.load_buffers(here.module)
    if training is not None:
        here.state.set_options(_options(training))
        vars(model).update({name: n for name, n in training["counters"].items() if hasattr(model, name)})
        _restore_random_state(reader, here.mesh)
    if schedule is not None:
        scheduler.load_state_dict(schedule)


class _Model:
    """A model with expert layers, and its place among the ranks."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        layers = [m for m in model.modules() if isinstance(m, PlannedFeedForward)]
        self.model, self.experts = model, list(dict.fromkeys(m.experts for m in layers))
        require(bool(self.experts), "the model has no expert layers: call replace_feed_forwards first")
        sizes = {one.mesh.ep_size for one in self.experts}
        require(len(sizes) == 1, f"expert groups of {sorted(sizes)} ranks in one model: must be of one size")
        place = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.mesh = Mesh(*place, sizes.pop())
        self.state: ModelState = state_of(model, optimizer, self.mesh)
        self.module = self.state.module
        names = [name for name, module in self.module.named_modules() if isinstance(module, Experts)]
        self._experts = tuple(f"{name}." for name in names)

    @property
    def trains(self) -> bool:
        """Whether there is an optimizer."""
        return bool(self.state.parts())

    def is_expert(self, name: str) -> bool:
        """Return whether a parameter is one of experts."""
        return name.startswith(self._experts)

    def layers_of(self, experts: PlannedExperts | None = None) -> list[str]:
        """Return the names of the expert layers of one call of replace_feed_forwards, or of all."""
        named = self.module.named_modules()
        found = [(name, module) for name, module in named if isinstance(module, PlannedFeedForward)]
        return [name for name, module in found if experts in (None, module.experts)]

    @contextlib.contextmanager
    def all_ranks(self) -> Iterator[CpuGroup]:
        """Connect all ranks, which must call it together."""
        if self.mesh.world == 1:
            yield CpuGroup()
            return
        ranks = list(range(self.mesh.world))
        cpu_group = GlooGroup(dist.new_group(ranks, self.experts[0].timeout, backend="gloo"))
        try:
            yield cpu_group
        finally:
            cpu_group.close()


# Experts and their tables.


def _described(saved: _Model, experts: PlannedExperts, key: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return what belongs to the layers of one call of replace_feed_forwards; tensors go to `tensors`."""
    state = {name: value for name, value in experts.state_dict().items() if name != "place"}
    return {"moe": to_plain(experts.moe), "modules": saved.layers_of(experts), "state": _split(state, key, tensors)}


def _check_experts(path: Path, saved: list[dict[str, Any]], here: _Model) -> None:
    """Raise UserError unless the model has the same expert layers."""
    names = [one["modules"] for one in saved]
    own = [here.layers_of(one) for one in here.experts]
    for option in _OF_LAYERS:
        there = [one["moe"].get(option) for one in saved]
        mine = [to_plain(one.moe)[option] for one in here.experts]
        require(
            len(there) != len(mine) or there == mine,
            f"{path}: was saved with moe.{option}={_words(there)}: must be so here, not {_words(mine)}",
        )
    require(names == own, f"{path}: has expert layers {_words(names)}: must be those of this model, {_words(own)}")


def _words(values: list[Any]) -> str:
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


def _joined(value: Any, reader: Reader) -> Any:
    """Return the nested values that `_split` returned, with their tensors."""
    if isinstance(value, dict):
        if list(value) == ["tensor"]:
            return reader.get(value["tensor"])
        return {name: _joined(item, reader) for name, item in value.items()}
    return [_joined(item, reader) for item in value] if isinstance(value, list) else value


# Parameters.


def _noted(saved: _Model, own: dict[str, Tensor], *, weights_only: bool) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the state of all parameters; on rank 0 keep the values of those outside the expert layers."""
    layers = tuple(f"{name}." for name in saved.layers_of())
    for name, values in saved.state.read_state(weights_only=weights_only):
        if saved.mesh.rank == 0 and not name.startswith(layers):
            own[name] = values[WEIGHT].to("cpu", saved.module.get_parameter(name).dtype)
        yield name, values


def _load_parameters(reader: Reader, here: _Model, training: dict[str, Any] | None) -> None:
    """Overwrite the parameters; without `training` the optimizer begins anew."""
    names = {name: local_experts(name, shape, here.mesh, here.is_expert) for name, shape in here.state.shapes().items()}
    every = training["kinds"] if training else []
    kinds = {name: [kind for kind in every if reader.holds(kind, name, experts)] for name, experts in names.items()}
    here.state.create(kinds, training["optimizer"]["numbers"] if training else {})
    for name, experts in names.items():
        state = {kind: reader.parameter(kind, name, experts) for kind in (WEIGHT, *kinds[name])}
        here.state.write_state(name, state)


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the host, each with memory of its own, as safetensors wants them."""
    found, seen = {}, set()
    for key, value in tensors.items():
        own = value.detach().cpu().contiguous()
        if own.untyped_storage().nbytes() != own.nbytes or own.data_ptr() in seen:
            own = own.clone()
        seen.add(own.data_ptr())
        found[key] = own
    return found


def _write_own(saved: _Model, own: dict[str, Tensor], new: Path) -> None:
    """Write the parameters and buffers outside the expert layers, as the model itself does."""
    layers = tuple(f"{name}." for name in saved.layers_of())
    first = {id(p): name for name, p in saved.module.named_parameters()}
    state = {}
    for name, value in saved.module.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and not name.startswith(layers):
            state[name] = own[first[id(value)]] if id(value) in first else value.detach().cpu()
    theirs = getattr(saved.module, "save_pretrained", None)
    if theirs is not None:
        theirs(new, state_dict=state)
        return
    kept: dict[int, str] = {}
    again = {name: kept[id(value)] for name, value in state.items() if kept.setdefault(id(value), name) != name}
    whole = {name: value for name, value in state.items() if name not in again}
    save_file(_unshared(whole), new / _MODEL, {"format": "pt", **again})


def _keep_others(target: Path, new: Path) -> None:
    """Copy files of others from the folder that is replaced."""
    if not target.exists():
        return
    before = files.read_manifest(target, NAMES)
    ours = {NAMES.manifest, *before["files"], *before["wrote"]}
    for item in target.iterdir():
        if item.name in ours or (new / item.name).exists():
            continue
        if item.is_dir():
            shutil.copytree(item, new / item.name)
        else:
            shutil.copy2(item, new / item.name)


def _agree_on(target: Path, cpu_group: CpuGroup) -> None:
    """Raise UserError on every rank unless all name one folder, which is new or was written by save_pretrained."""
    found = cpu_group.gather(str(target))
    require(len(set(found)) == 1, f"the ranks save to different folders: {', '.join(dict.fromkeys(found))}")
    fault = None
    if cpu_group.rank == 0 and target.exists():
        if not target.is_dir():
            fault = f"{target}: is a file: must be a folder"
        elif any(target.iterdir()) and not (target / NAMES.manifest).exists():
            fault = f"{target}: holds other files and no {NAMES.manifest}: must be a new folder, or one saved before"
    fault = cpu_group.broadcast(fault)
    require(fault is None, str(fault))


# Training.


def _training(saved: _Model, scheduler: Any) -> dict[str, Any]:
    """Return the state of training that is no tensor."""
    state = saved.state
    schedule = None
    if scheduler is not None:
        schedule = _plain(scheduler.state_dict(), "the scheduler's state")
    return {
        "kinds": state.kinds(),
        "optimizer": {"class": state.optimizer_name, "groups": state.groups(), "numbers": state.numbers()},
        "counters": {name: getattr(saved.model, name) for name in _COUNTERS if hasattr(saved.model, name)},
        "scheduler": schedule,
    }


def _schedule(path: Path, training: dict[str, Any] | None, here: _Model, scheduler: Any) -> dict[str, Any] | None:
    """Check that training can go on here; return the state for the scheduler, if there is one."""
    if training is None:
        return None
    theirs, ours = training["optimizer"]["class"], here.state.optimizer_name
    require(
        theirs == ours or ("adam" in theirs.lower() and "adam" in ours.lower()),
        f"{path}: was saved with the optimizer {theirs}: must be so here, not {ours}, or weights_only=True",
    )
    here.state.check(training["optimizer"]["numbers"], _options(training))
    if scheduler is None:
        return None
    state = training["scheduler"]
    require(state is not None, f"{path}: was saved without a scheduler: save it with scheduler=..")
    group_of = {name: i for i, group in enumerate(training["optimizer"]["groups"]) for name in group["parameters"]}
    picks = []
    for group in here.state.groups():
        known = [name for name in group["parameters"] if name in group_of]
        require(bool(known), f"{path}: the optimizer had none of {_words(group['parameters'])} when it was saved")
        picks.append(group_of[known[0]])
    return _regrouped(_from_plain(state), picks, scheduler)


def _forget_idle(reader: Reader, training: dict[str, Any]) -> None:
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


def _options(training: dict[str, Any]) -> dict[str, dict[str, Any]]:
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


def _scheduler_of(model: nn.Module) -> Any:
    """Return the scheduler of a DeepSpeed engine."""
    return getattr(model, "lr_scheduler", None)


def _random_state(rank: int) -> dict[str, Tensor]:
    found = {_rng(rank): torch.get_rng_state()}
    return found | ({_rng(rank, "cuda"): torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _restore_random_state(reader: Reader, mesh: Mesh) -> None:
    if (reader.manifest["ranks"], reader.manifest["expert_ranks"]) != (mesh.world, mesh.ep_size):
        return
    torch.set_rng_state(reader.get(_rng(mesh.rank)))
    if torch.cuda.is_available() and _rng(mesh.rank, "cuda") in reader.keys:
        torch.cuda.set_rng_state(reader.get(_rng(mesh.rank, "cuda")))


def _rng(rank: int, kind: str = "torch") -> str:
    return f"rng/{kind}/rank-{rank:05d}"
