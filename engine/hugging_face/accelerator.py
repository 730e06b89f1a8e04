"""Expert layers in a loop with Hugging Face Accelerate, with DeepSpeed or, on one rank, without.

    experts = replace_feed_forwards(model, ...)
    use_experts(accelerator, experts)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for plans, batch in planned_batches(accelerator, experts, loader):
        with accelerator.accumulate(model), experts.planned(plans):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()

Plans are made in a thread of the training process while earlier batches train; workers of the loader only read ids.
"""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import nn

from foreroute.engine.ahead import Ahead
from foreroute.engine.errors import UserError, require
from foreroute.engine.hugging_face.arguments import arguments_of
from foreroute.engine.hugging_face.engines import adapt_engine, is_engine
from foreroute.engine.optim.expert_sharding import is_sharded, parameter_groups
from foreroute.engine.plug_in import load_pretrained, save_pretrained
from foreroute.engine.plug_in.call_arguments import Call
from foreroute.engine.plug_in.planned_experts import PlannedExperts
from foreroute.engine.plug_in.planned_layer import PlannedFeedForward
from foreroute.engine.plug_in.plans import Plans

Batch = Mapping[str, Any]
FOLDER = "foreroute"
"""Of a checkpoint without DeepSpeed: the folder in it with the model."""
_HANDLES = "foreroute_handles"  # on an accelerator: the hooks of use_experts


def use_experts(accelerator: Any, experts: PlannedExperts) -> None:
    """Make prepare, save_state and load_state of an Accelerator right for a model with expert layers.

    prepare separates sharded experts from other parameters in the optimizer, and adapts the DeepSpeed engine
    (engine/hugging_face/engines.py). save_state writes the model, with its tables, as save_pretrained does.
    Call it before prepare; a second call, after free_memory, is for another model.

    Raises:
        UserError: experts are sharded, and the accelerator does not use DeepSpeed.
    """
    kind = getattr(accelerator.distributed_type, "value", accelerator.distributed_type)
    require(
        kind == "DEEPSPEED" or experts.mesh.ep_size == 1,
        f"parallel.expert_ranks above 1 with distributed_type={kind}: needs DeepSpeed",
    )
    for handle in accelerator.__dict__.pop(_HANDLES, ()):
        handle.remove()
    accelerator.__dict__.pop("prepare", None)
    theirs = accelerator.prepare

    def prepare(*objects: Any, **options: Any) -> Any:
        for one in objects:
            if isinstance(one, torch.optim.Optimizer):
                separate_experts(one)
        result = theirs(*objects, **options)
        for one in result if isinstance(result, tuple) else (result,):
            if is_engine(one):
                adapt_engine(one, experts)
        return result

    accelerator.prepare = prepare
    if kind == "DEEPSPEED":
        return  # its engine saves the experts

    def save(models: list[nn.Module], weights: list[Any], folder: str) -> None:
        for place in _with_experts(models):
            save_pretrained(_inner(models[place]), Path(folder) / FOLDER, weights_only=True)
            del weights[place]

    def load(models: list[nn.Module], folder: str) -> None:
        for place in _with_experts(models):
            load_pretrained(_inner(models[place]), Path(folder) / FOLDER)
            del models[place]

    handles = (accelerator.register_save_state_pre_hook(save), accelerator.register_load_state_pre_hook(load))
    setattr(accelerator, _HANDLES, handles)


def _with_experts(models: list[nn.Module]) -> list[int]:
    """Return the place of the model with expert layers in a list; there may be one."""
    found = [any(isinstance(m, PlannedFeedForward) for m in model.modules()) for model in models]
    return [place for place, has in enumerate(found) if has][:1]


def _inner(model: nn.Module) -> nn.Module:
    """Return the model inside of DistributedDataParallel or an engine."""
    inner = getattr(model, "module", model)
    return inner if isinstance(inner, nn.Module) else model


def separate_experts(optimizer: torch.optim.Optimizer) -> None:
    """Split an optimizer's groups in place such that no group has sharded experts beside other parameters.

    Raises:
        UserError: a scheduler already has the old groups.
    """
    groups = optimizer.param_groups
    if all(len({is_sharded(p) for p in group["params"]}) < 2 and _is_marked(group) for group in groups):
        return
    require(
        not any("initial_lr" in group for group in groups),
        "the optimizer has sharded experts beside other parameters and already has a scheduler: build it from"
        " parameter_groups(model.parameters()) of engine.plug_in",
    )
    groups[:] = parameter_groups(groups)


def _is_marked(group: Mapping[str, Any]) -> bool:
    """Return whether DeepSpeed sees that a group has sharded experts."""
    return bool(group.get("moe")) or not any(is_sharded(p) for p in group["params"])


class PlannedBatches(Ahead[tuple[Future[Plans], Batch]]):
    """The batches of a loader with their plans, requested `depth` batches ahead."""

    def __init__(self, batches: Iterable[Batch], experts: PlannedExperts, model: nn.Module, depth: int = 2) -> None:
        require(depth >= 1, f"depth={depth}: must be 1 batch or more")
        super().__init__(_requests(batches, experts, model), depth)


def _requests(
    batches: Iterable[Batch], experts: PlannedExperts, model: nn.Module
) -> Iterator[tuple[Future[Plans], Batch]]:
    told = arguments_of(model)
    for batch in _read(batches):
        found = isinstance(batch, Mapping)
        require(found, f"a batch is a {type(batch).__name__}: must be a mapping with input_ids")
        yield experts.request(told, Call(model, (), batch)), batch


def _read(batches: Iterable[Batch]) -> Iterator[Batch]:
    try:
        yield from batches
    except UserError as error:  # from a worker, with its traceback in the message
        raise UserError(str(error).strip().splitlines()[-1].split("UserError: ")[-1]) from error


def planned_batches(
    accelerator: Any, experts: PlannedExperts, loader: Iterable[Batch], *, model: nn.Module, depth: int = 2
) -> Iterator[tuple[Plans, Batch]]:
    """Yield the plans and the batch of each step of a prepared loader; plans are made while earlier batches train.

    accelerator.accumulate and gather_for_metrics find the last batch as without planning. All ranks must take equally
    many batches. A change of k takes effect `depth` batches later.

    Args:
        loader: yields mappings with input_ids and, where there is padding, attention_mask.
        model: the model of transformers, prepared or not.
        depth: number of batches that are planned ahead.

    Raises:
        UserError: a batch lacks ids or a mask, or a worker of the loader plans.
    """
    state, shown = accelerator.gradient_state, _Shown(loader)
    keep_on_host(loader)
    batches = PlannedBatches(loader, experts, _inner(model), depth)
    try:
        for number, (future, batch) in enumerate(batches):
            if number == 0:  # after the loader, which is asked ahead, has shown itself
                state._add_dataloader(shown)
            shown.end_of_dataloader = batches.last
            yield future.result(), {name: _moved(value, accelerator.device) for name, value in batch.items()}
    finally:
        state._remove_dataloader(shown)


def keep_on_host(loader: Any) -> None:
    """Make a prepared loader yield batches on the host, from which plans are made without waiting for a GPU."""
    if type(loader).__name__ == "DataLoaderShard":  # that of each rank by itself; others send batches between ranks
        loader.device = None


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value


class _Shown:
    """The state of a loader that Accelerate reads, for the batch that trains now."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self.end_of_dataloader = False

    @property
    def remainder(self) -> int:
        return int(getattr(self._loader, "remainder", -1))
