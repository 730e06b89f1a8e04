"""The background planner: batches with their plans, ready before the step asks for them.

One thread prepares every (step, micro-batch) in order, `prefetch` steps ahead of the step. A planned batch is a pure
function of (step, micro-batch, tables, k), so the thread cannot change a run's numbers, and planning inline
(`plan_batch`, as evaluation does) gives the same tensors.

With many ranks the thread is also the one that talks to the other ranks' loaders, over connections of its own and in the
order of the steps: it asks for the peers' ids where this rank does not read them (`share_ids`), and before a plan may be
used it compares what the ranks planned (engine/agreement.py). How far ahead it works depends on what was taken alone, so
when a run stops, all ranks' threads stop behind the same micro-batch and none waits for another.

Letters: P ranks of the expert group, B streams, Q segment length, C ids left of a segment.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from engine.agreement import Agreement
from engine.data import Batch
from engine.delivery import Delivery, receive
from engine.moe.keys import KeyRows
from engine.moe.plan import Plan
from engine.moe.routers import Draw, PlannedRouter
from engine.parallel.host import Host
from engine.tracing import span

# Of a planned batch, what the step needs on the device.
_MOVED = "batch", "plans", "second_plans", "input_row_tBQ", "token_T"
_CLOSE_S = 10.0  # how long `close` waits for the other ranks' threads


@dataclass(frozen=True, slots=True)
class GroupBatch:
    """A rank's own batch, and of the whole expert group what planning needs, rank by rank."""

    own: Batch
    ids_PBQ: Tensor  # int64
    left_PBC: Tensor  # int64
    stream_PB: Tensor  # int64: global stream of each row


@dataclass(frozen=True, slots=True)
class PlannedBatch:
    """A batch and everything its forward pass needs to know about routing."""

    group: GroupBatch  # on the host
    batch: Batch  # this rank's own
    k: int  # active experts
    plans: tuple[Plan, ...] | None  # one per table; None for live routers and dense
    second_plans: tuple[Plan, ...] | None  # of a second pass over the batch; None without one
    input_row_tBQ: Tensor | None  # int64: this rank's rows of tables at the input; None: no tables
    token_T: Tensor  # int64: numbers of the group's tokens within the step: stream x Q + place in the segment
    copied: torch.cuda.Event | None = None  # of the copy to a GPU
    prepare_ms: float = field(default=0.0, compare=False)
    """What the loader's thread needed to read and plan it."""


def group_batch(batches: Sequence[Batch], own: int = 0) -> GroupBatch:
    """Put the batches of an expert group together; `own` is this rank's number in it."""
    return GroupBatch(
        batches[own],
        torch.stack([batch.ids_BQ for batch in batches]),
        torch.stack([batch.left_BC for batch in batches]),
        torch.stack([batch.stream_B for batch in batches]),
    )


def share_ids(alone: GroupBatch, host: Host) -> GroupBatch:
    """Fill in what the other ranks of the expert group read: one exchange of ids, left contexts and stream numbers."""
    own = alone.own
    parts = [own.left_BC, own.ids_BQ, own.stream_B[:, None]]
    found = torch.from_numpy(host.all_gather(torch.cat(parts, dim=1).numpy().astype(np.int32)))
    context, segment = own.left_BC.shape[1], own.ids_BQ.shape[1]
    left_PBC, ids_PBQ, stream_PB1 = found.long().split([context, segment, 1], dim=2)
    return GroupBatch(own, ids_PBQ.contiguous(), left_PBC.contiguous(), stream_PB1[..., 0])


def plan_batch(
    group: GroupBatch,
    k: int,
    routers: Sequence[PlannedRouter] | None,
    *,
    gather: bool = False,
    chunks: int = 1,
    passes: int = 1,
    held_out: bool = False,
    input_keys: Sequence[KeyRows] = (),
) -> PlannedBatch:
    """Plan the batch for each router; without routers, pass it on with its k.

    Args:
        gather: for the exchange of all rows (engine/moe/auto.py says when).
        chunks: parts that are exchanged one behind the other.
        passes: over the batch, 1 or 2, each with plans of its own.
        held_out: the batch is not trained on; what is drawn then depends on batch.index and streams alone.
        input_keys: of the tables at the input of the model (TransformerXL.input_keys).
    """
    segment = group.ids_PBQ.shape[2]
    token_PT = (group.stream_PB[..., None] * segment + torch.arange(segment)).flatten(1)
    draw = Draw(token_PT.numpy(), group.own.index, held_out)

    def plans(number: int) -> tuple[Plan, ...] | None:
        if routers is None or number >= passes:
            return None
        this = replace(draw, number=number)
        return tuple(
            router.plan(group.ids_PBQ, group.left_PBC, k, draw=this, gather=gather, chunks=chunks)
            for router in routers
        )

    row_tBQ = [keys.of(group.own.ids_BQ, group.own.left_BC) for keys in input_keys]
    return PlannedBatch(
        group, group.own, k,
        plans=plans(0),
        second_plans=plans(1),
        input_row_tBQ=torch.stack(row_tBQ) if row_tBQ else None,
        token_T=token_PT.flatten(),
    )  # fmt: skip


class PlannedLoader:
    """Prepares planned batches in a daemon thread, from construction until `close` (or the last step).

    Args:
        make_batch: (step, micro) -> GroupBatch; called in the thread only.
        plan: (GroupBatch, k) -> PlannedBatch, such as plan_batch with its routers; called in the thread only.
        k_of_step: active experts at a step.
        steps: the steps to prepare, such as range(first, total).
        accumulation: micro-batches per step.
        prefetch: steps prepared ahead, at least 1.
        agreement: compares the plans between the ranks; None on one rank.
        device: where `next` gives tensors.
    """

    def __init__(
        self,
        make_batch: Callable[[int, int], GroupBatch],
        plan: Callable[[GroupBatch, int], PlannedBatch],
        k_of_step: Callable[[int], int],
        *,
        steps: range,
        accumulation: int,
        prefetch: int,
        agreement: Agreement | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._make_batch, self._plan, self._k_of_step = make_batch, plan, k_of_step
        self._steps, self._accumulation = steps, accumulation
        self._agreement = agreement
        self._delivery = Delivery(device or torch.device("cpu"))
        self._queue: queue.Queue[PlannedBatch | BaseException] = queue.Queue()
        self._change = threading.Condition()
        self._allowed = prefetch * accumulation  # micro-batches that may be prepared so far
        self._closed = False
        self._end: BaseException | None = None
        self._worker = threading.Thread(target=self._work, name="foreroute-planner", daemon=True)
        self._worker.start()

    def next(self) -> tuple[PlannedBatch, float]:
        """Return the next micro-batch in order, and the seconds spent waiting for it.

        Raises:
            RuntimeError: all steps are done, or the loader is closed.
            BaseException: whatever the worker raised, with its traceback; again at each later call.
        """
        if self._end is not None:
            raise self._end
        start = time.perf_counter()
        item = self._queue.get()
        with self._change:
            self._allowed += 1
            self._change.notify()
        if isinstance(item, BaseException):
            self._end = item
            raise item
        receive(tuple(getattr(item, name) for name in _MOVED), item.copied)
        return item, time.perf_counter() - start

    def close(self) -> None:
        """End the worker and drop what was prepared; may be called twice.

        With other ranks it first prepares what was still allowed, which they may wait for; if they do not answer any
        more it is left behind.
        """
        with self._change:
            self._closed = True
            self._change.notify()
        self._worker.join(None if self._agreement is None else _CLOSE_S)
        self._end = self._end or RuntimeError("the loader is closed")

    def _work(self) -> None:
        try:
            places = ((step, micro) for step in self._steps for micro in range(self._accumulation))
            for done, (step, micro) in enumerate(places):
                if not self._may_prepare(done):
                    return
                start = time.perf_counter()
                with span("plan"):
                    planned = self._plan(self._make_batch(step, micro), self._k_of_step(step))
                planned = replace(planned, prepare_ms=1e3 * (time.perf_counter() - start))
                if self._agreement is not None:
                    plans = (planned.plans or ()) + (planned.second_plans or ())
                    with span("agree"):
                        self._agreement.check(step, micro, planned.k, planned.group, plans)
                self._queue.put(self._deliver(planned))
            self._queue.put(RuntimeError("no batch left: all steps are done"))
        except BaseException as error:  # handed to the consumer, which re-raises it
            self._queue.put(error)

    def _deliver(self, planned: PlannedBatch) -> PlannedBatch:
        moved = tuple(getattr(planned, name) for name in _MOVED)
        sent, copied = self._delivery.send(moved)
        return replace(planned, **dict(zip(_MOVED, sent, strict=True)), copied=copied)

    def _may_prepare(self, done: int) -> bool:
        """Wait until one more than `done` micro-batches are allowed; False when closed."""
        with self._change:
            self._change.wait_for(lambda: self._closed or done < self._allowed)
            waited_for = self._agreement is not None and done < self._allowed
            return waited_for or not self._closed
