"""The collectives that move rows between ranks, and a count of the bytes that this rank sends.

Splits come from the Plan and are known on the host: no rank asks another for sizes, and nothing is read back from a
device. A rank's own rows stay on it and do not count. Every collective is issued at once and returned as an
AsyncCollective (engine/parallel/in_flight.py), whose result may be used after `wait`.

Letters: P ranks of the group, D columns.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from foreroute.engine.parallel.in_flight import (
    AsyncCollective,
    CpuCollective,
    CudaStreams,
    DeviceLog,
    ExchangeTimes,
    GpuCollective,
    HostLog,
    SummedCollective,
)


class ExpertGroupComm:
    """Communicator of one process group, mostly an expert group, with counts of its bytes and times."""

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        ops: Any = dist,
        device: torch.device | str = "cpu",
        *,
        timed: bool = True,
    ) -> None:
        """Use a group and a module with the collectives of torch.distributed, or with functions of the same names.

        Args:
            group: None for all ranks.
            device: of the rows; on a GPU packing and collectives get streams of their own.
            timed: keep times until take_log or take_times is called, which must happen.
        """
        self.group, self._ops = group, ops
        self.rank, self.ranks = ops.get_rank(group), ops.get_world_size(group)
        self.sent_bytes_P = [0] * self.ranks  # since construction, by destination
        self.collectives = 0  # issued since construction
        self._timed = timed
        self._streams: CudaStreams | None = None
        self._log: HostLog | DeviceLog = HostLog()
        if torch.device(device).type == "cuda":
            self._streams = CudaStreams(torch.cuda.Stream(device), torch.cuda.Stream(device))
            self._log = DeviceLog()

    @property
    def sent_bytes(self) -> int:
        """Bytes that this rank has sent since construction."""
        return sum(self.sent_bytes_P)

    def take_log(self) -> HostLog | DeviceLog:
        """Return the log of the collectives since the last call, and begin another; does not wait.

        Collectives in torch.inference_mode are not logged.
        """
        log, self._log = self._log, type(self._log)()
        return log

    def take_times(self) -> ExchangeTimes:
        """Return exposed and hidden time since the last call (engine/parallel/in_flight.py); waits for a GPU."""
        return self.take_log().take()

    def mark(self) -> float:
        """Return the present position in the log, for its exposed_ms."""
        return self._log.mark()

    @contextlib.contextmanager
    def aside(self, *tensors: Tensor) -> Iterator[None]:
        """On a GPU, put work on these tensors and the collective that follows beside the computation."""
        if self._streams is None:
            yield
            return
        side = self._streams.side
        side.wait_stream(torch.cuda.current_stream())
        for tensor in tensors:
            tensor.record_stream(side)
        with torch.cuda.stream(side):
            yield

    def all_to_all(self, rows: Tensor, splits: tuple[int, ...], got_splits: tuple[int, ...]) -> AsyncCollective:
        """Send rows[splits[0] + .. + splits[q-1] :][: splits[q]] to rank q; return the received rows, rank by rank.

        Expert group; [sum(splits), D] to [sum(got_splits), D]; sends: rows to other ranks x D x item bytes. No sync
        with the host.
        """
        got = rows.new_empty(sum(got_splits), rows.shape[1])
        self._count(rows, splits)
        return self._issue(self._ops.all_to_all_single, got, rows, list(got_splits), list(splits))

    def all_gather(self, rows: Tensor) -> AsyncCollective:
        """Return the rows of all ranks, rank by rank: [T, D] to [P * T, D]; sends: (P - 1) x T x D x item bytes."""
        got = rows.new_empty(self.ranks * rows.shape[0], rows.shape[1])
        self._count(rows, [rows.shape[0]] * self.ranks)
        return self._issue(self._ops.all_gather_into_tensor, got, rows)

    def reduce_scatter(self, rows: Tensor) -> AsyncCollective:
        """Add up the ranks' rows and return this rank's part: [P * T, D] to [T, D]; sends (P - 1) x T x D x item bytes.

        On a CPU it is an all-to-all, added up here in rank order and fp32: gloo's own reduce-scatter is an all-reduce
        of twice the bytes (measured).
        """
        got = rows.new_empty(rows.shape[0] // self.ranks, rows.shape[1])
        self._count(rows, [got.shape[0]] * self.ranks)
        if self._streams is not None:
            return self._issue(self._ops.reduce_scatter_tensor, got, rows)
        parts = self._issue(self._ops.all_to_all_single, torch.empty_like(rows), rows)
        return SummedCollective(parts, self.ranks)

    def all_reduce(self, values: Tensor) -> Tensor:
        """Add up the ranks' values, of any shape; sends about 2 (P - 1) / P x item bytes each, counted as a ring to the
        next rank."""
        total = values.clone()
        self.collectives += 1
        self.sent_bytes_P[(self.rank + 1) % self.ranks] += (
            2 * (self.ranks - 1) * values.numel() * values.element_size() // self.ranks
        )
        self._ops.all_reduce(total, group=self.group)
        return total

    def _count(self, rows: Tensor, num_rows_P: Sequence[int]) -> None:
        self.collectives += 1
        row_bytes = rows.shape[1] * rows.element_size()
        for rank, num_rows in enumerate(num_rows_P):
            if rank != self.rank:
                self.sent_bytes_P[rank] += num_rows * row_bytes

    def _issue(self, collective: Callable[..., Any], got: Tensor, rows: Tensor, *splits: list[int]) -> AsyncCollective:
        # Nobody takes the times of an evaluation: its logs would only grow.
        taken = self._timed and not torch.is_inference_mode_enabled()
        log = self._log if taken else type(self._log)()
        if self._streams is None:
            assert isinstance(log, HostLog)
            issued = time.perf_counter()
            work = collective(got, rows, *splits, group=self.group, async_op=True)
            return CpuCollective(work, got, log, issued)
        assert isinstance(log, DeviceLog)
        issue = torch.cuda.Event(enable_timing=True)
        issue.record()
        work = collective(got, rows, *splits, group=self.group, async_op=True)
        return GpuCollective(work, got, rows, log, self._streams, issue)


def all_reduce_sum(value: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return the sum of the ranks' values; without process groups that of one rank.

    Any group, all ranks by default; sends about 2 x value's bytes; no sync with the host."""
    total = value.clone()
    if dist.is_initialized():
        dist.all_reduce(total, group=group)
    return total
