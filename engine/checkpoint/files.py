"""The files of checkpoints: folders step-00001234/ of safetensors shards and one manifest; names, checksums, renames.

engine/checkpoint/save_load.py decides what is in them. The manifest is JSON with a checksum of itself and
the size and sha256 of each shard. A checkpoint is written in a temporary folder beside the others, made durable and
renamed, so it is whole or absent. With many ranks each has one shard; ranks talk through a CpuGroup and all come to the
same verdict.
"""

import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError, safe_open
from torch import Tensor

from foreroute.engine.checkpoint.tensor_file import save_tensors
from foreroute.engine.errors import UserError, require
from foreroute.engine.parallel.cpu_group import CpuGroup
from foreroute.engine.sealed_files import read_sealed, refuse_link, sealed, sha256_of, sync

FORMAT = 1
MANIFEST = "manifest.json"
_STEP_FOLDER = re.compile(r"step-(\d{8,})")
_TEMPORARY = re.compile(r"\.writing-\d+-(?P<pid>\d+)@(?P<host>.+)")
BESIDE = "beside"
"""Of a manifest: further files in the folder that are no shards, each with its size and sha256."""
_ABANDONED_S = 24 * 3600  # a temporary folder of another host is left alone for a day


@dataclass(frozen=True, slots=True)
class Names:
    """The names of a checkpoint's files."""

    manifest: str = MANIFEST
    shard: str = "shard"  # before a rank's number

    def of_rank(self, rank: int) -> str:
        """Return the name of the file that a rank writes."""
        return f"{self.shard}-{rank:05d}.safetensors"

    def is_shard(self, name: str) -> bool:
        """Return whether a name is that of a rank's file."""
        return re.fullmatch(rf"{self.shard}-\d{{5,}}\.safetensors", name) is not None


OF_A_RUN = Names()


def shard_name(rank: int) -> str:
    """Return the name of the file that a rank of a run writes."""
    return OF_A_RUN.of_rank(rank)


def temporary_name(step: int) -> str:
    """Return the name of a folder that this process will write in, with the writer's name."""
    return f".writing-{step}-{os.getpid()}@{socket.gethostname()}"


def checkpoints(folder: Path) -> list[Path]:
    """List all checkpoints, the newest first."""
    found = [path for path in folder.glob("step-*") if _STEP_FOLDER.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """Return the step of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


def on_ranks(cpu_group: CpuGroup, act: Callable[[], Any], *, only: int | None = None) -> list[Any]:
    """Call act on every rank, or on one only, and return every rank's result (JSON).

    Raises:
        OSError: on every rank, if files could not be read or written on any.
    """
    result, error = None, None
    if only is None or only == cpu_group.rank:
        try:
            result = act()
        except (OSError, SafetensorError) as caught:
            error = f"rank {cpu_group.rank}: {caught}" if cpu_group.ranks > 1 else str(caught)
    outcomes = cpu_group.gather([result, error])
    for _, error in outcomes:
        if error is not None:
            raise OSError(error)
    return [result for result, _ in outcomes]


def write_shard(file: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write a shard and wait until it is on the disk; return its size and sha256, and type and shape of each tensor."""
    save_tensors(tensors, file)
    sync(file)
    return {
        "bytes": file.stat().st_size,
        "sha256": sha256_of(file),
        "tensors": {
            key: {"file": file.name, "dtype": str(value.dtype), "shape": list(value.shape)}
            for key, value in tensors.items()
        },
    }


def write_manifest(
    folder: Path, header: dict[str, Any], shards: dict[str, dict[str, Any]], name: str = MANIFEST
) -> None:
    """Write the manifest beside the shards that it describes (as write_shard returned them) and wait until it is on the
    disk."""
    files, tensors = {}, {}
    for shard_file, shard in shards.items():
        tensors.update(shard["tensors"])
        files[shard_file] = {key: shard[key] for key in ("bytes", "sha256")}
    manifest = {**header, "files": files, "tensors": tensors}
    (folder / name).write_text(json.dumps(sealed(manifest), indent=1))
    sync(folder / name)
    sync(folder)


def describe(file: Path) -> dict[str, Any]:
    """Return the size and sha256 of a file, as a manifest has them."""
    return {"bytes": file.stat().st_size, "sha256": sha256_of(file)}


def write_whole(
    target: Path,
    cpu_group: CpuGroup,
    tensors: Callable[[], dict[str, Tensor]],
    header: Callable[[Path], dict[str, Any]],
    *,
    temporary: str,
    names: Names = OF_A_RUN,
) -> None:
    """Write a checkpoint of a shard from each rank, whole or not at all; one that is there is replaced.

    Every rank of the run takes part; all see the same folder.

    Args:
        tensors: returns those that this rank writes; may be a collective.
        header: on rank 0, writes further files into the folder, which it is given, and returns the manifest's content.
        temporary: name of the folder beside the target in which the checkpoint is written; rank 0's is taken.

    Raises:
        OSError: on every rank: it could not be written, and nothing half-written is left.
    """
    writing = target.parent / cpu_group.broadcast(temporary)
    new = writing / "new"

    def begin() -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target.parent)
        new.mkdir(parents=True)

    def write() -> dict[str, Any]:
        return write_shard(new / names.of_rank(cpu_group.rank), tensors())

    def finish() -> None:
        write_manifest(new, header(new), shards, names.manifest)
        publish(new, target)

    try:
        on_ranks(cpu_group, begin, only=0)
        described = on_ranks(cpu_group, write)
        shards = {names.of_rank(rank): shard for rank, shard in enumerate(described)}
        _check_disjoint(shards)
        on_ranks(cpu_group, finish, only=0)
    except OSError as error:
        raise OSError(f"checkpoint {target} could not be written: {error}") from error
    finally:
        if cpu_group.rank == 0:
            shutil.rmtree(writing, ignore_errors=True)


def _check_disjoint(shards: dict[str, dict[str, Any]]) -> None:
    """Refuse a tensor that two ranks wrote, such as a stream that both claim; every rank sees the same."""
    seen: dict[str, str] = {}
    for name, shard in shards.items():
        for key in shard["tensors"]:
            if key in seen:
                raise RuntimeError(f"{key} is in {seen[key]} and in {name}")
            seen[key] = name


def publish(new: Path, target: Path) -> None:
    """Rename a written checkpoint to its place; one that is there goes into the folder that `new` lies in."""
    replaced = new.parent / "replaced"
    if target.exists():
        target.rename(replaced)
    try:
        new.rename(target)
        sync(target.parent)
    except OSError:
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        raise


def read_manifest(path: Path, names: Names = OF_A_RUN) -> dict[str, Any]:
    """Read and check a checkpoint's manifest, without touching the shards.

    Raises:
        UserError: it is missing, damaged, of another format version or names files that are no shards beside it.
    """
    file = path / names.manifest
    manifest = read_sealed(file, "manifest", FORMAT)
    held = [entry["file"] for entry in manifest["tensors"].values()]
    for name in dict.fromkeys([*manifest["files"], *held]):
        require(
            names.is_shard(name) and name in manifest["files"], f"{file}: names {name!r}, which is none of its shards"
        )
    for name in manifest.get(BESIDE, {}):
        require(Path(name).name == name, f"{file}: names {name!r}, which is no file beside it")
    return manifest


def verify(path: Path, cpu_group: CpuGroup, names: Names = OF_A_RUN) -> dict[str, Any]:
    """Read the manifest and compare it with every file; the ranks share the work and all come to the same end.

    Raises:
        UserError: on every rank, as read_manifest, also if a shard differs.
    """
    manifest: dict[str, Any] = {}
    fault = None
    try:
        manifest = read_manifest(path, names)
        beside = manifest.get(BESIDE, {})
        for name in sorted([*manifest["files"], *beside])[cpu_group.rank :: cpu_group.ranks]:
            _verify(path / name, manifest["files"].get(name) or beside[name])
            if name in manifest["files"]:
                _verify_tensors(path / name, manifest)
    except UserError as error:
        fault = str(error)
    for found in cpu_group.gather(fault):
        require(found is None, found)
    return manifest


def _verify(file: Path, entry: dict[str, Any]) -> None:
    """Compare a file with its size and sha256 in the manifest."""
    refuse_link(file)
    try:
        size = file.stat().st_size
        require(size == entry["bytes"], f"{file}: {size} bytes instead of {entry['bytes']}")
        require(sha256_of(file) == entry["sha256"], f"{file}: sha256 differs from the manifest's")
    except FileNotFoundError:
        raise UserError(f"{file}: missing") from None
    except OSError as error:
        raise UserError(f"{file}: {error}") from None


def _verify_tensors(file: Path, manifest: dict[str, Any]) -> None:
    """Compare the names and shapes in a shard with the manifest's."""
    try:
        with safe_open(file, "pt") as shard:
            found = {key: shard.get_slice(key).get_shape() for key in shard.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: {error}") from None
    listed = {k: v["shape"] for k, v in manifest["tensors"].items() if v["file"] == file.name}
    require(found == listed, f"{file}: holds other tensors than the manifest says")


def remove_leftovers(folder: Path) -> None:
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
