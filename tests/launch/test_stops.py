"""SIGTERM to a launcher, as schedulers send it: every rank saves behind the same step, and state.json tells that it was stopped."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
LAUNCHERS = {  # name: command before the program's options, exit code after a stop
    "python": ([sys.executable, "-m", "launch.train"], 143),
    "torchrun": ([f"{BIN}/torchrun", "--standalone", "--nproc_per_node=2", "-m", "launch.train"], 1),
    "deepspeed": ([f"{BIN}/deepspeed", "--num_accelerators", "2", "--module", "--no_local_rank", "launch.train"], 143),
    "mpirun": ([f"{BIN}/mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "2", sys.executable, "-m", "mpi4py", "-m", "launch.train"], 143),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_is_stopped(launcher, tmp_path, text):
    command, code = LAUNCHERS[launcher]
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    options = [
        "experiment=debug", "corpus=file", f"corpus.path={text}", f"corpus.cache_dir={tmp_path / 'cache'}", "train.threads=1",
        "train.steps=100000", "train.log_every=1", f"train.runs_dir={tmp_path}",
    ]  # fmt: skip
    if launcher != "python":
        options.append("parallel.expert_ranks=2")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, *options], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
    metrics, folder = tmp_path / "debug/metrics.jsonl", tmp_path / "debug"
    try:
        deadline = time.monotonic() + 200
        while not (metrics.exists() and metrics.read_text().count("\n") > 2):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        out, _ = process.communicate(timeout=100)
        print(launcher, process.returncode, time.monotonic() - begun, (folder / "state.json").read_text(), out[-1500:])
    finally:
        process.kill()
    assert process.returncode == code, out
    state = json.loads((folder / "state.json").read_text())
    assert state["state"] == "stopped"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step-{state['step']:08d}"]
    assert f"stopped at step {state['step']}; train.resume=true goes on from there" in out
