"""A meter in the place of torch.distributed's collectives: a step's bytes, its computation alone, its exchange alone.

Ours and DeepSpeed's layers all end in torch.distributed.all_to_all_single and all_reduce, so one meter measures them
alike. `Meter.on` installs it. It counts the bytes that leave this rank, and those that leave its node. It remembers the
calls of a step, which can then be repeated in two ways:

* muted: the step runs, but nothing is sent. Rows arrive as zeros, numbers (counts, capacities) as they arrived before.
The computation is left. * replayed: only the calls are made, one after the other, with other contents. The exchange is
left.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

KINDS = "step", "compute", "exchange"


@dataclass(frozen=True, slots=True)
class Call:
    """One collective of a step."""

    got: Tensor  # of the result's shape, to be overwritten
    sent: Tensor | None  # of the sent shape; None for an all_reduce
    result: Tensor | None  # of whole numbers; None for rows
    splits: tuple[list[int] | None, list[int] | None]  # received, sent
    options: dict[str, Any]


@dataclass(slots=True)
class Traffic:
    """The bytes that left this rank in one step."""

    left_bytes: int = 0
    crossed_bytes: int = 0  # of them to ranks of other nodes
    calls: list[Call] = field(default_factory=list)


class _Done:
    """The handle of a collective that was never started."""

    def __init__(self, got: Tensor) -> None:
        self.future: torch.futures.Future[list[Tensor]] = torch.futures.Future()
        self.future.set_result([got])

    def wait(self) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def get_future(self) -> "torch.futures.Future[list[Tensor]]":
        return self.future


class Meter:
    """Stands in for the collectives of a world whose node n has ranks n * per_node and following."""

    def __init__(self, per_node: int) -> None:
        rank, world = dist.get_rank(), dist.get_world_size()
        self.rank = rank
        self.elsewhere = [other // per_node != rank // per_node for other in range(world)]
        self.traffic = Traffic()
        self._muted: Iterator[Call] | None = None
        self._record = False
        self._all_to_all, self._all_reduce = dist.all_to_all_single, dist.all_reduce

    @contextmanager
    def on(self, *, record: bool = False, muted: Sequence[Call] | None = None) -> Iterator[Traffic]:
        """Count the collectives of the block.

        Args:
            record: keep the calls, which costs memory and time.
            muted: the calls of an earlier run of the same step, which stand in for all sending.
        """
        self.traffic, self._record = Traffic(), record
        self._muted = None if muted is None else iter(muted)
        dist.all_to_all_single, dist.all_reduce = self.all_to_all_single, self.all_reduce
        try:
            yield self.traffic
        finally:
            dist.all_to_all_single, dist.all_reduce = self._all_to_all, self._all_reduce

    def kinds(self, case: Callable[[], object], calls: Sequence[Call]) -> tuple[Callable[[], object], ...]:
        """Return a case in three KINDS: the whole of it, counted; muted; and its calls alone."""

        def counted() -> None:
            with self.on():
                case()

        def muted() -> None:
            with self.on(muted=calls):
                case()

        return counted, muted, lambda: self.replay(calls)

    def replay(self, calls: Sequence[Call]) -> None:
        """Make the calls of a step one after the other."""
        for call in calls:
            if call.sent is None:
                self._all_reduce(call.got, **call.options)
            else:
                self._all_to_all(call.got, call.sent, *call.splits, **call.options)

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_split_sizes: list[int] | None = None,
        input_split_sizes: list[int] | None = None,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        """Count and, unless muted, call torch's."""
        splits = input_split_sizes or [input.shape[0] // len(self.elsewhere)] * len(self.elsewhere)
        row_bytes = input[:1].nbytes if input.shape[0] else 0
        left = [n * row_bytes for n in splits]
        left[self.rank] = 0
        self.traffic.left_bytes += sum(left)
        self.traffic.crossed_bytes += sum(n for n, far in zip(left, self.elsewhere, strict=True) if far)
        if self._muted is not None:
            return self._answer(output, async_op)
        both = output_split_sizes, input_split_sizes
        result = self._all_to_all(output, input, *both, group=group, async_op=async_op)
        if self._record:
            known = None if output.is_floating_point() else output.clone()
            empty = torch.zeros_like(output), torch.zeros_like(input)
            self.traffic.calls.append(Call(*empty, known, both, {"group": group}))
        return result

    def all_reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
        """Unless muted, call torch's; the few bytes of a capacity are not counted."""
        if self._muted is not None:
            return self._answer(tensor, async_op)
        result = self._all_reduce(tensor, op=op, group=group, async_op=async_op)
        if self._record:
            options = {"op": op, "group": group}
            empty = torch.zeros_like(tensor)
            self.traffic.calls.append(Call(empty, None, tensor.clone(), (None, None), options))
        return result

    def _answer(self, output: Tensor, async_op: bool) -> _Done | None:
        assert self._muted is not None
        result = next(self._muted).result
        if result is None:
            output.zero_()
        else:
            output.copy_(result)
        return _Done(output) if async_op else None
