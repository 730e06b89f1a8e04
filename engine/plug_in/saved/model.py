"""A user's model with expert layers, and its place among the ranks that save or load it."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from foreroute.engine.checkpoint import files
from foreroute.engine.errors import require
from foreroute.engine.moe.experts import Experts
from foreroute.engine.optim.model_state import ModelState, is_engine, state_of
from foreroute.engine.parallel.cpu_group import CpuGroup, GlooGroup
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.plug_in.planned_experts import PlannedExperts
from foreroute.engine.plug_in.planned_layer import PlannedFeedForward

NAMES = files.Names("foreroute.json", "foreroute")
_COUNTERS = "global_steps", "global_samples", "skipped_steps"


class PlacedModel:
    """A model with expert layers, and its place among the ranks."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        layers = [m for m in model.modules() if isinstance(m, PlannedFeedForward)]
        self.engine: Any = model if is_engine(model) else None
        self.experts = list(dict.fromkeys(m.experts for m in layers))
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
    def scheduler(self) -> Any:
        """The learning-rate scheduler of a DeepSpeed engine."""
        return None if self.engine is None else self.engine.lr_scheduler

    @property
    def scaler(self) -> Any:
        """The loss scale of a DeepSpeed engine."""
        return None if self.engine is None else getattr(self.engine.optimizer, "loss_scaler", None)

    def counters(self) -> dict[str, int]:
        """Return the counters of a DeepSpeed engine."""
        return {} if self.engine is None else {name: int(getattr(self.engine, name)) for name in _COUNTERS}

    def set_counters(self, counters: Mapping[str, int]) -> None:
        """Set the counters of a DeepSpeed engine."""
        for name, value in counters.items() if self.engine is not None else ():
            setattr(self.engine, name, value)

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
