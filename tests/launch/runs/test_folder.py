"""A run's folder: that all machines see it, that it can be locked, and that it may move."""

import errno
import fcntl
import json
import shutil
from dataclasses import replace
from typing import Any

import pytest

from foreroute.engine.config import Config
from foreroute.engine.errors import UserError
from foreroute.engine.parallel.cpu_group import CpuGroup
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.parallel.world import World
from foreroute.launch.runs.folder import lock_folder, open_run
from foreroute.launch.start.options import command_option
from foreroute.launch.testing.runs import small_run


class SecondOfTwo(CpuGroup):
    """Rank 1 beside a rank 0 that says what it is told to."""

    rank, ranks = 1, 2

    def __init__(self, *says: Any) -> None:
        self.says = list(says)

    def gather(self, value: Any) -> list[Any]:
        return [self.says.pop(0), value]


def test_a_machine_that_does_not_see_the_folder_is_named(tmp_path):
    """Before any training: otherwise the first checkpoint would fail, which may be the last step's."""
    config = Config()
    config = replace(config, train=replace(config.train, runs_dir=str(tmp_path), name="x"))

    def second() -> World:
        return World(Mesh(1, 2, 1), cpu_group=SecondOfTwo(None, None, None, None))

    with pytest.raises(UserError, match=r"rank 1: train\.runs_dir=.*/x, which rank 0 has made, is not here"):
        open_run(config.train, second())
    (tmp_path / "x").mkdir()
    (tmp_path / "x/.lock").touch()
    assert open_run(config.train, second()).path == tmp_path / "x"


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(
        UserError, match=r"cannot be locked \(Function not implemented\): needs a file system with flock"
    ):
        lock_folder(tmp_path)


@pytest.mark.slow
def test_a_run_and_its_text_may_move(run, tmp_path):
    """Resumed, evaluated and sampled from where they are now; another text is refused."""
    options = [*small_run(tmp_path), "train.steps=4", "train.save_every=2", f"train.runs_dir={tmp_path / 'runs'}"]
    assert run("train", *options, "train.name=first").returncode == 0
    (path,) = [o.removeprefix("corpus.path=") for o in options if o.startswith("corpus.path=")]
    before = json.loads((tmp_path / "runs/first/summary.json").read_text())["bpc"]
    shutil.move(path, tmp_path / "moved.txt")
    shutil.move(tmp_path / "runs/first", tmp_path / "runs/second")
    shutil.rmtree(tmp_path / "runs/second/checkpoints/step-00000004")
    run_option, text = f"run={tmp_path / 'runs/second'}", f"corpus.path={tmp_path / 'moved.txt'}"
    assert "no such file" in run("evaluate", run_option).stderr
    done = run("train", *options, text, "train.name=second", "train.resume=true")
    assert done.returncode == 0 and "resumed at step 2" in done.stdout, done.stderr
    after = json.loads((tmp_path / "runs/second/summary.json").read_text())["bpc"]
    assert after == pytest.approx(before, rel=1e-6)
    shutil.move(tmp_path / "moved.txt", tmp_path / "again.txt")
    text = f"corpus.path={tmp_path / 'again.txt'}"
    for program in ("evaluate", "generate", "analyse"):
        done = run(program, run_option, text, *(["length=3"] if program == "generate" else []))
        assert done.returncode == 0, (program, done.stderr)
    (tmp_path / "again.txt").write_bytes(b"another text " * 400)
    done = run("train", *options, text, "train.name=second", "train.resume=true")
    assert done.returncode == 2 and "trained on text with sha256" in done.stderr


@pytest.mark.parametrize(
    ("value", "typed"),
    [
        ("runs/a", "run=runs/a"),
        ("runs/a=1", "\"run='runs/a=1'\""),
        ("runs/größe", "\"run='runs/größe'\""),
        ("a b", "\"run='a b'\""),
    ],
)
def test_an_option_to_paste(value, typed):
    """Hydra reads letters of other alphabets in quotes alone."""
    assert command_option("run", value) == typed
