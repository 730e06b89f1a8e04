"""The rank of a process and the address of the rendezvous, from the variables of its launcher. Starts nothing.

A launcher may start another one: Slurm or mpirun starts one torchrun on each machine, a Slurm job runs mpirun, a person
runs torchrun in a shell of one task. So the variables of several may be there, and those of the innermost count:

| variables there | whose place counts |
|---|---|
| none | one rank alone; so too in a Slurm batch script outside srun: SLURM_PROCID without SLURM_STEP_NUM_TASKS |
| RANK, with TORCHELASTIC_RUN_ID (torchrun) or CROSS_SIZE (deepspeed) | theirs; all else belongs to who started them |
| OMPI_COMM_WORLD_RANK | Open MPI's, whatever Slurm says: mpirun starts its daemons by srun |
| PMI_RANK, Slurm's the same | Slurm's: srun --mpi=pmi2 |
| PMI_RANK, Slurm's another | MPICH's or Intel MPI's: mpiexec starts its daemons by srun |
| SLURM_PROCID and SLURM_STEP_NUM_TASKS | Slurm's: srun |
| RANK by hand, alone | these; LOCAL_RANK must be there too |
| RANK by hand, beside one of the others | refused unless both say the same, for one is left over from something else |
| RANK by hand, beside one that started one process | RANK: that process started others |
| OMPI_COMM_WORLD_RANK and PMI_RANK | refused unless both say the same: nobody knows which is left over |
"""

import os
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from foreroute.engine.errors import UserError, require

_AGENTS = ("TORCHELASTIC_RUN_ID", "CROSS_SIZE")
_FIRST_PORT, _PORTS = 20_000, 10_000  # for Slurm: below those that systems give out by themselves


@dataclass(frozen=True, slots=True)
class Launcher:
    """A launcher of processes, and the variables in which it tells each its place."""

    name: str
    rank: str
    ranks: str
    local_rank: str
    mpi: bool = False

    def there(self, environ: Mapping[str, str]) -> bool:
        """Return whether its variables are set; not by the local rank, which DeepSpeed sets in any process."""
        return self.rank in environ or self.ranks in environ

    def read(self, environ: Mapping[str, str]) -> "Place":
        """Read the variables.

        Raises:
            UserError: one is missing or no whole number, or the rank is too high.
        """
        found = []
        for name in (self.rank, self.ranks, self.local_rank):
            value = environ.get(name, "")
            require(value.isdecimal(), f"{name}={value}: {self.name} sets it to a whole number")
            found.append(int(value))
        rank, ranks, local_rank = found
        require(rank < ranks, f"{self.rank}={rank}: must be below {self.ranks}={ranks}")
        return Place(rank, ranks, local_rank, self)


TORCH = Launcher("torchrun or deepspeed", "RANK", "WORLD_SIZE", "LOCAL_RANK")
OPEN_MPI = Launcher("Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", mpi=True)
MPICH = Launcher("MPICH or Intel MPI", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", mpi=True)
SLURM = Launcher("Slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")


@dataclass(frozen=True, slots=True)
class Place:
    """The place of this process among those that the launcher started."""

    rank: int = 0
    ranks: int = 1
    local_rank: int = 0
    launcher: Launcher | None = None  # None: nobody, one rank alone

    @property
    def mpi(self) -> bool:
        """The ranks can talk by MPI."""
        return self.launcher is not None and self.launcher.mpi


def find_place(environ: Mapping[str, str] = os.environ) -> Place:
    """Read the launchers' variables; one rank alone if there are none. The table above defines whose count.

    Raises:
        UserError: a variable is missing or no number, or two launchers contradict each other.
    """
    by_hand = TORCH.there(environ)
    if by_hand and any(mark in environ for mark in _AGENTS):
        return TORCH.read(environ)
    found = _started(environ)
    if by_hand and (found is None or found.ranks == 1):
        return TORCH.read(environ)
    if found is None:
        return Place()
    if by_hand:
        _refuse_contradiction(found, TORCH, environ)
        if environ.get("LOCAL_RANK", "").isdecimal():
            return replace(found, local_rank=int(environ["LOCAL_RANK"]))
    return found


def _started(environ: Mapping[str, str]) -> Place | None:
    """Return the place by MPI or Slurm."""
    if OPEN_MPI.there(environ):
        place = OPEN_MPI.read(environ)
        if MPICH.there(environ):
            _refuse_contradiction(place, MPICH, environ)
        return place
    by_slurm = SLURM.read(environ) if SLURM.ranks in environ else None
    if not MPICH.there(environ):
        return by_slurm
    if by_slurm is not None:
        place = MPICH.read({MPICH.local_rank: "0", **environ})
        if (place.rank, place.ranks) == (by_slurm.rank, by_slurm.ranks):
            return by_slurm
    alone = {MPICH.local_rank: "0"} if environ.get(MPICH.ranks) == "1" else {}
    return MPICH.read({**alone, **environ})


def _refuse_contradiction(place: Place, other: Launcher, environ: Mapping[str, str]) -> None:
    """Refuse variables of another launcher that contradict a place."""
    launcher = place.launcher
    assert launcher is not None
    for name, value in ((other.rank, place.rank), (other.ranks, place.ranks)):
        require(
            environ.get(name) in (None, str(value)),
            f"{name}={environ.get(name)}: {launcher.name} started this process as rank {environ[launcher.rank]} of "
            f"{environ[launcher.ranks]}; unset {name}, which something else left behind",
        )


def find_device(place: Place, environ: Mapping[str, str] = os.environ) -> torch.device:
    """Return this process's GPU, by its rank on its machine, or the CPU.

    DS_ACCELERATOR=cpu, DeepSpeed's own switch, keeps a run off the GPUs.

    Raises:
        UserError: the machine has fewer GPUs than processes.
    """
    if environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    require(
        place.local_rank < gpus,
        f"local rank {place.local_rank}: this process sees {gpus} GPUs; start at most as many processes "
        "on a machine, and let each see all of them",
    )
    torch.cuda.set_device(place.local_rank)
    return torch.device("cuda", place.local_rank)


def find_node() -> str:
    """Return an identifier of this process's machine: its host name and, on Linux, the kernel's boot id.

    Machines may have the same host name; containers and network namespaces of one machine may have several, and then
    they count as machines of their own.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"


def find_address(place: Place, environ: Mapping[str, str] = os.environ) -> tuple[str, str]:
    """Return host and port at which rank 0 waits for the others: MASTER_ADDR and MASTER_PORT, or else the launcher's.

    It is a collective under MPI, where rank 0's variables count.

    Raises:
        UserError: one is missing and the launcher cannot say.
    """
    address, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
    if place.mpi:
        return _address_by_mpi(address, port)
    if place.launcher is SLURM:
        return address or _first_host_of_slurm(environ), port or _port_by_slurm(environ)
    if address and port:
        return address, port
    raise UserError("MASTER_ADDR and MASTER_PORT: the launcher must set them")


def _address_by_mpi(address: str | None, port: str | None) -> tuple[str, str]:
    """Return rank 0's address and port, or a free port of its machine, on all ranks."""
    from mpi4py import MPI

    name = socket.gethostname()
    names = MPI.COMM_WORLD.allgather(name)
    if not address:
        address = "127.0.0.1" if len(set(names)) == 1 else _own_address(name)
    if not port:
        with socket.socket() as free:
            free.bind(("", 0))
            port = str(free.getsockname()[1])
    found: tuple[str, str] = MPI.COMM_WORLD.bcast((address, port))
    return found


def _own_address(name: str) -> str:
    """Return this machine's address, or its name if others can use nothing else."""
    address = socket.gethostbyname(name)
    return name if address.startswith("127.") else address


def _first_host_of_slurm(environ: Mapping[str, str]) -> str:
    """Return the machine of rank 0: the first of the step's."""
    nodes = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", ""))
    if environ.get("SLURM_STEP_NUM_NODES") == "1":
        return "127.0.0.1"
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise UserError(
            f"`{' '.join(command)}` does not say where rank 0 is; set MASTER_ADDR to the first machine's name"
        ) from error


def _port_by_slurm(environ: Mapping[str, str]) -> str:
    """Return a port that every rank of a step computes alike; other jobs and steps mostly get others."""
    numbers = []
    for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"):
        value = environ.get(name, "")
        require(value.isdecimal(), f"{name}={value}: Slurm sets it to a whole number")
        numbers.append(int(value))
    job, step = numbers
    return str(_FIRST_PORT + (31 * job + step) % _PORTS)
