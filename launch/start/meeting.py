"""Rendezvous of the ranks, and their watchdog. launch/start/rank_variables.py finds the rank and the address."""

import os
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist

from foreroute.engine.config import Collectives, ParallelConfig
from foreroute.engine.errors import UserError, require
from foreroute.engine.parallel.cpu_group import CpuGroup, GlooGroup, MpiGroup, expert_cpu_group, named
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.parallel.watchdog import FOR_EVER, Watchdog
from foreroute.engine.parallel.world import World, agree, together
from foreroute.launch.start.process import MEETING
from foreroute.launch.start.rank_variables import Place, find_address, find_device, find_node, find_place

_GLANCE_S = 0.1  # how often a waiting rank looks whether the others have come
_END_S = 1.0  # for the meeting's thread to end
_stores: list[Any] = []  # of this process: kept for all jobs of a sweep


@contextmanager
def connected(parallel: ParallelConfig, options: Mapping[str, Any]) -> Iterator[World]:
    """Connect to the other ranks, if there are any, with a watchdog until the block ends.

    Args:
        options: every option by name; the ranks compare them first.

    Raises:
        UserError: the others did not come, or have other options, or the expert group does not divide the ranks.
    """
    place = find_place()
    device = find_device(place)
    if place.ranks == 1:
        yield World(Mesh(ep_size=parallel.expert_ranks), device)
        return
    if not _stores:
        _stores.append(_meet(place, parallel))
    watch_store = dist.PrefixStore("watch", _stores[0].clone())
    watchdog = Watchdog(watch_store, place.rank, place.ranks, parallel.timeout_s)
    with closing(watchdog), watchdog.guard(), ExitStack() as stack:
        cpu_group = stack.enter_context(closing(_group_of_all()))
        agree(cpu_group, options)
        with together(cpu_group):
            mesh = Mesh(place.rank, place.ranks, parallel.expert_ranks)
        nodes = cpu_group.gather(find_node())
        names = list(dict.fromkeys(nodes))
        planning, planning_group = _hosts_for_planning(place, mesh)
        yield World(
            mesh,
            device,
            cpu_group=cpu_group,
            planning=planning,
            planning_group=planning_group,
            watchdog=watchdog,
            node_P=tuple(names.index(node) for node in nodes),
        )
        for connection in (planning, planning_group):  # after a failure a thread may be inside
            connection.close()


def _meet(place: Place, parallel: ParallelConfig) -> Any:
    """Form the process group for tensors; returns the store that all ranks share.

    Raises:
        UserError: the others did not come within parallel.meet_s, or another run meets here.
    """
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = find_address(place)
    port = os.environ["MASTER_PORT"]
    require(port.isdecimal() and 0 < int(port) < 2**16, f"MASTER_PORT={port}: must be a port, 1 .. 65535")
    os.environ |= {"RANK": str(place.rank), "WORLD_SIZE": str(place.ranks)}
    os.environ["LOCAL_RANK"] = str(place.local_rank)  # DeepSpeed insists on it
    meeting = _Meeting(place, parallel)
    try:
        return meeting.form()
    except UserError:
        raise
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{meeting.who} did not meet the others at {meeting.address}: {reason}") from error


class _Meeting:
    """Ranks register at the store of rank 0, wait until all have registered, and then connect.

    PyTorch's calls block where no signal reaches, so a thread of their own makes them: a process that is told to end
    meanwhile does so at once, and a rank that died, or never came, is not waited for longer than parallel.meet_s.
    """

    def __init__(self, place: Place, parallel: ParallelConfig) -> None:
        self._place, self._meet_s, self._timeout_s = place, parallel.meet_s, parallel.timeout_s
        self._collectives = parallel.collectives
        self.address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        self.who = f"rank {place.rank} of {place.ranks}"
        self._missing = "rank 0 has not come"
        self._until = time.monotonic() + self._meet_s
        self._store: Future[Any] = Future()
        self._over = threading.Event()

    def form(self) -> Any:
        """Return the store when all ranks are connected."""
        thread = threading.Thread(target=self._run, name=MEETING, daemon=True)
        thread.start()
        try:
            return self._wait()
        finally:
            self._over.set()
            thread.join(_END_S)

    def _wait(self) -> Any:
        while not self._store.done():
            with suppress(TimeoutError):
                return self._store.result(_GLANCE_S)
            require(
                time.monotonic() < self._until,
                f"{self.who} did not meet the others at {self.address} within {self._meet_s:g} s: {self._missing}; "
                "parallel.meet_s=SECONDS waits longer",
            )
        return self._store.result()

    def _run(self) -> None:
        try:
            self._store.set_result(self._connect())
        except Exception as error:
            self._store.set_exception(error)

    def _connect(self) -> Any:
        store = _fresh(self._find_store())
        _take_place(store, self._place, self.address)
        ranks = range(self._place.ranks)
        while away := [rank for rank in ranks if not store.check([f"came/{rank}"])]:
            self._missing = f"{named(away, 'has', 'have', most=4)} not come"
            if self._over.wait(_GLANCE_S):
                return store
        self._missing = "one has come and is gone"
        self._until = time.monotonic() + self._meet_s
        dist.init_process_group(
            _backend(self._collectives),
            store=dist.PrefixStore("ranks", store),
            rank=self._place.rank,
            world_size=self._place.ranks,
            timeout=FOR_EVER,
        )
        return store

    def _find_store(self) -> Any:
        """Return the store of rank 0, or of torchrun's agents; waits for its owner alone."""
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        serves = self._place.rank == 0 and not _agents_have_a_store()
        wait = timedelta(seconds=self._meet_s + 1)
        store = dist.TCPStore(host, port, is_master=serves, timeout=wait, wait_for_workers=False, multi_tenant=True)
        store.set_timeout(timedelta(seconds=self._timeout_s))
        return store


def _backend(collectives: Collectives) -> str:
    """Return PyTorch's name of the backend for tensors."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and collectives is Collectives.nccl else "gloo"


def _agents_have_a_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _fresh(store: Any) -> Any:
    """Return the store without the keys of an earlier attempt.

    torchrun's agents keep one store for all restarts (2.13), and each counts the restarts by itself.

    Raises:
        UserError: the counts of several machines would not agree.
    """
    environ = os.environ
    if not _agents_have_a_store():
        return store
    restarts = environ["TORCHELASTIC_MAX_RESTARTS"]
    require(
        environ["GROUP_WORLD_SIZE"] == "1" or restarts == "0",
        f"--max-restarts={restarts}: on several machines the ranks of a second attempt would meet what is left of the "
        "first; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 as launch/recipes/torchrun_c10d.sh does",
    )
    return dist.PrefixStore(f"attempt {environ['TORCHELASTIC_RESTART_COUNT']}", store)


def _take_place(store: Any, place: Place, address: str) -> None:
    """Refuse a rank that is registered already, before anything is exchanged, so that another run is not disturbed."""
    require(
        store.add(f"came/{place.rank}", 1) == 1,
        f"rank {place.rank} is at {address} already: another run meets there; give this one another port "
        "(--master_port, MASTER_PORT)",
    )


def _hosts_for_planning(place: Place, mesh: Mesh) -> tuple[CpuGroup, CpuGroup]:
    """Return the connections of the loader's thread: all ranks, and this rank's expert group."""
    if place.mpi:
        from mpi4py import MPI

        if MPI.Query_thread() == MPI.THREAD_MULTIPLE:
            world = MPI.COMM_WORLD
            return MpiGroup(world), MpiGroup(world.Split(mesh.expert_dp_rank, place.rank))
    return _group_of_all(), expert_cpu_group(mesh, FOR_EVER)


def _group_of_all() -> CpuGroup:
    return GlooGroup(dist.new_group(backend="gloo", timeout=FOR_EVER))
