"""A full disk, a malicious run folder, secrets in the environment: what a run does with them."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from foreroute.engine.checkpoint import files
from foreroute.engine.checkpoint.save_load import find_newest
from foreroute.engine.sealed_files import checksum
from foreroute.launch.testing.runs import last_step, wait_until


def options(tmp_path, text, *more):
    return [
        "experiment=debug",
        "corpus=file",
        f"corpus.path={text}",
        f"corpus.cache_dir={tmp_path / 'cache'}",
        f"train.runs_dir={tmp_path / 'runs'}",
        "train.steps=8",
        "train.save_every=2",
        "train.log_every=2",
        *more,
    ]


def state(folder):
    return json.loads((folder / "state.json").read_text())


@pytest.fixture
def small_disk(tmp_path):
    """tmp_path/runs is a file system of its own; gives a function that changes its size in bytes."""
    folder = tmp_path / "runs"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a small disk is a mounted tmpfs: it needs root")
    try:
        yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_keeps_what_is_good(run, tmp_path, text, small_disk):
    assert run("train", *options(tmp_path, text, "train.name=whole")).returncode == 0
    wanted = tmp_path / "runs/whole/checkpoints/step-00000008"
    one = sum(file.stat().st_size for file in wanted.iterdir())
    used = shutil.disk_usage(tmp_path / "runs").used
    small_disk(used + 5 * one // 2)
    train = options(tmp_path, text, "train.name=cut", "train.keep=9")
    done = run("train", *train)
    folder = tmp_path / "runs/cut"
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith("foreroute: cannot write a checkpoint at step 6: ")
    assert "No space left on device" in line and line.endswith(
        f"the last good checkpoint is {folder}/checkpoints/step-00000004"
    )
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    assert find_newest(folder / "checkpoints")[1] == []
    assert state(folder) == {"state": "failed", "step": 6}
    small_disk("64m")
    done = run("train", *train, "train.resume=true")
    assert done.returncode == 0 and "resumed at step 4" in done.stdout, done.stderr
    assert state(folder) == {"state": "complete", "step": 8}
    found = load_file(folder / "checkpoints/step-00000008/shard-00000.safetensors")
    for key, value in load_file(wanted / "shard-00000.safetensors").items():
        assert torch.equal(found[key], value), key


class Malice:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def plant(folder, payload):
    """Pickles under every name that a run folder has, or that other programs' checkpoints have."""
    for name in ("state.json", "summary.json", "optimizer.pt", "pytorch_model.bin", "checkpoints/latest"):
        (folder / name).write_bytes(payload)
    newest, _ = find_newest(folder / "checkpoints")
    shard, manifest = newest.parent / "step-00000098", newest.parent / "step-00000099"
    for path in (shard, manifest):
        shutil.copytree(newest, path)
    (manifest / files.MANIFEST).write_bytes(payload)
    (shard / "shard-00000.safetensors").write_bytes(payload)
    (shard / "shard-00000.pt").write_bytes(payload)
    entry = json.loads((shard / files.MANIFEST).read_text())
    del entry["checksum"]
    real = files.sha256_of(shard / "shard-00000.safetensors")
    entry["files"] = {"shard-00000.safetensors": {"bytes": len(payload), "sha256": real}}
    entry["checksum"] = checksum(entry)  # all checksums are right
    (shard / files.MANIFEST).write_text(json.dumps(entry))


def test_a_pickle_is_never_loaded(run, tmp_path, text):
    mark = tmp_path / "loaded"
    payload = pickle.dumps(Malice(mark))
    pickle.loads(payload)
    assert mark.exists()  # negative control: it works
    mark.unlink()
    assert run("train", *options(tmp_path, text)).returncode == 0
    folder = tmp_path / "runs/debug"
    plant(folder, payload)
    (tables,) = (tmp_path / "cache").rglob("*.npz")
    arrays = {name: np.array([Malice(mark)], dtype=object) for name in np.load(tables)}
    np.savez(tables, **arrays)
    done = run("train", *options(tmp_path, text, "train.resume=true", "eval.k=[1]"))
    assert done.returncode == 0 and done.stdout.count("skipped a damaged checkpoint") == 2
    assert "resumed at step 8" in done.stdout
    assert run("evaluate", f"run={folder}", "k=[1]").returncode == 0
    for name in ("ids.bin", "meta.json"):
        (corpus,) = (tmp_path / "cache").rglob(name)
        corpus.write_bytes(payload)
        done = run("train", *options(tmp_path, text, "train.resume=true"))
        assert done.returncode == 2 and "damaged" in done.stderr
    assert not mark.exists()


SECRETS = {
    "WANDB_API_KEY": "0123456789secretvalue0123456789abcdef0123",
    "HF_TOKEN": "hf_verysecretvalue",
    "AWS_SECRET_ACCESS_KEY": "awssecretvalue",
    "SOME_PASSWORD": "passwordsecretvalue",
}


def holding(folder, words):
    """The files below a folder that hold one of the words."""
    found = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [path for path in found if any(word.encode() in path.read_bytes() for word in words)]


@pytest.mark.slow
def test_secrets_of_the_environment_are_written_nowhere(tmp_path, text):
    """A sweep of two jobs, one of which fails, watched by W&B offline."""
    home = tmp_path / "home"
    home.mkdir()
    command = [
        sys.executable,
        "-m",
        "launch.train",
        "-m",
        *options(tmp_path, text, "wandb.mode=offline"),
        "optim.lr=1e30,0.002",
    ]
    env = {**os.environ, **SECRETS, "HOME": str(home), "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and "is nan at step" in done.stderr, done.stderr
    assert holding(tmp_path, SECRETS.values()) == []
    assert not any(secret in done.stdout + done.stderr for secret in SECRETS.values())
    # negative control: what is written is found, in W&B's binary log too
    logs = list(tmp_path.rglob("*.wandb"))
    assert len(logs) == 2 and set(logs) <= set(holding(tmp_path, ["masked_from_k"]))


@pytest.mark.slow
def test_the_end_of_wandbs_service_does_not_end_the_run(tmp_path, text):
    """Its process is killed in the middle, as by the system when memory is short."""
    more = "wandb.mode=offline", "train.steps=60", "train.log_every=1"
    command = [sys.executable, "-m", "launch.train", *options(tmp_path, text, *more)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as train:
        try:
            wait_until(lambda: last_step(tmp_path / "runs") > 3)
            services = [p for p in psutil.Process(train.pid).children(recursive=True) if "wandb" in p.name()]
            assert services
            for service in services:
                service.kill()
            out, err = train.communicate(timeout=600)
        finally:
            train.kill()
    assert train.returncode == 0 and "Traceback" not in err, err
    assert out.count("W&B is lost (") == 1
    assert last_step(tmp_path / "runs") == 60 and state(tmp_path / "runs/debug")["state"] == "complete"


SLOW = """
import sys, time
import foreroute.engine.evaluation.held_out, foreroute.launch.{program}
whole = foreroute.engine.evaluation.held_out.eval_batches
def slow(*arguments):
    for batch in whole(*arguments):
        print("evaluates", flush=True)
        time.sleep(0.5)
        yield batch
foreroute.engine.evaluation.held_out.eval_batches = slow
foreroute.launch.{program}.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_in_the_evaluation(tmp_path, text, number):
    """Behind the training, whose last checkpoint is there, and of a program that evaluates alone."""
    folder = tmp_path / "runs/debug"
    own = [*options(tmp_path, text), "train.steps=2", "eval.streams=1"]
    for program, arguments in (("train", own), ("evaluate", [f"run={folder}", "streams=1"])):
        command = [sys.executable, "-c", SLOW.format(program=program), *arguments]
        defaults = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=defaults
        ) as process:
            try:
                while process.stdout.readline().strip() != "evaluates":
                    assert process.poll() is None
                process.send_signal(number)
                out, err = process.communicate(timeout=600)
            finally:
                process.kill()
        assert process.returncode == 128 + number and err == "", err
        if program == "train":
            assert "stopped after step 2, which is saved; train.resume=true evaluates it" in out
            assert state(folder) == {"state": "stopped", "step": 2}
