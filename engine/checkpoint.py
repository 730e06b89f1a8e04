"""Checkpoints that hold the model, not the cluster: a folder step-00001234/ of safetensors shards and one manifest.

Keys, where an expert parameter (its name contains ".experts.", dim 0 = expert) is cut into one tensor per global expert id:

    weight/<parameter>[/<expert:05d>]    fp32 master; exp_avg/... and exp_avg_sq/... likewise
    buffer/<name>    memory/<layer>/<global stream id:06d>    table/<i>/<field>    rng/torch/rank-00000

The manifest (JSON, with a checksum of itself) has everything that is no tensor, and size and sha256 of each shard. A
checkpoint is written beside the others, made durable and renamed, so it is whole or absent. Nothing is pickled. One rank
writes and holds all experts, so local and global expert ids agree. Inverse of `save`: `load`, or `load_weights`.
"""

import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.config import require
from engine.errors import UserError

if TYPE_CHECKING:  # evaluation loads weights without DeepSpeed
    from engine.deepspeed_adapter import Engine

FORMAT = 1
SHARD = "shard-00000.safetensors"
MANIFEST = "manifest.json"
RNG = "rng/torch/rank-00000"
STATE_KEYS = ("weight", "exp_avg", "exp_avg_sq")
_STEP_FOLDER = re.compile(r"step-(\d{8,})")
_TEMPORARY = re.compile(r"\.writing-\d+-(?P<pid>\d+)@(?P<host>.+)")
_ABANDONED_S = 24 * 3600  # a temporary folder of another host is left alone for a day


@dataclass
class TrainingState:
    """What a run needs to go on, beside what the engine holds."""

    step: int  # optimizer steps done; the k schedule and the learning rate follow it
    cursor: int  # index of the next segment in the data stream
    rng: Tensor  # uint8: torch.get_rng_state()
    memory: tuple[Tensor, ...] | None = None  # one [streams, m, D] tensor per layer
    stream_B: Tensor | None = None  # int64: global stream id of each row of memory
    tables: list[dict[str, Tensor]] = field(default_factory=list)


def save(
    folder: Path, engine: "Engine", state: TrainingState, *, facts: dict[str, Any], keep: int
) -> Path:
    """Write folder/step-<step> and then remove all but the newest `keep` checkpoints up to this step.

    `facts` are JSON values that the manifest keeps beside its own, such as the run's configuration.
    A checkpoint of the same step is replaced; those of later steps (damaged, or this run would start there) are left.

    Raises:
        OSError: it could not be written; older checkpoints are untouched and nothing half-written is left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    target = folder / f"step-{state.step:08d}"
    temporary = folder / f".writing-{state.step}-{os.getpid()}@{socket.gethostname()}"
    try:
        new = temporary / "new"
        new.mkdir(parents=True)
        _write(new, _tensors(engine, state), _header(engine, state, facts))
        if target.exists():
            target.rename(temporary / "replaced")
        new.rename(target)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        if (temporary / "replaced").exists() and not target.exists():
            (temporary / "replaced").rename(target)
        raise OSError(f"checkpoint {target} could not be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    older = [path for path in _checkpoints(folder) if _step(path) <= state.step]
    for path in older[keep:]:
        shutil.rmtree(path)
    return target


def find_newest(folder: Path) -> tuple[Path | None, list[str]]:
    """Give the newest whole checkpoint (None: there is none) and a warning line for each newer one that is not."""
    warnings = []
    for path in _checkpoints(folder):
        try:
            _verify(path)
        except UserError as error:
            warnings.append(f"skipped a damaged checkpoint: {error}")
        else:
            return path, warnings
    return None, warnings


def read_manifest(path: Path) -> dict[str, Any]:
    """Read and check a checkpoint's manifest, without touching the shards.

    Raises:
        UserError: it is missing, damaged or of another format version; names the file and says why.
    """
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
        stored = manifest.pop("checksum")
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{file}: not a manifest ({type(error).__name__}: {error})") from None
    require(stored == _checksum(manifest), f"{file}: its checksum does not match its content")
    require(
        manifest["format"] == FORMAT,
        f"{file}: format version {manifest['format']}, this program reads {FORMAT}",
    )
    return manifest


def load(path: Path, engine: "Engine") -> TrainingState:
    """Restore weights, masters, moments, Adam step and buffers bit for bit, and give back the rest.

    Raises:
        UserError: the checkpoint is damaged, or does not fit the model (names the first difference).
    """
    reader = _Reader(path)
    reader.check_fits(engine.module, STATE_KEYS)
    for name, param in engine.module.named_parameters():
        engine.write_state(name, {kind: reader.parameter(kind, name, param) for kind in STATE_KEYS})
    engine.set_adam_step(reader.manifest["adam_step"])
    reader.load_buffers(engine.module)
    return reader.training_state()


def load_weights(path: Path, module: nn.Module) -> TrainingState:
    """Load the fp32 master weights and buffers into a plain module, for evaluation; raises as `load`."""
    reader = _Reader(path)
    reader.check_fits(module, STATE_KEYS[:1])
    for name, param in module.named_parameters():
        param.data.copy_(reader.parameter("weight", name, param))
    reader.load_buffers(module)
    return reader.training_state()


class _Reader:
    """An opened checkpoint whose checksums agree; tensors are read one by one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = _verify(path)
        self._keys = self.manifest["tensors"]
        self._files = {name: safe_open(path / name, "pt") for name in self.manifest["files"]}

    def get(self, key: str) -> Tensor:
        return self._files[self._keys[key]["file"]].get_tensor(key)

    def parameter(self, kind: str, name: str, param: Tensor) -> Tensor:
        """A parameter's value; its experts are put together again."""
        parts = [self.get(key) for key, _ in _parts(kind, name, param)]
        return torch.stack(parts) if _is_expert(name) else parts[0]

    def load_buffers(self, module: nn.Module) -> None:
        for name, buffer in _buffers(module).items():
            buffer.copy_(self.get(f"buffer/{name}"))

    def check_fits(self, module: nn.Module, kinds: tuple[str, ...]) -> None:
        """Compare names and shapes of a module's tensors with the stored ones."""
        wanted = {f"buffer/{name}": list(b.shape) for name, b in _buffers(module).items()}
        for kind in kinds:
            for name, param in module.named_parameters():
                wanted.update((key, list(part.shape)) for key, part in _parts(kind, name, param))
        prefixes = tuple(f"{kind}/" for kind in (*kinds, "buffer"))
        stored = {k: v["shape"] for k, v in self._keys.items() if k.startswith(prefixes)}
        for key in dict.fromkeys([*wanted, *stored]):
            if wanted.get(key) != stored.get(key):
                raise UserError(
                    f"{self.path} does not fit this model: {key} has shape "
                    f"{stored.get(key, 'none')} in the checkpoint, {wanted.get(key, 'none')} here"
                )

    def training_state(self) -> TrainingState:
        tables: list[dict[str, Tensor]] = [{} for _ in range(self.manifest["tables"])]
        memory: dict[int, dict[int, Tensor]] = {}
        for key in self._keys:
            kind, *rest = key.split("/")
            if kind == "table":
                tables[int(rest[0])][rest[1]] = self.get(key)
            elif kind == "memory":
                memory.setdefault(int(rest[0]), {})[int(rest[1])] = self.get(key)
        streams = sorted(memory[0]) if memory else []
        return TrainingState(
            step=self.manifest["step"],
            cursor=self.manifest["cursor"],
            rng=self.get(RNG),
            memory=tuple(
                torch.stack([memory[layer][s] for s in streams]) for layer in sorted(memory)
            )
            or None,
            stream_B=torch.tensor(streams) if streams else None,
            tables=tables,
        )


def _is_expert(name: str) -> bool:
    return ".experts." in name


def _parts(kind: str, name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Cut a parameter-shaped value into what is stored under one key each."""
    if not _is_expert(name):
        yield f"{kind}/{name}", value
        return
    for expert, part in enumerate(value):
        yield f"{kind}/{name}/{expert:05d}", part


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    """The persistent buffers."""
    persistent = module.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in module.named_buffers() if name in persistent}


def _tensors(engine: "Engine", state: TrainingState) -> dict[str, Tensor]:
    """Everything that goes into the shard; values may alias live tensors."""
    result = {RNG: state.rng}
    for name, values in engine.read_state():
        for kind in STATE_KEYS:
            result.update(_parts(kind, name, values[kind]))
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


def _header(engine: "Engine", state: TrainingState, facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "step": state.step,
        "adam_step": engine.adam_step(),
        "schedule_step": state.step,
        "cursor": state.cursor,
        "tables": len(state.tables),
        **facts,
    }


def _write(folder: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Write the shard, then the manifest that describes it, and wait until both are on the disk."""
    shard = folder / SHARD
    save_file(tensors, shard)
    files = {SHARD: {"bytes": shard.stat().st_size, "sha256": _sha256(shard)}}
    keys = {
        key: {"file": SHARD, "dtype": str(value.dtype), "shape": list(value.shape)}
        for key, value in tensors.items()
    }
    manifest = {**header, "files": files, "tensors": keys}
    manifest["checksum"] = _checksum(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in (shard, folder / MANIFEST, folder):
        _sync(path)


def _verify(path: Path) -> dict[str, Any]:
    """Read the manifest and compare size and checksum of every shard; raises as read_manifest."""
    manifest = read_manifest(path)
    for name, entry in manifest["files"].items():
        file = path / name
        require(file.is_file(), f"{file}: missing")
        size = file.stat().st_size
        require(size == entry["bytes"], f"{file}: {size} bytes instead of {entry['bytes']}")
        require(_sha256(file) == entry["sha256"], f"{file}: sha256 differs from the manifest's")
    return manifest


def _checkpoints(folder: Path) -> list[Path]:
    """All checkpoints by name, the newest first."""
    found = [path for path in folder.glob("step-*") if _STEP_FOLDER.fullmatch(path.name)]
    return sorted(found, key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _remove_leftovers(folder: Path) -> None:
    """Remove temporary folders whose writer is dead; this process is writing nothing yet."""
    for path in folder.glob(".writing-*"):
        match = _TEMPORARY.fullmatch(path.name)
        if match is None:
            continue
        if match["host"] == socket.gethostname():
            pid = int(match["pid"])
            dead = pid == os.getpid() or not psutil.pid_exists(pid)
        else:
            dead = time.time() - path.stat().st_mtime > _ABANDONED_S
        if dead:
            shutil.rmtree(path, ignore_errors=True)


def _checksum(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
