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
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from foreroute.engine.errors import UserError, require
from foreroute.engine.parallel.cpu_group import CpuGroup
from foreroute.engine.sealed_files import read_sealed, refuse_link, sealed, sha256_of, sync

FORMAT = 1
MANIFEST = "manifest.json"
_STEP_FOLDER = re.compile(r"step-(\d{8,})")
_SHARD = re.compile(r"shard-\d{5,}\.safetensors")
_TEMPORARY = re.compile(r"\.writing-\d+-(?P<pid>\d+)@(?P<host>.+)")
_ABANDONED_S = 24 * 3600  # a temporary folder of another host is left alone for a day


def shard_name(rank: int) -> str:
    """Return the name of the file that a rank writes."""
    return f"shard-{rank:05d}.safetensors"


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
    save_file(tensors, file)
    sync(file)
    return {
        "bytes": file.stat().st_size,
        "sha256": sha256_of(file),
        "tensors": {
            key: {"file": file.name, "dtype": str(value.dtype), "shape": list(value.shape)}
            for key, value in tensors.items()
        },
    }


def write_manifest(folder: Path, header: dict[str, Any], shards: dict[str, dict[str, Any]]) -> None:
    """Write the manifest beside the shards that it describes (as write_shard returned them) and wait until it is on the
    disk."""
    files, tensors = {}, {}
    for name, shard in shards.items():
        tensors.update(shard["tensors"])
        files[name] = {key: shard[key] for key in ("bytes", "sha256")}
    manifest = {**header, "files": files, "tensors": tensors}
    (folder / MANIFEST).write_text(json.dumps(sealed(manifest), indent=1))
    sync(folder / MANIFEST)
    sync(folder)


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


def read_manifest(path: Path) -> dict[str, Any]:
    """Read and check a checkpoint's manifest, without touching the shards.

    Raises:
        UserError: it is missing, damaged, of another format version or names files that are no shards beside it.
    """
    file = path / MANIFEST
    return _checked_names(file, read_sealed(file, "manifest", FORMAT))


def _checked_names(file: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest; refuse one that names files that are no shards beside it."""
    held = [entry["file"] for entry in manifest["tensors"].values()]
    for name in dict.fromkeys([*manifest["files"], *held]):
        require(
            _SHARD.fullmatch(name) is not None and name in manifest["files"],
            f"{file}: names {name!r}, which is none of its shards",
        )
    return manifest


def verify(path: Path, cpu_group: CpuGroup) -> dict[str, Any]:
    """Read the manifest and compare it with every shard; the ranks share the work and all come to the same end.

    Raises:
        UserError: on every rank, as read_manifest, also if a shard differs.
    """
    manifest: dict[str, Any] = {}
    fault = None
    try:
        manifest = read_manifest(path)
        for name in sorted(manifest["files"])[cpu_group.rank :: cpu_group.ranks]:
            _verify_shard(path / name, manifest)
    except UserError as error:
        fault = str(error)
    for found in cpu_group.gather(fault):
        require(found is None, found)
    return manifest


def _verify_shard(file: Path, manifest: dict[str, Any]) -> None:
    entry = manifest["files"][file.name]
    refuse_link(file)
    try:
        size = file.stat().st_size
        require(size == entry["bytes"], f"{file}: {size} bytes instead of {entry['bytes']}")
        require(sha256_of(file) == entry["sha256"], f"{file}: sha256 differs from the manifest's")
        with safe_open(file, "pt") as shard:
            found = {key: shard.get_slice(key).get_shape() for key in shard.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"{file}: missing") from None
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
