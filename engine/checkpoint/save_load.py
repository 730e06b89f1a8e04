"""Checkpoints that hold the model, not the cluster: saved by any number of ranks, loaded by any other.

Keys beside those of parameters and buffers (engine/checkpoint/parameters.py):

    memory/<layer>/<global stream id:06d>    table/<i>/<field>    rng/torch/rank-<rank:05d>    rng/cuda/rank-<rank:05d>
    int8/<parameter>/<expert:05d>    scale/<parameter>/<expert:05d>    instead of its weight, for evaluation alone

and those of the rows of n-gram tables (engine/checkpoint/rows.py).
Each rank writes one shard: the experts that it holds, shared with the ranks that hold the same ones, its share of all
other parameters, and its own memory and random state. Nothing is gathered on one rank but the manifest, which has all
that is no tensor (engine/checkpoint/files.py). Nothing is pickled. Inverse of `save`: `load`, or `load_weights`.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from foreroute.engine.checkpoint import files
from foreroute.engine.checkpoint.files import read_manifest
from foreroute.engine.checkpoint.parameters import Reader, Shapes, buffers, local_experts, own_state
from foreroute.engine.checkpoint.rows import describe_tables, load_table_values, load_tables, own_rows, row_stores
from foreroute.engine.errors import UserError, require
from foreroute.engine.moe.int8_weights import hold_int8
from foreroute.engine.parallel.cpu_group import CpuGroup
from foreroute.engine.parallel.mesh import Mesh

if TYPE_CHECKING:  # evaluation loads weights without DeepSpeed
    from foreroute.engine.optim.deepspeed_engine import Engine

__all__ = ["TrainingState", "find_newest", "load", "load_weights", "read_manifest", "save"]
STATE_KEYS = ("weight", "exp_avg", "exp_avg_sq")
INT8, SCALE = "int8", "scale"


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

    def remove_older() -> None:
        older = [path for path in files.checkpoints(folder) if files.step_of(path) <= state.step]
        for path in older[keep:]:
            shutil.rmtree(path)

    files.write_whole(
        target,
        cpu_group,
        lambda: _tensors(engine, state),
        lambda _: _header(engine, state, facts),
        temporary=files.temporary_name(state.step),
    )
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
    require(
        not reader.in_int8(shapes), f"{path}: has int8 weights, for evaluation alone; resume the run it was made of"
    )
    reader.check_fits(engine.module, shapes, STATE_KEYS, engine.mesh.ep_size)
    missing = [stream for rank in cpu_group.gather(reader.missing(streams)) for stream in rank]
    require(not missing, f"{path}: holds no memory of streams {missing}")
    for name, shape in shapes.items():
        experts = local_experts(name, shape, engine.mesh)
        engine.write_state(name, {kind: reader.parameter(kind, name, experts) for kind in STATE_KEYS})
    engine.set_adam_step(reader.manifest["adam_step"])
    reader.load_buffers(engine.module)
    load_tables(reader, engine.module)
    return reader.training_state(engine.mesh, streams)


def load_weights(path: Path, module: nn.Module) -> TrainingState:
    """Load the fp32 master weights and buffers into a plain module, for evaluation; raises as `load`.

    Matrices that were saved as int8 are held so (engine/moe/int8_weights.py). Memory and random state are not read.
    """
    reader = _Reader(path, CpuGroup())
    shapes = {name: tuple(param.shape) for name, param in module.named_parameters()}
    in_int8 = reader.in_int8(shapes)
    reader.check_fits(module, {n: shape for n, shape in shapes.items() if n not in in_int8}, STATE_KEYS[:1], ep_size=1)
    reader.check_fits(module, in_int8, [INT8], ep_size=1)
    reader.load_buffers(module)
    for name, shape in shapes.items():
        experts = local_experts(name, shape, Mesh())
        if name in in_int8:
            of, _, matrix = name.rpartition(".")
            value, scale = (reader.parameter(kind, name, experts) for kind in (INT8, SCALE))
            hold_int8(module.get_submodule(of), matrix, value, scale)
        else:
            module.get_parameter(name).data.copy_(reader.parameter("weight", name, experts))
    load_table_values(reader, module)
    return reader.training_state(None, [])


class _Reader(Reader):
    """A checkpoint of a run."""

    def missing(self, streams: Sequence[int] | None) -> list[int]:
        """Return the streams whose memory is not here, though there is some."""
        saved = self._streams()
        return [stream for stream in streams or [] if stream not in saved] if saved else []

    def in_int8(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """Return those parameters of experts whose first expert is here as int8, with their shapes."""
        return {name: shape for name, shape in shapes.items() if self.holds(INT8, name, range(1))}

    def training_state(self, mesh: Mesh | None, streams: Sequence[int] | None) -> TrainingState:
        """Read the state that is not in the engine; the random state only if as many ranks in equal groups saved it."""
        tables: list[dict[str, Tensor]] = [{} for _ in range(self.manifest["tables"])]
        for key in self.keys:
            kind, *rest = key.split("/")
            if kind == "table":
                tables[int(rest[0])][rest[1]] = self.get(key)
        saved_by = self.manifest.get("ranks", 1), self.manifest.get("expert_ranks", 1)
        rng = device_rng = None
        if mesh is not None and saved_by == (mesh.world, mesh.ep_size):
            rng, device_key = self.get(_rng(mesh.rank)), _rng(mesh.rank, "cuda")
            device_rng = self.get(device_key) if device_key in self.keys else None
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
        for key in self.keys:
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


def _rng(rank: int, kind: str = "torch") -> str:
    return f"rng/{kind}/rank-{rank:05d}"


def _tensors(engine: "Engine", state: TrainingState) -> dict[str, Tensor]:
    """Return the tensors that this rank writes, perhaps aliases of live ones; a collective. All but rows are on the
    host."""
    result = dict(own_state(engine.read_state(), engine.mesh))
    assert state.rng is not None
    result[_rng(engine.mesh.rank)] = state.rng
    if state.device_rng is not None:
        result[_rng(engine.mesh.rank, "cuda")] = state.device_rng
    if engine.mesh.rank == 0:
        for name, buffer in buffers(engine.module).items():
            result[f"buffer/{name}"] = buffer
        for index, table in enumerate(state.tables):
            result.update((f"table/{index}/{name}", value) for name, value in table.items())
    if state.memory is not None:
        assert state.stream_B is not None
        for layer, memory_BMD in enumerate(state.memory):
            for stream, memory_MD in zip(state.stream_B.tolist(), memory_BMD, strict=True):
                result[f"memory/{layer}/{stream:06d}"] = memory_MD
    on_host = {key: value.detach().cpu().contiguous() for key, value in result.items()}
    return {**on_host, **dict(own_rows(row_stores(engine.module)))}


def _header(engine: "Engine", state: TrainingState, facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "format": files.FORMAT,
        "ranks": engine.mesh.world,
        "expert_ranks": engine.mesh.ep_size,
        "step": state.step,
        "adam_step": engine.adam_step(),
        "cursor": state.cursor,
        "tables": len(state.tables),
        **describe_tables(engine.module),
        **facts,
    }
