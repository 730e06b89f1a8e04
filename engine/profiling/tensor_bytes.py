"""Bytes of tensors that a process holds, from the events of PyTorch's profiler, and of the plans that it holds.

PyTorch's allocator reports every block of CPU memory to the profiler, also those inside operators. `peaks` replays
these events. Blocks that were there before are taken from `storages`, which finds all tensors of the process. Memory of
numpy arrays is not among them: plans are counted when they are made.
"""

import gc
import weakref
from collections.abc import Collection, Iterable, Mapping
from threading import Lock
from typing import Any, NamedTuple

from torch import Tensor
from torch._C._profiler import _EventType

from foreroute.engine.data.loader import Batches
from foreroute.engine.data.planned_batches import PlannedBatch
from foreroute.engine.nested import tensors_in


class Block(NamedTuple):
    """An allocation, or the end of one."""

    time_ns: int
    address: int
    bytes: int  # negative for a free
    mark: str  # the marked ranges in which it was made, from the outermost: "step 5/forward"; empty: none


def blocks(found: Any, marks: Collection[str]) -> list[Block]:
    """List every allocation and free of a profile, in the order of time.

    Args:
        found: a torch.profiler.profile with profile_memory that has ended.
        marks: names of ranges that mark, of torch.profiler.record_function.
    """
    events: list[Block] = []
    left = [(node, "") for node in found.profiler.kineto_results.experimental_event_tree()]
    while left:
        node, mark = left.pop()
        if node.tag == _EventType.Allocation:
            block = node.extra_fields
            events.append(Block(node.start_time_ns, block.ptr, block.alloc_size, mark))
        else:
            if node.name in marks:
                mark = f"{mark}/{node.name}" if mark else node.name
            left += [(child, mark) for child in node.children]
    return sorted(events, key=lambda block: block[:3])


def peaks(found: Iterable[Block], before: Mapping[int, int] | None = None) -> dict[str, int]:
    """Return the largest number of bytes held in each mark. PyTorch reports no free of a block that was there before.

    Example: blocks of 4 bytes at a time in "a", then one of 3 in "b" beside it: {"a": 4, "b": 7}.

    Args:
        before: bytes of the blocks that were there before and stayed until the first mark, by address.
    """
    alive = dict(before or {})
    held, most = sum(alive.values()), dict[str, int]()
    for block in found:
        held -= alive.pop(block.address, 0)
        if block.bytes > 0:
            alive[block.address] = block.bytes
            held += block.bytes
        if block.mark:
            most[block.mark] = max(most.get(block.mark, 0), held)
    return most


def storages() -> dict[int, int]:
    """Return the bytes of each block of CPU memory that PyTorch allocated and a tensor of this process uses, by
    address.

    Tensors on numpy arrays or files are left out, and tensors that gc.freeze has set aside. Other threads must be idle
    (PlanBytes.planning): CPython's tuple(generator) raises SystemError where gc.get_objects sees the unfinished tuple.
    """
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if not issubclass(type(thing), Tensor):
            continue
        both = [thing, thing.grad] if thing.is_leaf else [thing]
        for tensor in both:
            if tensor is None or tensor.device.type != "cpu":
                continue
            storage = tensor.untyped_storage()
            if storage.resizable() and storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
    return found


class PlanBytes:
    """Counts the bytes of live plans.

    `planning` is held while a plan is made.
    """

    def __init__(self) -> None:
        self.planning = Lock()
        self.peak_bytes = self._held = 0
        self._addresses: dict[int, list[int]] = {}  # of the live plans' tensors, by number of the batch
        self._batches = 0

    def add(self, planned: PlannedBatch) -> None:
        """Count a batch's plans until they are freed."""
        plans = planned.routing.plans
        assert plans is not None
        of_tables = planned.routing.row_plans, planned.routing.landed_BQH
        found = list(tensors_in((plans, *of_tables)))
        if not found:  # a dense run without tables
            return
        held, number = sum(tensor.nbytes for tensor in found), self._batches
        self._batches += 1
        self._addresses[number] = [tensor.untyped_storage().data_ptr() for tensor in found]
        self._held += held
        self.peak_bytes = max(self.peak_bytes, self._held)
        weakref.finalize(plans[0].count_E if plans else found[0], self._drop, number, held)

    def restart(self) -> None:
        """Begin a new peak."""
        self.peak_bytes = self._held

    def addresses(self) -> set[int]:
        """Return where the tensors of live plans lie."""
        return {address for own in list(self._addresses.values()) for address in own}

    def _drop(self, number: int, held: int) -> None:
        self._held -= held
        del self._addresses[number]


class CountedBatches(NamedTuple):
    """Batches whose plans are counted."""

    batches: Batches
    plans: PlanBytes

    def planned(self, step: int, micro: int) -> PlannedBatch:
        """Return a micro-batch with its plans."""
        with self.plans.planning:
            found = self.batches.planned(step, micro)
            self.plans.add(found)
        return found
