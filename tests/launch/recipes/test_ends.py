"""Two ranks under each launcher of this machine: one that raises ends all and says where, and a stop saves."""

import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager

import pytest

from benchmarks.machines.cluster import ROOT
from foreroute.launch.testing.runs import last_step, processes_of, wait_until

PROGRAM = """
import foreroute.launch.train
from foreroute.engine.train.trainer import Trainer
run = Trainer.run
def fail(trainer, *arguments):
    if trainer.world.mesh.rank == 1:
        raise ZeroDivisionError("planted")
    return run(trainer, *arguments)
Trainer.run = fail
foreroute.launch.train.main()
"""
BIN = f"{sys.prefix}/bin"
LAUNCHERS = {
    "torchrun": [f"{BIN}/torchrun", "--standalone", "--nproc_per_node=2"],
    "deepspeed": [f"{BIN}/deepspeed", "--num_accelerators=2", "--no_local_rank", "--master_port=PORT"],
    "mpirun": [f"{BIN}/mpirun", "-np", "2", "--oversubscribe", sys.executable, "-u", "-m", "mpi4py"],
}
STOPS = {  # the rest of the command line; who gets which signal; the launcher's exit code then
    "torchrun": (["-m", "launch.train"], "launcher", signal.SIGTERM, 1),
    "deepspeed": (["--module", "launch.train"], "rank", signal.SIGTERM, 143),
    "mpirun": (["-m", "launch.train"], "launcher", signal.SIGUSR1, 143),
    "mpirun.sh": ([], "launcher", signal.SIGTERM, 143),
}
pytestmark = [pytest.mark.dist, pytest.mark.slow]


@contextmanager
def started(launcher, folder, what):
    """The launcher's process, which writes to the file log; in the end everything of the run is killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    recipe = [f"{ROOT}/launch/recipes/{launcher}"]
    command = [part.replace("PORT", port) for part in LAUNCHERS.get(launcher, recipe)]
    (folder / "hosts").write_text("localhost slots=2\n")
    environ = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PYTHON": sys.executable,
        "MPIRUN": f"{BIN}/mpirun",
        "HOSTFILE": f"{folder}/hosts",
    }
    runs = ["parallel.expert_ranks=2", f"train.runs_dir={folder}"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*command, *what, *runs], stdout=log, stderr=log, env=environ)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for left in processes_of(folder):
            left.kill()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_an_exception_ends_all(launcher, tmp_path, small_run):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    with started(launcher, tmp_path, [str(program), *small_run]) as process:
        assert process.wait(timeout=600) == 1
        wait_until(lambda: not processes_of(tmp_path), 30)
    log = (tmp_path / "log").read_text()
    assert "Traceback" in log and log.count("This was rank 1 of 2.\n") == 1


@pytest.mark.parametrize("launcher", STOPS)
def test_a_stop_saves(launcher, tmp_path, small_run):
    program, whom, number, code = STOPS[launcher]
    long = ["train.steps=100000", "train.log_every=1"]
    with started(launcher, tmp_path, [*program, *small_run, *long]) as process:
        wait_until(lambda: last_step(tmp_path) > 1)
        ranks = [p for p in processes_of(tmp_path) if "RANK" in p.environ() or "OMPI_COMM_WORLD_RANK" in p.environ()]
        assert len(ranks) == 2
        (process if whom == "launcher" else ranks[1]).send_signal(number)
        wait_until(lambda: process.poll() is not None and not processes_of(tmp_path), 60)
    log = (tmp_path / "log").read_text()
    step = int(re.search(r"stopped at step (\d+);", log)[1])
    assert process.returncode == code
    assert (tmp_path / f"debug/checkpoints/step-{step:08d}").is_dir()
    assert step <= last_step(tmp_path) + 1


def test_torchrun_starts_a_killed_rank_again(tmp_path, small_run):
    """Its agent keeps the store of the first attempt, with what the lost ranks left there."""
    options = ["train.steps=60", "train.log_every=1", "train.save_every=10", "train.resume=true"]
    program = ["--max-restarts=1", *STOPS["torchrun"][0], *small_run, *options]
    with started("torchrun", tmp_path, program) as process:
        wait_until(lambda: last_step(tmp_path) > 15)
        (victim,) = (p for p in processes_of(tmp_path) if p.environ().get("RANK") == "1")
        victim.kill()
        assert process.wait(timeout=600) == 0
    log = (tmp_path / "log").read_text()
    assert "foreroute: rank 1 is lost" in log and "resumed at step" in log
    assert last_step(tmp_path) == 60
