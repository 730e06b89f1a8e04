"""Groups of ranks that communicate through host memory, beside the device's collectives: places, facts and errors.

The one primitive is `all_gather`, over a gloo group or over MPI; on one rank it copies. The rest is made of it, but for
`all_to_all`, in which a rank is sent no more than is meant for it. Each object has connections of its own, so one
thread may use one while another thread trains; two threads must not share one.
"""

import json
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed as dist

from foreroute.engine.parallel.mesh import Mesh


class CpuGroup:
    """Single-process group; base class of GlooGroup and MpiGroup."""

    rank = 0
    ranks = 1

    def all_gather(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return every rank's array, [ranks, *values.shape]; all must have the same shape and type."""
        return values[None].copy()

    def all_to_all(self, parts: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """Send parts[q] to rank q; return what each rank sent to this one. 1-D arrays of one type, of any lengths."""
        length_PP = self.all_gather(np.array([part.size for part in parts]))
        found = self._exchange(np.concatenate(parts), length_PP)
        return np.split(found, np.cumsum(length_PP[:, self.rank])[:-1])

    def _exchange(self, values: NDArray[Any], length_PP: NDArray[np.int64]) -> NDArray[Any]:
        """Send length_PP[p, q] values from rank p to rank q, rank by rank; here all of them to all ranks."""
        padded = np.zeros(length_PP.sum(axis=1).max(), values.dtype)
        padded[: values.size] = values
        begin_P = length_PP[:, : self.rank].sum(axis=1)
        rows = zip(self.all_gather(padded), begin_P, length_PP[:, self.rank], strict=True)
        return np.concatenate([row[begin : begin + length] for row, begin, length in rows])

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, which must be JSON: numbers, text, lists, dicts with text keys, None."""
        text = np.frombuffer(json.dumps(value).encode(), np.uint8)
        length_P = self.all_gather(np.array([text.size]))[:, 0]
        padded = np.zeros(length_P.max(), np.uint8)
        padded[: text.size] = text
        rows = self.all_gather(padded)
        return [json.loads(row[:length].tobytes()) for row, length in zip(rows, length_P, strict=True)]

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """Return the source rank's value, which must be JSON; the other ranks' values are ignored."""
        return self.gather(value if self.rank == source else None)[source]

    def barrier(self) -> None:
        """Return when all ranks have called it."""
        self.all_gather(np.zeros(1, np.int64))

    def close(self) -> None:
        """Release the connections; nothing can be sent afterwards."""


class GlooGroup(CpuGroup):
    """Group over gloo; errors and timeouts are gloo's, as RuntimeError."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)

    def all_gather(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return every rank's array, [ranks, *values.shape]."""
        own = torch.from_numpy(np.ascontiguousarray(values).copy().reshape(-1))
        found = own.new_empty(self.ranks, own.numel())
        dist.all_gather(list(found), own, group=self.group)
        return found.numpy().reshape(self.ranks, *values.shape)

    def _exchange(self, values: NDArray[Any], length_PP: NDArray[np.int64]) -> NDArray[Any]:
        send_P, recv_P = length_PP[self.rank].tolist(), length_PP[:, self.rank].tolist()
        own = torch.from_numpy(values)
        found = own.new_empty(sum(recv_P))
        dist.all_to_all_single(found, own, recv_P, send_P, group=self.group)
        return found.numpy()

    def close(self) -> None:
        """Release the connections and wait for gloo's threads.

        One of them may still hold the tensors of the last call. It needs the interpreter to release them, and a
        process whose interpreter is ending would abort (seen with torch 2.13 in one of ten ends on busy cores).
        """
        dist.destroy_process_group(self.group)
        del self.group  # the last reference


def expert_cpu_group(mesh: Mesh, timeout: timedelta | None = None) -> CpuGroup:
    """Connect this rank to its expert group over gloo; a collective of all ranks of the run."""
    if mesh.ep_size == 1:
        return CpuGroup()
    groups = [
        dist.new_group(list(range(first, first + mesh.ep_size)), timeout, backend="gloo")
        for first in range(0, mesh.world, mesh.ep_size)
    ]
    return GlooGroup(groups[mesh.expert_dp_rank])


class MpiGroup(CpuGroup):
    """Group over a duplicate of an MPI communicator; needs MPI_THREAD_MULTIPLE beside other threads."""

    def __init__(self, comm: Any) -> None:
        self.comm = comm.Dup()
        self.rank, self.ranks = self.comm.Get_rank(), self.comm.Get_size()

    def all_gather(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return every rank's array, [ranks, *values.shape]."""
        own = np.ascontiguousarray(values)
        found = np.empty((self.ranks, *own.shape), own.dtype)
        self.comm.Allgather(own, found)
        return found

    def _exchange(self, values: NDArray[Any], length_PP: NDArray[np.int64]) -> NDArray[Any]:
        send_P, recv_P = length_PP[self.rank].tolist(), length_PP[:, self.rank].tolist()
        found = np.empty(sum(recv_P), values.dtype)
        self.comm.Alltoallv([values, send_P], [found, recv_P])
        return found


def named(ranks: Sequence[int], one: str, many: str, *, most: int | None = None) -> str:
    """Name ranks, with the verb that follows.

    Example: [3] is "rank 3 is", and [0, 1, 2] with most=2 "ranks 0, 1 and 1 more are".
    """
    if len(ranks) == 1:
        return f"rank {ranks[0]} {one}"
    shown = ranks[:most]
    more = f" and {len(ranks) - len(shown)} more" if len(ranks) > len(shown) else ""
    return f"ranks {', '.join(map(str, shown))}{more} {many}"


def odd_ones(values: list[Any], has: str = "has", have: str = "have", *, first: int = 0) -> str:
    """Name the ranks that have another value than most: "rank 3 has 5, the other 7 have 4".

    Args:
        first: rank of the first value; the others follow it.
    """
    (common, count), *others = Counter(values).most_common()
    odd = [rank for rank, value in enumerate(values, first) if value != common]
    if not odd:
        return f"all {count} ranks {have} {common}"
    if others and others[0][1] == count:  # no majority
        return ", ".join(f"rank {rank} {has} {value}" for rank, value in enumerate(values, first))
    named = ", ".join(f"rank {rank} {has} {values[rank - first]}" for rank in odd[:4])
    more = f" and {len(odd) - 4} more ranks differ" if len(odd) > 4 else ""
    return f"{named}{more}, the other {count} {have} {common}"
