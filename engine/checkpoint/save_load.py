"""Checkpoints that hold the model, not the cluster: saved by any number of ranks, loaded by any other.

Keys, where an expert parameter (its name contains ".experts.", dim 0 = expert) is cut into one tensor per global expert
id:

    weight/<parameter>[/<expert:05d>]    fp32 master; exp_avg/... and exp_avg_sq/... as well
    buffer/<name>    memory/<layer>/<global stream id:06d>    table/<i>/<field>    rng/torch/rank-<rank:05d>
    rng/cuda/rank-<rank:05d>

Each rank writes one shard: the experts that it holds, shared with the ranks that hold the same ones, its share of all
other parameters, and its own memory and random state. Nothing is gathered on one rank but the manifest, which has all
that is no tensor (engine/checkpoint/files.py). Nothing is pickled. Inverse of `save`: `load`, or `load_weights`.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from foreroute.engine.checkpoint import files
from foreroute.engine.checkpoint.files import read_manifest
from foreroute.engine.errors import UserError, require
from foreroute.engine.parallel.cpu_group import CpuGroup
from foreroute.engine.parallel.mesh import Mesh

if TYPE_CHECKING:  # evaluation loads weights without DeepSpeed
    from foreroute.engine.optim.deepspeed_engine import Engine

__all__ = ["TrainingState", "find_newest", "load", "load_weights", "read_manifest", "save"]
STATE_KEYS = ("weight", "exp_avg", "exp_avg_sq")
Shapes = Mapping[str, tuple[int, ...]]


@dataclass
class TrainingState:
    """State that a rank needs to go on, beside the engine's."""

    step: int  # optimizer steps done; the k schedule and the learning rate follow it
    cursor: int  # index of the next segment in the data stream
    rng: Tensor | None
    """uint8: this rank's torch.get_rng_state(); None after loading on other ranks: draw new numbers."""
    memory: tuple[Tensor, ...] | None = None  # one [streams, m, D] tensor per layer
    stream_B: Tensor | None = None  # int64: global stream id of each row of memory
    tables: list[dict[str, Tensor]] = field(default_factory=list)  # the same on every rank
    device_rng: Tensor | None = None
    """uint8: the random state of this rank's GPU, from which dropout draws there; None without one, or as rng."""


def save(
    folder: Path,
    engine: "Engine",
    state: TrainingState,
    *,
    facts: dict[str, Any],
    keep: int,
    cpu_group: CpuGroup | None = None,
) -> Path:
    """Write folder/step-<step> and then remove all but the newest `keep` checkpoints up to this step.

    A checkpoint of the same step is replaced; those of later steps (damaged, or this run would start there) are left.
    Every rank of the run takes part; all see the same folder.

    Args:
        state: of this rank; each rank has the memory of its own streams.
        facts: JSON values that the manifest keeps beside its own, such as the run's configuration; rank 0's are taken.
        cpu_group: how the ranks talk; None for a rank alone.

    Raises:
        OSError: on every rank: it could not be written, older checkpoints are untouched and nothing half-written is
            left; or it is written and an older one could not be removed.
    """
    cpu_group = _checked(cpu_group, engine.mesh)
    target = folder / f"step-{state.step:08d}"
    temporary = folder / cpu_group.broadcast(files.temporary_name(state.step))
    new = temporary / "new"

    def begin() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        files.remove_leftovers(folder)
        new.mkdir(parents=True)

    def write() -> dict[str, Any]:
        return files.write_shard(new / files.shard_name(cpu_group.rank), _tensors(engine, state))

    def finish() -> None:
        files.write_manifest(new, _header(engine, state, facts), shards)
        files.publish(new, target)

    def remove_older() -> None:
        older = [path for path in files.checkpoints(folder) if files.step_of(path) <= state.step]
        for path in older[keep:]:
            shutil.rmtree(path)

    try:
        files.on_ranks(cpu_group, begin, only=0)
        described = files.on_ranks(cpu_group, write)
        shards = {files.shard_name(rank): shard for rank, shard in enumerate(described)}
        _check_disjoint(shards)
        files.on_ranks(cpu_group, finish, only=0)
    except OSError as error:
        raise OSError(f"checkpoint {target} could not be written: {error}") from error
    finally:
        if cpu_group.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
    files.on_ranks(cpu_group, remove_older, only=0)
    return target


def find_newest(folder: Path, cpu_group: CpuGroup | None = None) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint (None: there is none) and a warning line for each newer one that is not.

    With many ranks all call it, share the work and get the same answer.
    """
    cpu_group = cpu_group or CpuGroup()
    warnings = []
    for name in cpu_group.broadcast([path.name for path in files.checkpoints(folder)]):
        try:
            files.verify(folder / name, cpu_group)
        except UserError as error:
            warnings.append(f"skipped a damaged checkpoint: {error}")
        else:
            return folder / name, warnings
    return None, warnings


def load(
    path: Path, engine: "Engine", *, cpu_group: CpuGroup | None = None, streams: Sequence[int] | None = None
) -> TrainingState:
    """Restore weights, masters, moments, Adam step and buffers bit for bit, and return the rest.

    Every rank of the run takes part and reads only what it holds. The checkpoint may come from any other number of
    ranks, size of expert groups and ZeRO stage; only this rank's random state is then absent.

    Args:
        streams: global ids of the streams whose memory this rank wants, in this order; None for all, in ascending
            order.

    Raises:
        UserError: on every rank: the checkpoint is damaged, or does not fit the model (names the first difference).
    """
    cpu_group = _checked(cpu_group, engine.mesh)
    reader, shapes = _Reader(path, cpu_group), engine.shapes()
    reader.check_fits(engine.module, shapes, STATE_KEYS, engine.mesh.ep_size)
    missing = [stream for rank in cpu_group.gather(reader.missing(streams)) for stream in rank]
    require(not missing, f"{path}: holds no memory of streams {missing}")
    for name, shape in shapes.items():
        experts = _experts(name, shape, engine.mesh)
        engine.write_state(name, {kind: reader.parameter(kind, name, experts) for kind in STATE_KEYS})
    engine.set_adam_step(reader.manifest["adam_step"])
    reader.load_buffers(engine.module)
    return reader.training_state(engine.mesh, streams)


def load_weights(path: Path, module: nn.Module) -> TrainingState:
    """Load the fp32 master weights and buffers into a plain module, for evaluation; raises as `load`.

    Memory and random state are not read.
    """
    reader = _Reader(path, CpuGroup())
    shapes = {name: tuple(param.shape) for name, param in module.named_parameters()}
    reader.check_fits(module, shapes, STATE_KEYS[:1], ep_size=1)
    for name, param in module.named_parameters():
        param.data.copy_(reader.parameter("weight", name, _experts(name, param.shape, Mesh())))
    reader.load_buffers(module)
    return reader.training_state(None, [])


class _Reader:
    """An opened checkpoint whose checksums agree; tensors are read one by one."""

    def __init__(self, path: Path, cpu_group: CpuGroup) -> None:
        self.path = path
        self.manifest = files.verify(path, cpu_group)
        self._keys = self.manifest["tensors"]
        self._open: dict[str, Any] = {}

    def get(self, key: str) -> Tensor:
        name = self._keys[key]["file"]
        if name not in self._open:
            self._open[name] = safe_open(self.path / name, "pt")
        value: Tensor = self._open[name].get_tensor(key)
        return value

    def parameter(self, kind: str, name: str, experts: range | None) -> Tensor:
        """Read a parameter's value; the experts asked for are put together."""
        parts = [self.get(key) for key in _keys(kind, name, experts)]
        return parts[0] if experts is None else torch.stack(parts)

    def load_buffers(self, module: nn.Module) -> None:
        for name, buffer in _buffers(module).items():
            buffer.copy_(self.get(f"buffer/{name}"))

    def check_fits(self, module: nn.Module, shapes: Shapes, kinds: tuple[str, ...], ep_size: int) -> None:
        """Compare names and shapes of the whole model, all its experts included, with the stored ones."""
        wanted = {f"buffer/{name}": list(b.shape) for name, b in _buffers(module).items()}
        for kind in kinds:
            for name, shape in shapes.items():
                experts = range(shape[0] * ep_size) if _is_expert(name) else None
                part = list(shape if experts is None else shape[1:])
                wanted.update((key, part) for key in _keys(kind, name, experts))
        prefixes = tuple(f"{kind}/" for kind in (*kinds, "buffer"))
        stored = {k: v["shape"] for k, v in self._keys.items() if k.startswith(prefixes)}
        for key in dict.fromkeys([*wanted, *stored]):
            if wanted.get(key) != stored.get(key):
                raise UserError(
                    f"{self.path} does not fit this model: {key} has shape "
                    f"{stored.get(key, 'none')} in the checkpoint, {wanted.get(key, 'none')} here"
                )

    def missing(self, streams: Sequence[int] | None) -> list[int]:
        """Return the streams whose memory is not here, though there is some."""
        saved = self._streams()
        return [stream for stream in streams or [] if stream not in saved] if saved else []

    def training_state(self, mesh: Mesh | None, streams: Sequence[int] | None) -> TrainingState:
        """Read the state that is not in the engine; the random state only if as many ranks in equal groups saved it."""
        tables: list[dict[str, Tensor]] = [{} for _ in range(self.manifest["tables"])]
        for key in self._keys:
            kind, *rest = key.split("/")
            if kind == "table":
                tables[int(rest[0])][rest[1]] = self.get(key)
        saved_by = self.manifest.get("ranks", 1), self.manifest.get("expert_ranks", 1)
        rng = device_rng = None
        if mesh is not None and saved_by == (mesh.world, mesh.ep_size):
            rng, device_key = self.get(_rng(mesh.rank)), _rng(mesh.rank, "cuda")
            device_rng = self.get(device_key) if device_key in self._keys else None
        memory = None
        saved = self._streams()
        wanted = sorted(saved) if streams is None else list(streams)
        if saved and wanted:
            memory = tuple(self._memory(layer, wanted) for layer in sorted(saved[wanted[0]]))
        return TrainingState(
            step=self.manifest["step"],
            cursor=self.manifest["cursor"],
            rng=rng,
            device_rng=device_rng,
            memory=memory,
            stream_B=None if memory is None else torch.tensor(wanted),
            tables=tables,
        )

    def _streams(self) -> dict[int, list[int]]:
        """List the layers whose memory is here, by stream."""
        found: dict[int, list[int]] = {}
        for key in self._keys:
            kind, *rest = key.split("/")
            if kind == "memory":
                found.setdefault(int(rest[1]), []).append(int(rest[0]))
        return found

    def _memory(self, layer: int, streams: list[int]) -> Tensor:
        return torch.stack([self.get(f"memory/{layer}/{stream:06d}") for stream in streams])


def _checked(cpu_group: CpuGroup | None, mesh: Mesh) -> CpuGroup:
    """Return the cpu_group, which must be for the engine's ranks: otherwise each would write its own checkpoint."""
    cpu_group = cpu_group or CpuGroup()
    if (cpu_group.rank, cpu_group.ranks) != (mesh.rank, mesh.world):
        raise ValueError(
            f"cpu_group is rank {cpu_group.rank} of {cpu_group.ranks}, the engine {mesh.rank} of {mesh.world}"
        )
    return cpu_group


def _check_disjoint(shards: dict[str, dict[str, Any]]) -> None:
    """Refuse a tensor that two ranks wrote, such as a stream that both claim; every rank sees the same."""
    seen: dict[str, str] = {}
    for name, shard in shards.items():
        for key in shard["tensors"]:
            if key in seen:
                raise RuntimeError(f"{key} is in {seen[key]} and in {name}")
            seen[key] = name


def _rng(rank: int, kind: str = "torch") -> str:
    return f"rng/{kind}/rank-{rank:05d}"


def _is_expert(name: str) -> bool:
    return ".experts." in name


def _experts(name: str, shape: Sequence[int], mesh: Mesh) -> range | None:
    """Return the global ids of the experts of this rank's parameter; None if it is not one of experts."""
    return mesh.local_experts(shape[0] * mesh.ep_size) if _is_expert(name) else None


def _keys(kind: str, name: str, experts: range | None) -> list[str]:
    """Return the keys that a parameter is stored under: one, or one for each expert."""
    key = f"{kind}/{name}"
    return [key] if experts is None else [f"{key}/{expert:05d}" for expert in experts]


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the persistent buffers."""
    persistent = module.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in module.named_buffers() if name in persistent}


def _tensors(engine: "Engine", state: TrainingState) -> dict[str, Tensor]:
    """Return the tensors that this rank writes, on the host, perhaps aliases of live ones; a collective."""
    result = dict(_own_state(engine))
    assert state.rng is not None
    result[_rng(engine.mesh.rank)] = state.rng
    if state.device_rng is not None:
        result[_rng(engine.mesh.rank, "cuda")] = state.device_rng
    if engine.mesh.rank == 0:
        for name, buffer in _buffers(engine.module).items():
            result[f"buffer/{name}"] = buffer
        for index, table in enumerate(state.tables):
            result.update((f"table/{index}/{name}", value) for name, value in table.items())
    if state.memory is not None:
        assert state.stream_B is not None
        for layer, memory_BMD in enumerate(state.memory):
            for stream, memory_MD in zip(state.stream_B.tolist(), memory_BMD, strict=True):
                result[f"memory/{layer}/{stream:06d}"] = memory_MD
    return {key: value.detach().cpu().contiguous() for key, value in result.items()}


def _own_state(engine: "Engine") -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters' state that this rank writes, each on the host before the next is read.

    A GPU has room for one, not for all.

    Of R ranks that hold the same experts, the r-th takes the experts r, r + R, ... of those; of all W ranks the w-th
    takes the other parameters w, w + W, ...
    """
    mesh = engine.mesh
    replicas, replica = mesh.world // mesh.ep_size, mesh.rank // mesh.ep_size
    for number, (name, values) in enumerate(engine.read_state()):
        experts = _experts(name, values["weight"].shape, mesh)
        for kind in STATE_KEYS:
            keys = _keys(kind, name, experts)
            if experts is not None:
                for row in range(replica, len(keys), replicas):
                    value = values[kind][row]  # a slice, which would keep the whole
                    yield keys[row], value.cpu() if value.is_cuda else value.clone()
            elif number % mesh.world == mesh.rank:
                yield keys[0], values[kind].cpu()


def _header(engine: "Engine", state: TrainingState, facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "format": files.FORMAT,
        "ranks": engine.mesh.world,
        "expert_ranks": engine.mesh.ep_size,
        "step": state.step,
        "adam_step": engine.adam_step(),
        "cursor": state.cursor,
        "tables": len(state.tables),
        **facts,
    }
