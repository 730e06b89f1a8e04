"""Slurm on this machine alone: a controller and one node with a job queue, for tests and trials of job scripts.

    with one_slurm(Path("folder")) as slurm:
        slurm.run("sbatch", "--wait", "launch/recipes/slurm.sbatch", "experiment=debug")

It runs beside a Slurm that the machine belongs to: own ports, own munge, own slurm.conf, all in the folder. It needs
root and Debian's slurmctld, slurmd, slurm-client and munge; why_not() says what is missing. The daemons and all jobs
end when the block is left.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machines.cluster import ROOT

_PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol")
_START_S = 60.0
_CONF = """
ClusterName=foreroute
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=5,bf_interval=5
SlurmdParameters=config_overrides
MpiDefault=none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
"""
# cred_expire: a job put back into the queue waits so many seconds, 120 by default.


class SlurmError(RuntimeError):
    """Slurm did not start; the text gives the reason in one line."""


@dataclass(frozen=True, slots=True)
class Slurm:
    """A running Slurm."""

    environ: Mapping[str, str]

    def run(self, *command: str, seconds: float = 300.0) -> str:
        """Run a command from the root of the checkout; return its output."""
        done = subprocess.run(
            command, env=self.environ, cwd=ROOT, timeout=seconds, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SlurmError(f"`{' '.join(command)}` ended with {done.returncode}: {done.stderr}")
        return done.stdout

    def state(self, job: str) -> str:
        """Return the state of a job, such as RUNNING."""
        found = self.run("scontrol", "--oneliner", "show", "job", job)
        return found.split("JobState=")[1].split()[0]


def why_not() -> str | None:
    """Return in one line the reason why Slurm cannot run here; None if it can."""
    if os.geteuid() != 0:
        return "a Slurm of one machine needs root"
    for program in _PROGRAMS:
        if shutil.which(program, path=_path()) is None:
            return f"there is no `{program}` here; `make test-cluster` installs it"
    return None


@contextmanager
def one_slurm(folder: Path, cpus: int = 4) -> Iterator[Slurm]:
    """Start Slurm with all its files in an empty folder, and end it when the block is left.

    Args:
        cpus: processors that the node claims to have.

    Raises:
        SlurmError: it did not start.
    """
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir()
    folder.chmod(0o711)
    (folder / "munge").chmod(0o711)
    key = folder / "munge/key"
    key.touch(0o600)
    key.write_bytes(secrets.token_bytes(128))
    conf = folder / "slurm.conf"
    host = socket.gethostname()
    conf.write_text(_CONF.format(host=host, ports=_free_ports(2), folder=folder, cpus=cpus))
    slurm = Slurm({**os.environ, "PATH": _path(), "SLURM_CONF": str(conf)})
    munged = ["--force", *(f"--{what}-file={folder}/munge/{what}" for what in ("key", "pid", "log", "seed"))]
    with ExitStack() as stack:
        for name, options in (
            ("munged", [*munged, f"--socket={folder}/munge/socket"]),
            ("slurmctld", []),
            ("slurmd", []),
        ):
            pid = folder / ("munge/pid" if name == "munged" else f"{name}.pid")
            stack.callback(_end, pid)
            slurm.run(name, *options)
        stack.callback(_cancel_all, slurm)
        _wait_for_node(slurm)
        yield slurm


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in sockets]


def _wait_for_node(slurm: Slurm) -> None:
    deadline = time.monotonic() + _START_S
    while (state := slurm.run("sinfo", "--noheader", "--format=%t").strip()) != "idle":
        if time.monotonic() > deadline:
            raise SlurmError(f"the node is {state} after {_START_S:.0f} s")
        time.sleep(0.2)


def _cancel_all(slurm: Slurm) -> None:
    """End all jobs, and wait until their processes are gone: a slurmd that ends leaves them."""
    slurm.run("scancel", "--user=root")
    deadline = time.monotonic() + _START_S
    while slurm.run("squeue", "--noheader").strip() and time.monotonic() < deadline:
        time.sleep(0.2)


def _end(pid_file: Path) -> None:
    """End a daemon and wait for it."""
    if not pid_file.exists():
        return
    number = int(pid_file.read_text())
    with suppress(ProcessLookupError):
        os.kill(number, signal.SIGTERM)
        deadline = time.monotonic() + 20.0
        while time.monotonic() < deadline:
            os.kill(number, 0)
            time.sleep(0.05)
        os.kill(number, signal.SIGKILL)
