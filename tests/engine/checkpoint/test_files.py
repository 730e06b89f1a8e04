"""What a manifest names cannot lie outside its checkpoint's folder."""

import errno
import json
import os
import socket
import subprocess
import time

import pytest
import torch
from torch import nn

from foreroute.engine.checkpoint import files
from foreroute.engine.checkpoint import save_load as checkpoint
from foreroute.engine.errors import UserError
from foreroute.engine.parallel.cpu_group import CpuGroup
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.sealed_files import checksum

SHARD = files.shard_name(0)


class PlainEngine:
    mesh, module = Mesh(), nn.Linear(2, 2)

    def adam_step(self):
        return 8

    def read_state(self):
        for name, parameter in self.module.named_parameters():
            yield name, {kind: parameter.detach().clone() for kind in checkpoint.STATE_KEYS}


@pytest.fixture
def newest(tmp_path):
    """The newer of two whole checkpoints."""
    for step in (4, 8):
        state = checkpoint.TrainingState(step=step, cursor=step, rng=torch.get_rng_state())
        path = checkpoint.save(tmp_path / "checkpoints", PlainEngine(), state, facts={}, keep=2)
    checkpoint.load_weights(path, nn.Linear(2, 2))  # negative control: as it is it can be loaded
    return path


def rewrite(path, change):
    """Change a manifest; its checksum is right again."""
    manifest = json.loads((path / files.MANIFEST).read_text())
    del manifest["checksum"]
    change(manifest)
    manifest["checksum"] = checksum(manifest)
    (path / files.MANIFEST).write_text(json.dumps(manifest))


def refused(path, why):
    with pytest.raises(UserError, match=why):
        checkpoint.load_weights(path, nn.Linear(2, 2))
    found, (warning,) = checkpoint.find_newest(path.parent)
    assert found == path.parent / "step-00000004" and "\n" not in warning


@pytest.mark.parametrize("where", ["..", "/", "../other", ".", "deeper"])
@pytest.mark.parametrize("tensors_only", [False, True])
def test_a_manifest_cannot_name_a_file_elsewhere(newest, where, tensors_only):
    """The file is there and all checksums are right."""
    name = f"{newest.parent if where == '/' else where}/{SHARD}"
    (newest / name).parent.mkdir(exist_ok=True)
    (newest / name).write_bytes((newest / SHARD).read_bytes())

    def change(manifest):
        if not tensors_only:
            manifest["files"] = {name: manifest["files"][SHARD]}
        for entry in manifest["tensors"].values():
            entry["file"] = name

    rewrite(newest, change)
    refused(newest, "manifest.json: names .* which is none of its shards")


@pytest.mark.parametrize("name", [files.MANIFEST, SHARD])
def test_a_link_out_of_a_checkpoint_is_not_followed(newest, name):
    outside = newest.parent / name
    (newest / name).rename(outside)
    (newest / name).symlink_to(outside)
    refused(newest, f"{name}: is a link")


def test_leftovers_of_the_dead_are_removed_and_nothing_else(tmp_path):
    host, day = socket.gethostname(), 24 * 3600
    dead = subprocess.Popen(["true"])
    dead.wait()
    own = files.temporary_name(7)
    assert own == f".writing-7-{os.getpid()}@{host}"
    for name, age_s in {
        own: 0,
        f".writing-12-{dead.pid}@{host}": 0,
        f".writing-1-{os.getppid()}@{host}": 2 * day,
        ".writing-1-5@elsewhere": day - 60,
        ".writing-2-5@elsewhere": day + 60,
        ".writing-x": 2 * day,
        "step-00000001": 2 * day,
    }.items():
        (tmp_path / name / "new").mkdir(parents=True)
        written = time.time() - age_s
        os.utime(tmp_path / name, (written, written))
    (tmp_path / f".writing-3-{dead.pid}@{host}").touch()  # no folder, and so none of ours
    files.remove_leftovers(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {
        f".writing-1-{os.getppid()}@{host}",
        f".writing-3-{dead.pid}@{host}",
        ".writing-1-5@elsewhere",
        ".writing-x",
        "step-00000001",
    }


def test_checkpoints_are_found_by_name_the_newest_first(tmp_path):
    for name in ("step-00000009", "step-00000100", "step-123456789", "step-7", "step-00000200.old", "other"):
        (tmp_path / name).mkdir()
    found = files.checkpoints(tmp_path)
    assert [files.step_of(path) for path in found] == [123456789, 100, 9]
    assert files.shard_name(3) == "shard-00003.safetensors"


def test_a_rank_alone_acts_or_is_told(tmp_path):
    assert files.on_ranks(CpuGroup(), lambda: 5) == [5] == files.on_ranks(CpuGroup(), lambda: 5, only=0)
    assert files.on_ranks(CpuGroup(), lambda: 5, only=1) == [None]
    with pytest.raises(OSError, match=r"^no space$"):
        files.on_ranks(CpuGroup(), raise_no_space)


def raise_no_space():
    raise OSError("no space")


def folder_of(path, text):
    path.mkdir(parents=True)
    (path / "text").write_text(text)
    return path


def test_publishing_replaces_what_was_there(tmp_path):
    target = folder_of(tmp_path / "step-00000001", "old")
    files.publish(folder_of(tmp_path / "aside/new", "new"), target)
    assert (target / "text").read_text() == "new"
    assert (tmp_path / "aside/replaced/text").read_text() == "old"
    other = tmp_path / "step-00000002"
    files.publish(folder_of(tmp_path / "aside/new", "first"), other)
    assert (other / "text").read_text() == "first"


@pytest.mark.parametrize("there", [True, False])
def test_what_cannot_be_published_leaves_what_was_there(tmp_path, there):
    target = tmp_path / "step-00000001"
    if there:
        folder_of(target, "old")
    (tmp_path / "aside").mkdir()
    with pytest.raises(FileNotFoundError):
        files.publish(tmp_path / "aside/new", target)
    assert target.exists() == there and (not there or (target / "text").read_text() == "old")


def test_what_is_published_stays_when_it_may_not_be_on_the_disk(tmp_path, monkeypatch):
    target = folder_of(tmp_path / "step-00000001", "old")
    monkeypatch.setattr(files, "sync", lambda path: raise_no_space())
    with pytest.raises(OSError, match="no space"):
        files.publish(folder_of(tmp_path / "aside/new", "new"), target)
    assert (target / "text").read_text() == "new"


def test_a_folder_that_cannot_be_made_is_said_to_be_the_reason(tmp_path):
    """Not that there is nothing to clean up."""
    (tmp_path / "checkpoints").touch()
    state = checkpoint.TrainingState(step=4, cursor=4, rng=torch.get_rng_state())
    with pytest.raises(OSError, match=r"checkpoint .*step-00000004 could not be written: .*exists"):
        checkpoint.save(tmp_path / "checkpoints", PlainEngine(), state, facts={}, keep=2)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_only_a_folder_may_refuse_to_be_synced(tmp_path, monkeypatch, number):
    """Network file systems do; a disk's error is one."""

    def refuse(_descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(OSError):
        files.sync(tmp_path / "file")
    if number == errno.EIO:
        with pytest.raises(OSError):
            files.sync(tmp_path)
    else:
        files.sync(tmp_path)
