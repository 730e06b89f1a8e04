"""One optimizer step: forward and backward of each micro-batch, then the update.

Routing is already planned when a batch arrives (engine/data/loader.py); memory goes in and comes out. The host launches
work and never waits for a device: the device decides whether loss and gradient are finite, and the step's numbers
arrive later (StepsUnderWay). A meter (engine/metrics/step_meter.py) and observers are attached from outside.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Protocol

from foreroute.engine.config import OptimConfig, TrainConfig
from foreroute.engine.data.loader import PlannedLoader
from foreroute.engine.data.planned_batches import PlannedBatch
from foreroute.engine.errors import RunFailed, everywhere
from foreroute.engine.metrics.step_meter import StepMeter
from foreroute.engine.metrics.step_result import LaunchedStep, StepResult
from foreroute.engine.metrics.timers import StepTimer
from foreroute.engine.model.transformer_xl import Memory, Output
from foreroute.engine.moe.layer import update_routers
from foreroute.engine.optim.adam import learning_rate
from foreroute.engine.optim.deepspeed_engine import Engine


class Observer(Protocol):
    """Observes the steps of this rank."""

    def forward(self) -> AbstractContextManager[None]:
        """Observe the forward pass of the step's next micro-batch, which runs in the block."""

    def compare(self, step: int) -> None:
        """Check the step after its backward passes; an error leaves the weights unchanged."""


def train_step(
    engine: Engine,
    loader: PlannedLoader,
    memory: list[Memory | None],
    *,
    train: TrainConfig,
    optim: OptimConfig,
    step: int,
    meter: StepMeter,
    observers: Sequence[Observer] = (),
    stop_asked: bool = False,
    save_asked: bool = False,
) -> LaunchedStep:
    """Run one optimizer step and replace each micro-batch's entry of `memory` by its new memory.

    Where the loss or the gradient is not finite, no weight is changed.

    Args:
        stop_asked, save_asked: of this rank; all ranks learn of it.

    Raises:
        RunFailed: of an observer, before a weight is changed.
    """
    timer, outputs = meter.timer, list[Output]()
    rate = learning_rate(optim, step, train.steps)
    meter.begin()
    engine.set_lr(rate)
    for micro in range(train.accumulation):
        planned = _next(loader, timer)
        with timer.phase("forward"), ExitStack() as watched:
            for observer in observers:
                watched.enter_context(observer.forward())
            output = _forward(engine, planned, memory[micro])
        with timer.phase("backward"):
            engine.backward(output.loss)
        memory[micro] = output.memory
        outputs.append(output)
    for observer in observers:
        observer.compare(step)
    with timer.phase("totals"):
        total = meter.sum_over_ranks(outputs, stop_asked=stop_asked, save_asked=save_asked)
    with timer.phase("optimizer"):
        engine.step(unless=~total.is_finite)
        update_routers(engine.module, total.count_LE)
    return LaunchedStep(total, engine.grad_norm, timer.end(), step=step, k=planned.routing.k, learning_rate=rate)


class StepsUnderWay:
    """Launched steps whose numbers are not read yet: on a GPU the last one, on a CPU none.

    So a GPU computes a step while the host reads the one before it.
    """

    def __init__(self, *, on_gpu: bool) -> None:
        self._steps: deque[LaunchedStep] = deque()
        self._behind = int(on_gpu)

    def __len__(self) -> int:
        """Count the steps that are not read."""
        return len(self._steps)

    def add(self, launched: LaunchedStep) -> None:
        """Add a step that was just launched."""
        self._steps.append(launched)

    def arrived(self, *, all_of_them: bool = False) -> Iterator[LaunchedStep]:
        """Yield the steps that are due, in order, each when the device has finished it.

        Args:
            all_of_them: wait for the last one, too.
        """
        while len(self._steps) > (0 if all_of_them else self._behind):
            self._steps[0].wait()
            yield self._steps[0]
            self._steps.popleft()


def read(launched: LaunchedStep) -> StepResult:
    """Read the numbers of a step that has arrived.

    Raises:
        RunFailed: the loss or the gradient is not finite; the step changed no weight.
    """
    result = launched.read()
    loss = result.loss + result.auxiliary_loss
    if not math.isfinite(loss):
        raise everywhere(RunFailed(f"the loss is {loss} at step {launched.step}"))
    if not math.isfinite(result.grad_norm):
        raise everywhere(RunFailed(f"the gradient norm is {result.grad_norm} at step {launched.step}"))
    return result


def _next(loader: PlannedLoader, timer: StepTimer) -> PlannedBatch:
    with timer.phase("plan_wait"):
        planned, wait_seconds = loader.next()
    timer.host.plan_wait_ms += 1e3 * wait_seconds
    timer.host.data_ms += planned.prepare_ms
    return planned


def _forward(engine: Engine, planned: PlannedBatch, memory: Memory | None) -> Output:
    batch = planned.batch
    output: Output = engine.forward(batch.ids_BQ, batch.targets_BQ, None if batch.fresh else memory, planned.routing)
    return output
