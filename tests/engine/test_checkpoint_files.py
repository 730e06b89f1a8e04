"""What a manifest names cannot lie outside its checkpoint's folder."""

import errno
import json
import os

import pytest
import torch
from torch import nn

from engine import checkpoint
from engine import checkpoint_files as files
from engine.errors import UserError
from engine.parallel.mesh import Mesh

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
    manifest["checksum"] = files.checksum(manifest)
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
