"""The background planner: batches with their plans, ready before the step asks for them.

One thread prepares every (step, micro-batch) in order, `prefetch` steps ahead of the step. A planned batch is a pure
function of (step, micro-batch, tables, k), so the thread cannot change a run's numbers, and planning inline
(`plan_batch`, as evaluation does) returns the same tensors.

With many ranks the thread also talks to the other ranks' loaders, over connections of its own and in the order of the
steps. It asks for the peers' ids where this rank does not read them (`share_ids`). Before a plan may be used, it
compares the ranks' plans (engine/data/plan_agreement.py). How far ahead it works depends only on the batches taken, so
when a run stops, all ranks' threads stop after the same micro-batch and none waits for another.

Letters: P ranks of the expert group, B streams, Q segment length, C ids left of a segment.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Protocol

import torch

from foreroute.engine.data.device_copy import Delivery, receive
from foreroute.engine.data.plan_agreement import Agreement
from foreroute.engine.data.planned_batches import PlannedBatch
from foreroute.engine.routing.plan import Routing
from foreroute.engine.tracing import span

# The fields of a planned batch that the step needs on the device.
_MOVED = "batch", "routing"
_CLOSE_S = 10.0  # how long `close` waits for the other ranks' threads


class Batches(Protocol):
    """Reads and plans batches, as TrainingBatches does (engine/data/planned_batches.py)."""

    def planned(self, step: int, micro: int) -> PlannedBatch:
        """Return a micro-batch with its plans."""
        ...


class PlannedLoader:
    """Prepares planned batches in a daemon thread, from construction until `close` (or the last step).

    Args:
        batches: used in the thread only.
        steps: the steps to prepare, in order, such as range(first, total).
        accumulation: micro-batches per step.
        prefetch: steps prepared ahead, at least 1.
        agreement: compares the plans between the ranks; None on one rank.
        device: of the tensors that `next` returns.
        ahead: fetches what a step needs before it begins, such as rows from host memory.
    """

    def __init__(
        self,
        batches: Batches,
        *,
        steps: Iterable[int],
        accumulation: int,
        prefetch: int,
        agreement: Agreement | None = None,
        device: torch.device | None = None,
        ahead: Callable[[Routing], Routing] | None = None,
    ) -> None:
        self._ahead = ahead or (lambda routing: routing)
        self._batches, self._steps, self._accumulation = batches, steps, accumulation
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

        With other ranks it first prepares the batches that were still allowed, since they may wait for these. If they
        no longer answer, the thread is abandoned.
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
                    planned = self._batches.planned(step, micro)
                planned = replace(planned, prepare_ms=1e3 * (time.perf_counter() - start))
                if self._agreement is not None:
                    routing = planned.routing
                    with span("agree"):
                        self._agreement.check(step, micro, routing.k, planned.group, routing.all_plans)
                self._queue.put(self._deliver(replace(planned, routing=self._ahead(planned.routing))))
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
