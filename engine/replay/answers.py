"""A process group of one process that has as many ranks as a run: every collective returns at once, with the sizes that
it has in the run.

The other ranks do not exist. They answer as this rank would, so that numbers stay finite and of the right size:

    all-reduce, reduce, reduce-scatter    every rank holds what this one holds: a sum is a multiple
    all-gather                            every rank sends what this one sends. Where the sent tensor is a part of the
                                          received one, as weights are at ZeRO-1 and 2, the others' parts stay as they
                                          are; at ZeRO-3 they are memory without values, and are filled as well
    all-to-all                            this rank's own rows as they are; the others' rows are this rank's, in turn
    broadcast, barrier                    nothing

Splits of an all-to-all are those of the Plan. On a CPU a collective allocates what gloo's allocates and frees it again,
so that a count of tensors is that of a run over gloo; NCCL allocates no tensor.

Letters: P ranks of the group, S sent rows, R received rows, D columns.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch._C._distributed_c10d import _create_work_from_future  # type: ignore[attr-defined]

from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.tracing import span

BACKEND = "foreroute_replay"
ANSWER = "answer"
"""Name of the range of an answer in a trace."""
_FOUND = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # where DeepSpeed looks for a place


_Group: Any = dist.ProcessGroup  # whose methods have several signatures, of which torch.distributed uses one


class AnsweringGroup(_Group):  # type: ignore[misc]
    """A group whose other ranks answer at once.

    Its methods have the names by which torch.distributed calls a group.
    """

    def __init__(self, rank: int, size: int, *, fills: bool) -> None:
        """Set the place.

        Args:
            fills: an all-gather also fills a tensor of which the sent one is a part.
        """
        super().__init__(rank, size)
        self._rank, self._size, self._fills = rank, size, fills

    def size(self) -> int:
        """Return the number of ranks."""
        return self._size

    def rank(self) -> int:
        """Return this process's rank."""
        return self._rank

    def name(self) -> str:
        """Return the name of the backend."""
        return BACKEND

    def getBackendName(self) -> str:
        """Return the name of the backend."""
        return BACKEND

    def allreduce(self, tensors: Sequence[Tensor], opts: Any = None) -> Any:
        """Add up: [..] to [..], in place."""
        with _answering():
            for tensor in tensors:
                self._sum(tensor, opts)
        return _done(*tensors)

    def reduce(self, tensors: Sequence[Tensor], opts: Any = None) -> Any:
        """Add up, as allreduce does: a rank that is not the root has no use for the result."""
        return self.allreduce(tensors, opts)

    def broadcast(self, tensors: Sequence[Tensor], opts: Any = None) -> Any:
        """Keep what is there: all ranks of a run begin with the same numbers."""
        return _done(*tensors)

    def barrier(self, opts: Any = None) -> Any:
        """Return at once."""
        return _done()

    def allgather(self, got: Sequence[Sequence[Tensor]], sent: Sequence[Tensor], opts: Any = None) -> Any:
        """Gather [..] of each rank into P tensors of the same shape."""
        with _answering():
            for parts, own in zip(got, sent, strict=True):
                _as_gloo(own, len(parts))
                for part in parts:
                    if part.data_ptr() != own.data_ptr():
                        part.copy_(own)
        return _done(*got[0], *sent)

    def all_gather_single(self, got: Tensor, sent: Tensor, opts: Any = None) -> Any:
        """Gather n numbers of each rank into P * n."""
        with _answering():
            _as_gloo(sent, self._size)
            part, got_Pn = _is_part(sent, got), got.view(self._size, -1)
            if not part:
                got_Pn[self._rank].copy_(sent.view(-1))
            if self._fills or not part:
                got_Pn[: self._rank].copy_(sent.view(1, -1))
                got_Pn[self._rank + 1 :].copy_(sent.view(1, -1))
        return _done(got, sent)

    def reduce_scatter_single(self, got: Tensor, sent: Tensor, opts: Any = None) -> Any:
        """Add up P * n numbers of each rank and keep the n of this one."""
        with _answering():
            _as_gloo(sent, 1)
            got.view(-1).copy_(sent.reshape(self._size, -1)[self._rank])
            self._sum(got, opts)
        return _done(got, sent)

    def all_to_all_single(
        self, got: Tensor, sent: Tensor, got_splits: Sequence[int], sent_splits: Sequence[int], opts: Any = None
    ) -> Any:
        """Receive [R, D] for [S, D]; without splits as many rows from each rank as to each."""
        with _answering():
            rows = got.shape[0] // self._size
            fill(got, sent, got_splits or [rows] * self._size, sent_splits or [rows] * self._size, self._rank)
        return _done(got, sent)

    # as torch before 2.13 calls them
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    alltoall_base = all_to_all_single

    def _sum(self, tensor: Tensor, opts: Any) -> None:
        if opts is None or opts.reduceOp == dist.ReduceOp.SUM:
            tensor.mul_(self._size)


def fill(got: Tensor, sent: Tensor, got_splits: Sequence[int], sent_splits: Sequence[int], rank: int) -> None:
    """Fill received rows [R, D]: a rank's own block is what it sends itself, all other rows are sent ones in turn.

    Example: rank 0 of 2 sends the rows a, b, c by splits 1, 2 and receives by splits 1, 4: a, then b c a b.
    """
    start, stop = sum(got_splits[:rank]), sum(got_splits[: rank + 1])
    own = sum(sent_splits[:rank])
    if sent.shape[0] == 0:
        got.zero_()
        return
    for first, last in ((0, start), (stop, got.shape[0])):
        _fill_in_turn(got[first:last], sent, first + 1 if first == 0 else first)
    got[start:stop].copy_(sent[own : own + stop - start])


def _fill_in_turn(got: Tensor, sent: Tensor, first: int) -> None:
    """Copy sent rows from number `first` on, from the beginning again after the last; in large pieces."""
    place, first = 0, first % sent.shape[0]
    while place < got.shape[0]:
        rows = min(got.shape[0] - place, sent.shape[0] - first)
        got[place : place + rows].copy_(sent[first : first + rows])
        place, first = place + rows, 0


def _as_gloo(like: Tensor, times: int) -> None:
    """Allocate and free what gloo allocates for a collective of CPU tensors."""
    if like.device.type == "cpu":
        like.new_empty(times * like.numel())


def _is_part(part: Tensor, whole: Tensor) -> bool:
    return part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def _done(*tensors: Tensor) -> Any:
    """Return a finished collective, which keeps its tensors for as long as it is kept, as gloo's and NCCL's do."""
    future: torch.futures.Future[list[Tensor]] = torch.futures.Future()
    future.set_result(list(tensors))
    return _create_work_from_future(future)


@dataclass(slots=True)
class Spent:
    """Time that this process spent in answers, on the host."""

    wall_s: float = 0.0
    cpu_s: float = 0.0  # of the calling threads


spent = Spent()
"""Of the process, as its process groups are."""


@contextmanager
def _answering() -> Iterator[None]:
    wall, cpu = time.perf_counter(), time.thread_time()
    with span(ANSWER), torch.no_grad():
        yield
    spent.wall_s += time.perf_counter() - wall
    spent.cpu_s += time.thread_time() - cpu


@contextmanager
def alone_as(mesh: Mesh, zero_stage: int) -> Iterator[None]:
    """Make this process the mesh's rank, in a process group of all its ranks, until the block ends."""
    fills = zero_stage == 3
    backend = f"{BACKEND}_filling" if fills else BACKEND
    if backend not in dist.Backend.backend_list:
        dist.Backend.register_backend(backend, _maker(fills=fills), devices=["cpu", "cuda"])
    before = {name: os.environ.get(name) for name in _FOUND}
    os.environ |= {"RANK": str(mesh.rank), "WORLD_SIZE": str(mesh.world), "LOCAL_RANK": "0"}
    dist.init_process_group(backend, store=dist.HashStore(), rank=mesh.rank, world_size=mesh.world)
    try:
        yield
    finally:
        dist.destroy_process_group()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _maker(*, fills: bool) -> Callable[..., AnsweringGroup]:
    return lambda store, rank, size, timeout: AnsweringGroup(rank, size, fills=fills)
