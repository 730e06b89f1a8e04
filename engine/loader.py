"""The background planner: batches with their plans, ready before the step asks for them.

One worker thread prepares every (step, micro-batch) in order, `prefetch` steps ahead, into a bounded queue. It runs no
collective and draws from no generator: a planned batch is a pure function of (step, micro-batch, tables, k), so the
thread cannot change a run's numbers, and planning inline (`plan_batch`, as evaluation does) gives the same tensors.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.data import Batch
from engine.moe.plan import Plan
from engine.moe.routers import HashedRouter


@dataclass(frozen=True, slots=True)
class PlannedBatch:
    """A batch and everything its forward pass needs to know about routing."""

    batch: Batch
    k: int  # active experts
    plans: tuple[Plan, ...] | None  # one per table; None for live routers and dense


def plan_batch(batch: Batch, k: int, routers: Sequence[HashedRouter] | None) -> PlannedBatch:
    """Plan the batch for each router's table; without routers, pass it on with its k."""
    if routers is None:
        return PlannedBatch(batch, k, None)
    ids_PBQ, left_PBC = batch.ids_BQ[None], batch.left_BC[None]  # one rank so far
    return PlannedBatch(batch, k, tuple(router.plan(ids_PBQ, left_PBC, k) for router in routers))


class PlannedLoader:
    """Prepares planned batches in a daemon thread, from construction until `close` (or the last step).

    Args:
        make_batch: (step, micro) -> Batch; called in the worker thread only.
        routers: one per table; None for live routers and dense.
        k_of_step: active experts at a step.
        steps: the steps to prepare, such as range(first, total).
        accumulation: micro-batches per step.
        prefetch: steps prepared ahead, at least 1.
    """

    def __init__(
        self,
        make_batch: Callable[[int, int], Batch],
        routers: Sequence[HashedRouter] | None,
        k_of_step: Callable[[int], int],
        *,
        steps: range,
        accumulation: int,
        prefetch: int,
    ) -> None:
        self._make_batch = make_batch
        self._routers = routers
        self._k_of_step = k_of_step
        self._steps = steps
        self._accumulation = accumulation
        self._queue: queue.Queue[PlannedBatch | BaseException] = queue.Queue(
            prefetch * accumulation
        )
        self._closed = threading.Event()
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
        if isinstance(item, BaseException):
            self._end = item
            raise item
        return item, time.perf_counter() - start

    def close(self) -> None:
        """End the worker (after the micro-batch in its hands) and drop what was prepared; may be called twice."""
        self._closed.set()
        while (
            not self._queue.empty()
        ):  # makes room, so that a worker blocked in put() sees the flag
            self._queue.get_nowait()
        self._worker.join()
        self._end = self._end or RuntimeError("the loader is closed")

    def _work(self) -> None:
        try:
            for step in self._steps:
                k = self._k_of_step(step)
                for micro in range(self._accumulation):
                    batch = self._make_batch(step, micro)
                    planned = plan_batch(batch, k, self._routers)
                    if not self._put(planned):
                        return
            self._put(RuntimeError("no batch left: all steps are done"))
        except BaseException as error:  # handed to the consumer, which re-raises it
            self._put(error)

    def _put(self, item: PlannedBatch | BaseException) -> bool:
        """Wait for room and put; False when closed. At most one item follows `close`, into the room it made."""
        if not self._closed.is_set():
            self._queue.put(item)
        return not self._closed.is_set()
