"""The parameters of a model in a checkpoint: which rank writes what, and a reader for any ranks.

An expert parameter is cut into one tensor per global expert id:

    weight/<parameter>[/<expert:05d>]    fp32 master; the optimizer's tensors, such as exp_avg/.., as well
    buffer/<name>
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from foreroute.engine.checkpoint import files
from foreroute.engine.errors import UserError
from foreroute.engine.parallel.cpu_group import CpuGroup
from foreroute.engine.parallel.mesh import Mesh

Shapes = Mapping[str, tuple[int, ...]]
IsExpert = Callable[[str], bool]
"""Returns whether a parameter of this name is one of experts, with dim 0 = expert."""


def by_name(name: str) -> bool:
    """Return whether a parameter of a run's model is one of experts."""
    return ".experts." in name


class Reader:
    """An opened checkpoint whose checksums agree; tensors are read one by one."""

    def __init__(
        self, path: Path, cpu_group: CpuGroup, names: files.Names = files.OF_A_RUN, is_expert: IsExpert = by_name
    ) -> None:
        self.path, self.is_expert = path, is_expert
        self.manifest = files.verify(path, cpu_group, names)
        self.keys: dict[str, dict[str, Any]] = self.manifest["tensors"]
        self._open: dict[str, Any] = {}

    def get(self, key: str) -> Tensor:
        """Read a tensor."""
        name = self.keys[key]["file"]
        if name not in self._open:
            self._open[name] = safe_open(self.path / name, "pt")
        value: Tensor = self._open[name].get_tensor(key)
        return value

    def holds(self, kind: str, name: str, experts: range | None) -> bool:
        """Return whether all of a parameter's value is there."""
        return all(key in self.keys for key in parameter_keys(kind, name, experts))

    def parameter(self, kind: str, name: str, experts: range | None) -> Tensor:
        """Read a parameter's value; the experts asked for are put together."""
        parts = [self.get(key) for key in parameter_keys(kind, name, experts)]
        return parts[0] if experts is None else torch.stack(parts)

    def load_buffers(self, module: nn.Module) -> None:
        """Overwrite the persistent buffers."""
        for name, buffer in buffers(module).items():
            buffer.copy_(self.get(f"buffer/{name}"))

    def check_fits(
        self, module: nn.Module, shapes: Shapes, kinds: Sequence[str], ep_size: int, *, optional: Sequence[str] = ()
    ) -> None:
        """Compare names and shapes of the whole model, all its experts included, with the stored ones.

        Args:
            shapes: of each parameter on this rank.
            kinds: what every parameter must have.
            optional: what a parameter may have.

        Raises:
            UserError: they differ; names the first difference.
        """
        wanted = {f"buffer/{name}": list(b.shape) for name, b in buffers(module).items()}
        allowed = dict(wanted)
        for kind in (*kinds, *optional):
            for name, shape in shapes.items():
                experts = range(shape[0] * ep_size) if self.is_expert(name) else None
                part = list(shape if experts is None else shape[1:])
                found = dict.fromkeys(parameter_keys(kind, name, experts), part)
                allowed |= found
                wanted |= found if kind in kinds else {}
        prefixes = tuple(f"{kind}/" for kind in (*kinds, *optional, "buffer"))
        stored = {k: v["shape"] for k, v in self.keys.items() if k.startswith(prefixes)}
        for key in dict.fromkeys([*wanted, *stored]):
            if allowed.get(key) != stored.get(key):
                raise UserError(
                    f"{self.path} does not fit this model: {key} has shape "
                    f"{stored.get(key, 'none')} in the checkpoint, {allowed.get(key, 'none')} here"
                )


def local_experts(name: str, shape: Sequence[int], mesh: Mesh, is_expert: IsExpert = by_name) -> range | None:
    """Return the global ids of the experts of this rank's parameter; None if it is not one of experts."""
    return mesh.local_experts(shape[0] * mesh.ep_size) if is_expert(name) else None


def parameter_keys(kind: str, name: str, experts: range | None) -> list[str]:
    """Return the keys that a parameter is stored under: one, or one for each expert."""
    key = f"{kind}/{name}"
    return [key] if experts is None else [f"{key}/{expert:05d}" for expert in experts]


def buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the persistent buffers."""
    persistent = module.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in module.named_buffers() if name in persistent}


def own_state(
    states: Iterable[tuple[str, Mapping[str, Tensor]]], mesh: Mesh, is_expert: IsExpert = by_name
) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters' state that this rank writes, each on the host before the next is read.

    A GPU has room for one, not for all.

    Of R ranks that hold the same experts, the r-th takes the experts r, r + R, ... of those; of all W ranks the w-th
    takes the other parameters w, w + W, ...

    Args:
        states: of all parameters, as from ModelState.read_state.
    """
    replicas, replica = mesh.world // mesh.ep_size, mesh.rank // mesh.ep_size
    for number, (name, values) in enumerate(states):
        for kind, value in values.items():
            experts = local_experts(name, value.shape, mesh, is_expert)
            keys = parameter_keys(kind, name, experts)
            if experts is not None:
                for row in range(replica, len(keys), replicas):
                    part = value[row]  # a slice, which would keep the whole
                    yield keys[row], part.cpu() if part.is_cuda else part.clone()
            elif number % mesh.world == mesh.rank:
                yield keys[0], value.cpu()
