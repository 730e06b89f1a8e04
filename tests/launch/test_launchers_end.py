"""Two ranks under each launcher of this machine: one that raises ends all and says where, and a stop saves."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

from benchmarks.cluster import ROOT
from launch.testing import last_step, processes_of, read_losses, wait_until

PROGRAM = """
import launch.train
from engine.trainer import Trainer
run = Trainer.run
def fail(trainer, *arguments):
    if trainer.world.mesh.rank == 1:
        raise ZeroDivisionError("planted")
    return run(trainer, *arguments)
if {planted}:
    Trainer.run = fail
launch.train.main()
"""
BIN = f"{sys.prefix}/bin"
LAUNCHERS = {
    "torchrun": [f"{BIN}/torchrun", "--standalone", "--nproc_per_node=2"],
    "deepspeed": [f"{BIN}/deepspeed", "--num_accelerators=2", "--no_local_rank"],
    "mpirun": [f"{BIN}/mpirun", "-np", "2", "--oversubscribe", sys.executable, "-m", "mpi4py"],
}
pytestmark = [pytest.mark.dist, pytest.mark.slow]


@contextmanager
def started(launcher, folder, options, planted=False):
    """The launcher's process; in the end everything of the run is killed."""
    program = folder / "program.py"
    program.write_text(PROGRAM.format(planted=planted))
    with socket_of_any_port() as port:
        own = ["--master_port", port] if launcher == "deepspeed" else []
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
               "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}  # fmt: skip
    command = [*LAUNCHERS[launcher], *own, str(program), *options]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environ, start_new_session=True)  # fmt: skip
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            for left in processes_of(folder):
                left.kill()
