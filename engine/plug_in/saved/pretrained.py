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

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foreroute.engine.checkpoint import files
from foreroute.engine.checkpoint.parameters import Reader, buffers, local_experts, own_state
from foreroute.engine.errors import UserError, require
from foreroute.engine.optim.model_state import WEIGHT
from foreroute.engine.parallel.cpu_group import CpuGroup
from foreroute.engine.plug_in.saved.host_files import keep_others, noted, unshared, write_host_files
from foreroute.engine.plug_in.saved.layers import check_layers, described, joined
from foreroute.engine.plug_in.saved.model import NAMES, PlacedModel
from foreroute.engine.plug_in.saved.training import (
    check_training,
    forget_idle,
    options_of,
    random_state,
    restore_random_state,
    set_loss_scale,
    training_state,
)
from foreroute.engine.sealed_files import sync


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
    saved = PlacedModel(model, optimizer)
    target = Path(folder).resolve()
    training = None if weights_only or not saved.trains else training_state(saved, scheduler)
    own: dict[str, Tensor] = {}

    def tensors() -> dict[str, Tensor]:
        found = dict(own_state(noted(saved, own, weights_only=training is None), saved.mesh, saved.is_expert))
        if training is not None:
            found |= random_state(saved.mesh.rank)
        if saved.mesh.rank == 0:
            found |= {f"buffer/{name}": value for name, value in buffers(saved.module).items()}
            found |= shared
        return unshared(found)

    def header(new: Path) -> dict[str, Any]:
        write_host_files(saved, own, new)
        wrote = sorted(file.name for file in new.iterdir() if not NAMES.is_shard(file.name))
        for name in wrote:
            sync(new / name)
        beside = {name: files.describe(new / name) for name in wrote if name.endswith(".safetensors")}
        keep_others(target, new)
        place = {"ranks": saved.mesh.world, "expert_ranks": saved.mesh.ep_size}
        facts = {"format": files.FORMAT, **place, "experts": experts, "training": training}
        return {**facts, files.BESIDE: beside, "wrote": wrote}

    shared: dict[str, Tensor] = {}
    experts = [described(saved, one, f"experts/{i}", shared) for i, one in enumerate(saved.experts)]
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
    here = PlacedModel(model, optimizer)
    path = Path(folder).resolve()
    with here.all_ranks() as cpu_group:
        reader = Reader(path, cpu_group, NAMES, here.is_expert)
    check_layers(path, reader.manifest["experts"], here)
    training = None
    if here.trains and not weights_only:
        training = reader.manifest["training"]
        require(training is not None, f"{path}: was saved without an optimizer: load it with weights_only=True")
        if here.state.shares_numbers:
            forget_idle(reader, training)
    kinds = training["kinds"] if training else []
    reader.check_fits(here.module, here.state.shapes(), [WEIGHT], here.mesh.ep_size, optional=kinds)
    scheduler = scheduler or here.scheduler
    schedule = check_training(path, training, here, scheduler)
    for one, saved in zip(here.experts, reader.manifest["experts"], strict=True):
        one.load_state_dict({**joined(saved["state"], reader), "place": one.state_dict()["place"]})
    _load_parameters(reader, here, training)
    reader.load_buffers(here.module)
    if training is not None:
        here.state.set_options(options_of(training))
        here.set_counters(training["counters"])
        set_loss_scale(here.scaler, training["loss_scale"])
        restore_random_state(reader, here.mesh)
    if schedule is not None:
        scheduler.load_state_dict(schedule)


def _load_parameters(reader: Reader, here: PlacedModel, training: dict[str, Any] | None) -> None:
    """Overwrite the parameters; without `training` the optimizer begins anew."""
    names = {name: local_experts(name, shape, here.mesh, here.is_expert) for name, shape in here.state.shapes().items()}
    every = training["kinds"] if training else []
    kinds = {name: [kind for kind in every if reader.holds(kind, name, experts)] for name, experts in names.items()}
    here.state.create(kinds, training["optimizer"]["numbers"] if training else {})
    for name, experts in names.items():
        state = {kind: reader.parameter(kind, name, experts) for kind in (WEIGHT, *kinds[name])}
        here.state.write_state(name, state)


def _agree_on(target: Path, cpu_group: CpuGroup) -> None:
    """Check on every rank that all name one folder, which is new or was written by save_pretrained.

    Raises:
        UserError: it is not.
    """
    found = cpu_group.gather(str(target))
    require(len(set(found)) == 1, f"the ranks save to different folders: {', '.join(dict.fromkeys(found))}")
    fault = cpu_group.broadcast(_refusal(target) if cpu_group.rank == 0 else None)
    require(fault is None, str(fault))


def _refusal(target: Path) -> str | None:
    """Return why a folder may not be written, as a line; None: it may."""
    if not target.exists():
        return None
    if not target.is_dir():
        return f"{target}: is a file: must be a folder"
    if not (target / NAMES.manifest).exists():
        other = f"{target}: holds other files and no {NAMES.manifest}: must be a new folder, or one saved before"
        return other if any(target.iterdir()) else None
    try:
        files.read_manifest(target, NAMES)
    except UserError as error:
        return f"{error}; remove the folder to save another there"
    return None
