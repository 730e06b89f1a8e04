"""How a process joins the other ranks, what else it needs before training (threads, signals, memory), and how it ends."""

import atexit
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
from torch import distributed as dist

from engine.config import ParallelConfig, require
from engine.errors import UserError
from engine.parallel.host import GlooHost, Host, MpiHost, expert_group_host
from engine.parallel.mesh import Mesh
from engine.parallel.watch import Watch
from engine.parallel.world import World, agree, together
from launch.bootstrap import Place, find_address, find_device, find_node, find_place

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # options of glibc's mallopt(3)
_HOST_TIMEOUT = timedelta(hours=1)
"""Rank 0 may build tables or write plots meanwhile; the watch sees who is lost."""

GRACE_S = 3.0
"""Seconds from a signal in which others only repeat it."""

_stores: list[Any] = []  # of this process: kept for all jobs of a sweep

_MOST_THREADS = 4096  # beyond any machine; far more end the process without a word


@contextmanager
def connected(parallel: ParallelConfig, options: Mapping[str, Any]) -> Iterator[World]:
    """Meet the other ranks (if there are any), and be watched with them until the block ends.

    Args:
        options: every option by name; compared before anything is done that depends on them.

    Raises:
        UserError: the others did not come, or have other options, or the expert group does not divide the ranks.
    """
    place = find_place()
    device = find_device(place)
    if place.ranks == 1:
        yield World(Mesh(expert_ranks=parallel.expert_ranks), device)
        return
    if not _stores:
        _stores.append(_meet(place, parallel.timeout_s))
    watch_store = dist.PrefixStore("watch", _stores[0].clone())
    watch = Watch(watch_store, place.rank, place.ranks, parallel.timeout_s)
    with closing(watch), watch.guard(), ExitStack() as stack:
        host = stack.enter_context(closing(_host_of_all(_HOST_TIMEOUT)))
        agree(host, options)
        mesh = together(host, lambda: Mesh(place.rank, place.ranks, parallel.expert_ranks))
        nodes = host.gather(find_node())
        names = list(dict.fromkeys(nodes))
        planning, planning_group = _hosts_for_planning(place, mesh, parallel.timeout_s)
        yield World(
            mesh, device, host=host, planning=planning, planning_group=planning_group, watch=watch,
            node_P=tuple(names.index(node) for node in nodes),
        )  # fmt: skip
        for connection in (planning, planning_group):  # after a failure a thread may be inside
            connection.close()


def _meet(place: Place, timeout_s: float) -> Any:
    """Form the process group over which tensors travel; gives the store that all ranks share."""
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = find_address(place)
    os.environ |= {"RANK": str(place.rank), "WORLD_SIZE": str(place.ranks)}
    os.environ["LOCAL_RANK"] = str(place.local_rank)  # DeepSpeed insists on it
    timeout = timedelta(seconds=timeout_s)
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store = _fresh(next(dist.rendezvous("env://", timeout=timeout))[0])
        _take_place(store, place, address)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", store=dist.PrefixStore("ranks", store), rank=place.rank, world_size=place.ranks,
            timeout=timeout,
        )  # fmt: skip
    except UserError:
        raise
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"rank {place.rank} of {place.ranks} did not meet the others at {address}: {reason}"
        ) from error
    return store


def _fresh(store: Any) -> Any:
    """The store without what an earlier attempt left in it.

    torchrun's agents keep one store for all restarts (2.13), and count these each for itself.

    Raises:
        UserError: the counts of several machines would not agree.
    """
    environ = os.environ
    if environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store
    restarts = environ["TORCHELASTIC_MAX_RESTARTS"]
    require(
        environ["GROUP_WORLD_SIZE"] == "1" or restarts == "0",
        f"--max-restarts={restarts}: on several machines the ranks of a second attempt would meet what is left of the "
        "first; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 as launch/recipes/torchrun_c10d.sh does",
    )
    return dist.PrefixStore(f"attempt {environ['TORCHELASTIC_RESTART_COUNT']}", store)


def _take_place(store: Any, place: Place, address: str) -> None:
    """Refuse to be a rank that is there already, before anything is exchanged: that would disturb a run that goes well."""
    require(
        store.add(f"came/{place.rank}", 1) == 1,
        f"rank {place.rank} is at {address} already: another run meets there; give this one another port "
        "(--master_port, MASTER_PORT)",
    )


def _hosts_for_planning(place: Place, mesh: Mesh, timeout_s: float) -> tuple[Host, Host]:
    """Connections of the loader's thread: all ranks, and this rank's expert group."""
    if place.mpi:
        from mpi4py import MPI

        if MPI.Query_thread() == MPI.THREAD_MULTIPLE:
            world = MPI.COMM_WORLD
            return MpiHost(world), MpiHost(world.Split(mesh.group_number, place.rank))
    timeout = timedelta(seconds=timeout_s)
    return _host_of_all(timeout), expert_group_host(mesh, timeout)


def _host_of_all(timeout: timedelta) -> Host:
    return GlooHost(dist.new_group(backend="gloo", timeout=timeout))


STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGXCPU, signal.SIGUSR1, signal.SIGUSR2)  # fmt: skip
"""Signals that would end the process and can be caught."""


class StopSignal:
    """Ends the program with 128 + number on each signal of STOPS: at once, or, while `deferred`, when the trainer asks.

    So a signal in the middle of a step waits for its end and a checkpoint. Another one ends the process at once, unless it
    comes within GRACE_S: a scheduler signals every process, and a launcher among them passes it on.
    SIGUSR1 counts as SIGTERM: mpirun passes it on and waits, while its own end on SIGTERM leaves the ranks a second.
    SIGHUP stays ignored where it is (nohup).
    """

    def __init__(self) -> None:
        self.number = 0
        self._deferred = False
        self._since = 0.0
        for number in STOPS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)

    def __call__(self) -> bool:
        """Say whether a stop was asked for."""
        return self.number != 0

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only take note of a signal, for whoever calls this object.

        Behind an error too: launchers send one as soon as a rank is gone, and the others have yet to say which.
        """
        self._deferred = True
        yield
        self._deferred = False

    @property
    def exit_code(self) -> int:
        """128 + signal number, as shells report it, so that scripts see an unfinished run."""
        return 128 + self.number

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number == 0:
            self.number = signal.SIGTERM if number == signal.SIGUSR1 else number
            self._since = time.monotonic()
            if not self._deferred:
                sys.exit(self.exit_code)
        elif time.monotonic() - self._since > GRACE_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def run_and_leave(main: Callable[[], object]) -> None:
    """Run a program; one that made a process group then leaves at once, without the interpreter's end.

    A thread of gloo that lets go of a tensor at that moment needs the interpreter, and would abort the process ("terminate
    called without an active exception": torch 2.13, busy cores). The threads cannot be ended before: PyTorch and DeepSpeed
    keep the groups, so destroy_process_group leaves them running. An exception, and under MPI a failure, ends as usual.
    """
    code = 0
    try:
        main()
    except SystemExit as end:
        mpi = "mpi4py.MPI" in sys.modules  # whose runner ends the other ranks when one fails
        if not dist.is_initialized() or not isinstance(end.code, int | None) or (end.code and mpi):
            raise
        code = end.code or 0
    if not dist.is_initialized():
        return
    atexit._run_exitfuncs()  # what the interpreter would do first; there is no public call for it
    if "mpi4py.MPI" in sys.modules:
        from mpi4py import MPI

        MPI.Finalize()  # mpirun takes a rank without it for lost
    for stream in (sys.stdout, sys.stderr):
        with suppress(BrokenPipeError):
            stream.flush()
    os._exit(code)


def set_up(threads: int) -> None:
    """Set PyTorch's CPU threads (0 leaves the default), make denormals zero, and keep freed memory."""
    require(
        0 <= threads <= _MOST_THREADS,
        f"threads={threads}: must be at least 0, at most {_MOST_THREADS}",
    )
    if threads:
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_flush_denormal(True)
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Make glibc keep what is freed for the next step instead of giving it back to the system.

    Otherwise every large activation is mapped anew and its pages fault in one by one: relative attention at the
    published shapes took 223 ms with the defaults and 179 ms so (fp32, 2 cores, 2026-11). No effect without glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 64 << 20)
