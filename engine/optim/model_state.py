"""The weights and the optimizer's state of a model by parameter name: plain PyTorch, and every ZeRO stage of DeepSpeed.

Checkpoints read and write through it (engine/checkpoint/). ZeRO keeps fp32 weights and the optimizer's state in flat
tensors, each of many parameters, and shards them over ranks. Here every parameter has its own, whole.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

from foreroute.engine.errors import require
from foreroute.engine.optim.deepspeed_contract import (
    FLATS_NAME,
    LINK_NAMES,
    PARAMETERS_NAMES,
    REGATHER_NAMES,
    SHARD_NAMES,
    SUB_GROUPS_NAMES,
    require_names,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from foreroute.engine.parallel.mesh import Mesh

WEIGHT = "weight"
_STEP = "step"  # a number even where a parameter has no dimensions either
_NUMBERS, _OPTIONS = "numbers of optimizer steps", "options of the optimizer, such as its learning rate"
_OF_A_MACHINE = {"params", "name", "foreach", "fused", "capturable", "differentiable", "moe"}
"""Options of an optimizer's group that belong to this machine and topology; the others are saved."""
_WRAPPERS = deepspeed.DeepSpeedEngine, nn.parallel.DistributedDataParallel, OptimizedModule


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """The parameters whose optimizer state is one tensor: one parameter, or with ZeRO all those of a flat tensor."""

    flat: Tensor
    names: tuple[str, ...]
    group: int  # number of the optimizer's group


class ModelState:
    """The state of a model in training; the module has the compute copy of the weights."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        mesh: Mesh,
        *,
        zero: Any = None,
        stage: int = 0,
    ) -> None:
        """Take a model and the optimizer that updates it, None for none.

        Args:
            zero: DeepSpeed's optimizer around it; None at ZeRO-0 and in plain PyTorch.
            stage: of ZeRO.

        Raises:
            UserError: DeepSpeed's objects lack a name that is needed.
        """
        self.mesh, self._module, self._optimizer, self._zero, self._stage = mesh, module, optimizer, zero, stage
        self._parts: dict[str, Part] | None = None  # of each parameter that the optimizer updates
        if optimizer is not None and stage == 3:
            require_names(zero, FLATS_NAME, *REGATHER_NAMES, *SUB_GROUPS_NAMES)
            for param in module.parameters():
                require_names(param, *SHARD_NAMES)
        elif optimizer is not None and stage:
            require_names(zero, *LINK_NAMES, _parameters_name(zero))

    @property
    def module(self) -> nn.Module:
        """The model, with the compute copy of the weights."""
        return self._module

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return each parameter's name and shape on this rank; an expert parameter has this rank's experts."""
        parameters = self._module.named_parameters()
        return {name: tuple(getattr(p, SHARD_NAMES[0], p.shape)) for name, p in parameters}

    def parts(self) -> dict[str, Part]:
        """Return the part of each parameter that the optimizer updates.

        Raises:
            UserError: the optimizer has parameters that are not the model's.
        """
        if self._parts is None:
            names = {id(p): name for name, p in self._module.named_parameters()}
            self._parts = {}
            for flat, params, group in self._flat_groups():
                foreign = sum(id(p) not in names for p in params)
                require(not foreign, f"optimizer: {foreign} of its parameters are not the model's")
                part = Part(flat, tuple(names[id(p)] for p in params), group)
                self._parts.update(dict.fromkeys(part.names, part))
        return self._parts

    def _flat_groups(self) -> Iterator[tuple[Tensor, Sequence[nn.Parameter], int]]:
        """Yield each tensor that the optimizer updates, the parameters in it, and the number of its group."""
        if self._optimizer is None:
            return
        if self._stage == 0:
            for number, group in enumerate(self._optimizer.param_groups):
                yield from ((param, [param], number) for param in group["params"])
            return
        if self._stage < 3:
            found = getattr(self._zero, _parameters_name(self._zero))
            flats = [flat for group in self._optimizer.param_groups for flat in group["params"]]
            group_of: Any = range(len(flats))
        else:  # the optimizer's own groups are empty between steps
            found, group_of = (getattr(self._zero, name) for name in SUB_GROUPS_NAMES)
            flats = getattr(self._zero, FLATS_NAME)
        yield from ((flat, of_flat, group_of[i]) for i, (flat, of_flat) in enumerate(zip(flats, found, strict=True)))

    def flats(self) -> Iterator[Tensor]:
        """Yield the tensors that the optimizer updates: with ZeRO flat fp32 partitions, else the parameters."""
        yield from (part.flat for part in dict.fromkeys(self.parts().values()))

    @property
    def optimizer_name(self) -> str:
        """The class of the optimizer."""
        return type(self._optimizer).__name__

    def groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's groups: the names of their "parameters", and the "options" that are numbers."""
        if self._optimizer is None:
            return []
        found: list[dict[str, Any]] = [
            {"options": _options(group), "parameters": []} for group in self._optimizer.param_groups
        ]
        for name, part in self.parts().items():
            found[part.group]["parameters"].append(name)
        return found

    def set_options(self, of_parameter: Mapping[str, Mapping[str, Any]]) -> None:
        """Set the options of the optimizer's groups to those of their parameters, as `groups` returned them.

        Raises:
            UserError: a group has parameters with different options.
        """
        found = [_one(of_parameter, group["parameters"], _OPTIONS) for group in self.groups()]
        for options, here in zip(found, self._optimizer.param_groups if self._optimizer else (), strict=True):
            for key, value in options.items():
                if isinstance(here.get(key), Tensor):
                    here[key].fill_(value)
                else:
                    here[key] = tuple(value) if isinstance(value, list) else value

    @property
    def shares_numbers(self) -> bool:
        """Whether the parameters of a group step together, as with ZeRO."""
        return self._stage > 0

    def numbers(self) -> dict[str, dict[str, float]]:
        """Return the numbers in the optimizer's state of each parameter, such as Adam's "step"."""
        return {name: _numbers(self._state(part)) for name, part in self.parts().items()}

    def kinds(self) -> list[str]:
        """Return the names of the tensors that the optimizer keeps for a parameter, such as exp_avg.

        Raises:
            UserError: one has another shape than its parameter.
        """
        found: dict[str, None] = {}
        for part in self.parts().values():
            for key, value in self._state(part).items():
                if _is_number(key, value):
                    continue
                require(
                    value.shape == part.flat.shape,
                    f"optimizer: keeps {key} of shape {list(value.shape)} for {part.names[0]} of shape"
                    f" {list(part.flat.shape)}; must keep numbers, or tensors of the parameter's shape",
                )
                found[key] = None
        return list(found)

    def check(self, numbers: Mapping[str, Mapping[str, float]], options: Mapping[str, Mapping[str, Any]]) -> None:
        """Raise UserError unless `create` and `set_options` can take these numbers and options of parameters."""
        for part in dict.fromkeys(self.parts().values()):
            _one(numbers, part.names, _NUMBERS)
        for group in self.groups():
            _one(options, group["parameters"], _OPTIONS)

    def create(self, kinds: Mapping[str, Iterable[str]], numbers: Mapping[str, Mapping[str, float]]) -> None:
        """Create the optimizer's state as its first step would, where there is none, and set its numbers, others to 0.

        DeepSpeed links parameters to their state once, at the first step of the first group. The other groups have no
        state by then and would stay unlinked. Here all groups have one when the link is made.

        Args:
            kinds: of each parameter, the names of its tensors.
            numbers: of each parameter, as from `numbers`.

        Raises:
            UserError: parameters in one flat tensor of ZeRO have different numbers.
        """
        every = dict.fromkeys(kind for of_one in kinds.values() for kind in of_one)
        none = dict.fromkeys((key for of_one in numbers.values() for key in of_one), 0.0)
        for part in dict.fromkeys(self.parts().values()):
            found = _one(numbers, part.names, _NUMBERS)
            own = dict.fromkeys(kind for name in part.names for kind in kinds.get(name, ()))
            # with ZeRO all parameters step together, or none
            self._create(part, (every if self._stage else own), found or (none if self._stage else {}))
        self.link()

    def _create(self, part: Part, kinds: Iterable[str], numbers: Mapping[str, float]) -> None:
        assert self._optimizer is not None
        group, state = self._optimizer.param_groups[part.group], dict(self._state(part))
        for key, value in {**dict.fromkeys(_numbers(state), 0), **numbers}.items():
            there = state.get(key)
            if isinstance(there, Tensor):
                there.fill_(value)
            elif there is not None or key != _STEP:
                state[key] = value
            elif type(self._optimizer).__module__.startswith("deepspeed."):
                state[key] = int(value)
            else:  # as PyTorch's optimizers have it
                on_device = group.get("fused") or group.get("capturable")
                state[key] = torch.tensor(float(value), device=part.flat.device if on_device else None)
        for kind in kinds:
            if kind not in state:
                state[kind] = torch.zeros_like(part.flat, requires_grad=False)
        if state:
            self._optimizer.state[part.flat] = state

    def link(self) -> None:
        """Link parameters to their state in ZeRO's flat tensors, so that it can be read and written by parameter."""
        parts = self.parts().values()
        if self._stage in (1, 2) and parts and all(self._state(part) for part in parts):
            link, linked = LINK_NAMES
            setattr(self._zero, linked, False)
            getattr(self._zero, link)()

    def read_state(self, *, weights_only: bool = False) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield (parameter name, {"weight": .., "exp_avg": .., ..}) in the shapes of shapes().

        "weight" is the fp32 master weight, or that of the module where the optimizer has none. This is a collective
        over the ranks that shard the parameter's state: every rank must read to the end. Values may alias the live
        state.
        """
        parts = self.parts()
        for name, param in self._module.named_parameters():
            part = parts.get(name)
            kept = {} if part is None or weights_only else self._state(part)
            kinds = [kind for kind, value in kept.items() if not _is_number(kind, value)]
            if part is not None and self._stage:
                state = {kind: safe_get_full_optimizer_state(param, kind) for kind in kinds}
                yield name, {WEIGHT: safe_get_full_fp32_param(param), **state}
            else:
                yield name, {WEIGHT: _whole(param), **{kind: kept[kind] for kind in kinds}}

    @torch.no_grad()
    def write_state(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Overwrite a parameter's master weight, compute copies and optimizer state with values as from read_state.

        A tensor of the optimizer that is not in `state` becomes zeros.
        """
        self._leave_inference()
        param, part, weight = self._module.get_parameter(name), self.parts().get(name), state[WEIGHT]
        if param.shape == weight.shape:  # DeepSpeed's setters below change the master only
            param.copy_(weight)
        if self._stage == 3:
            getattr(param, SHARD_NAMES[1]).data.copy_(_shard(weight, param))
        if part is None:
            return
        if self._stage == 3:
            safe_set_local_fp32_param(param, _shard(weight, param))
        elif self._stage:
            safe_set_full_fp32_param(param, weight)
        for kind, there in self._state(part).items():
            if _is_number(kind, there):
                continue
            value = state[kind] if kind in state else torch.zeros_like(weight)
            if self._stage == 3:
                safe_set_local_optimizer_state(param, _shard(value, param), kind)
            elif self._stage:
                safe_set_full_optimizer_state(param, value, kind)
            else:
                there.copy_(value)

    def _state(self, part: Part) -> dict[str, Any]:
        assert self._optimizer is not None
        found: dict[str, Any] = self._optimizer.state.get(part.flat, {})
        return found

    def _leave_inference(self) -> None:
        """Release weights that ZeRO-3 gathered in torch.inference_mode(), which autograd cannot use."""
        parameters = self._module.parameters()
        if self._stage == 3 and any(p.is_inference() and p.numel() for p in parameters):
            for name in REGATHER_NAMES:
                getattr(self._zero, name)()


def is_engine(model: nn.Module) -> bool:
    """Return whether a model is a DeepSpeed engine."""
    return isinstance(model, deepspeed.DeepSpeedEngine)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer | None, mesh: Mesh) -> ModelState:
    """Return the state of a user's model: a DeepSpeed engine, or a module with its optimizer.

    Raises:
        UserError: DeepSpeed's engine keeps the state in a form that is not read here, or is between the micro-batches
            of a step.
    """
    if not isinstance(model, deepspeed.DeepSpeedEngine):
        return ModelState(unwrapped(model), optimizer, mesh)
    require(optimizer is None, "optimizer: must be left out, as a DeepSpeed engine has its own")
    stage, theirs = int(model.zero_optimization_stage()), model.optimizer
    require(
        stage > 0 or theirs is None or isinstance(theirs, torch.optim.Optimizer),
        f"DeepSpeed's {type(theirs).__name__} at ZeRO-0 cannot be read: fp16 and bf16 need ZeRO 1, 2 or 3",
    )
    require(not model.zero_nvme_offload_optimizer(), "DeepSpeed's optimizer state is on NVMe: must be in memory")
    steps, micro_batches = divmod(model.micro_steps, model.gradient_accumulation_steps())
    ended = model._is_gradient_accumulation_boundary  # set by callers that count themselves, such as Accelerate
    require(
        micro_batches == 0 if ended is None else ended,
        f"{micro_batches} of {model.gradient_accumulation_steps()} micro-batches have run after step {steps}: must be"
        " between optimizer steps",
    )
    inner = getattr(theirs, "optimizer", None) if stage else theirs
    state = ModelState(model.module, inner, mesh, zero=theirs if stage else None, stage=stage)
    state.link()
    return state


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside DeepSpeed's engine, DistributedDataParallel or torch.compile."""
    for name in ("module", "_orig_mod"):
        inner = getattr(model, name, None)
        if isinstance(model, _WRAPPERS) and isinstance(inner, nn.Module):
            return unwrapped(inner)
    return model


def _parameters_name(zero: Any) -> str:
    return next((name for name in PARAMETERS_NAMES if hasattr(zero, name)), PARAMETERS_NAMES[0])


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of an optimizer's group that are numbers, or tuples of numbers."""
    plain = {key: float(v) if isinstance(v, Tensor) else v for key, v in group.items() if key not in _OF_A_MACHINE}
    return {key: value for key, value in plain.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    items = value if isinstance(value, tuple | list) else [value]
    return all(isinstance(item, int | float) for item in items)


def _is_number(key: str, value: Any) -> bool:
    return key == _STEP or not isinstance(value, Tensor)


def _numbers(state: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers in an optimizer's state of a parameter."""
    found = {key: value for key, value in state.items() if _is_number(key, value)}
    return {key: float(v) if isinstance(v, Tensor) else v for key, v in found.items() if _is_plain(v) or key == _STEP}


def _one(of_parameter: Mapping[str, Mapping[str, Any]], names: Sequence[str], what: str) -> Mapping[str, Any]:
    """Return what all of these parameters have.

    Raises:
        UserError: they differ.
    """
    known = [name for name in names if of_parameter.get(name)]
    for name in known[1:]:
        first, other = of_parameter[known[0]], of_parameter[name]
        require(
            first == other,
            f"{known[0]} and {name} were saved with different {what}, {dict(first)} and {dict(other)}: must not be in"
            " one group of the optimizer here",
        )
    return of_parameter[known[0]] if known else {}


def _whole(param: nn.Parameter) -> Tensor:
    """Return a parameter's value; at ZeRO-3 gathered, a collective over the ranks that shard it."""
    if not hasattr(param, SHARD_NAMES[1]):
        return param.detach()
    with deepspeed.zero.GatheredParameters([param]):
        return param.detach().clone()


def _shard(value: Tensor, param: nn.Parameter) -> Tensor:
    """Return this rank's shard of a parameter-shaped value at ZeRO-3; shards are equal, the last padded with zeros."""
    shard: Any = param
    numel = shard.ds_tensor.numel()
    padding = numel * shard.ds_zero_partition_world_size - value.numel()
    padded = nn.functional.pad(value.flatten(), (0, padding))
    return padded.narrow(0, numel * shard.ds_zero_partition_rank, numel)
