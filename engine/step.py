"""One optimizer step: forward and backward of each micro-batch, then the update. Everything that takes time is timed.

Routing is already planned when a batch arrives (engine/loader.py); memory goes in and comes out.
"""

import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.config import Config
from engine.deepspeed_adapter import Engine
from engine.errors import RunFailed
from engine.loader import PlannedBatch, PlannedLoader
from engine.model import Memory, Output, Routing
from engine.optim import learning_rate
from engine.timing import ForwardTimes


@dataclass(slots=True)
class StepTimes:
    """Milliseconds of one step; `outside` of forward, backward and optimizer is step_ms minus these three."""

    step_ms: float = 0.0
    plan_wait_ms: float = 0.0
    forward_ms: float = 0.0
    attention_ms: float = 0.0  # part of forward_ms
    experts_ms: float = 0.0  # part of forward_ms
    backward_ms: float = 0.0
    optimizer_ms: float = 0.0

    @property
    def outside_ms(self) -> float:
        """Time of the loop itself, waiting for plans included."""
        return self.step_ms - self.forward_ms - self.backward_ms - self.optimizer_ms


@dataclass(slots=True)
class StepResult:
    """What one step gives."""

    loss: float  # mean nats per symbol over the micro-batches, without auxiliary losses
    auxiliary_loss: float
    k: int
    learning_rate: float
    grad_norm: float
    load_max_over_mean: (
        float  # busiest expert of any layer against the mean; 1 is perfect, 0 for dense
    )
    times: StepTimes = field(default_factory=StepTimes)


class Clock:
    """Adds the time since its last lap to a named entry of StepTimes."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()

    def lap_ms(self) -> float:
        """Milliseconds since the last lap."""
        now = time.perf_counter()
        elapsed, self.last = 1e3 * (now - self.last), now
        return elapsed

    def total_ms(self) -> float:
        """Milliseconds since construction."""
        return 1e3 * (time.perf_counter() - self.start)


def train_step(
    engine: Engine,
    loader: PlannedLoader,
    memory: list[Memory | None],
    config: Config,
    *,
    step: int,
    forward_times: ForwardTimes,
) -> StepResult:
    """Run one optimizer step and replace each micro-batch's entry of `memory` by its new memory.

    Raises:
        RunFailed: the loss or the gradient is not finite; no weight has been changed by this step.
    """
    clock, times = Clock(), StepTimes()
    rate = learning_rate(config.optim, step, config.train.steps)
    engine.set_lr(rate)
    losses, auxiliary, counts = [], [], []
    for micro in range(config.train.accumulation):
        planned, wait_seconds = loader.next()
        times.plan_wait_ms += 1e3 * wait_seconds
        clock.lap_ms()
        output = _forward(engine, planned, memory[micro], config, step)
        times.forward_ms += clock.lap_ms()
        attention_ms, experts_ms = forward_times.take()
        times.attention_ms += attention_ms
        times.experts_ms += experts_ms
        losses.append(_finite(output, step))
        auxiliary.append(output.auxiliary_loss.item())
        clock.lap_ms()
        engine.backward(output.loss)
        times.backward_ms += clock.lap_ms()
        forward_times.take()  # with recomputation, backward runs the modules again
        memory[micro] = output.memory
        counts.append(output.count_LE)
    clock.lap_ms()
    applied = engine.step()
    times.optimizer_ms = clock.lap_ms()
    if not applied:
        raise RunFailed(f"the gradient norm is {engine.grad_norm()} at step {step}")
    result = StepResult(
        loss=sum(losses) / len(losses),
        auxiliary_loss=sum(auxiliary) / len(auxiliary),
        k=planned.k,
        learning_rate=rate,
        grad_norm=engine.grad_norm(),
        load_max_over_mean=_load(counts),
        times=times,
    )
    times.step_ms = clock.total_ms()
    return result


def _forward(
    engine: Engine, planned: PlannedBatch, memory: Memory | None, config: Config, step: int
) -> Output:
    batch = planned.batch
    segment = config.data.segment
    token_BQ = batch.stream_B[:, None] * segment + torch.arange(segment)
    routing = Routing(
        planned.k,
        planned.plans,
        token_T=token_BQ.flatten(),
        dropout_seed=config.train.seed * 2**32 + step,
    )
    output: Output = engine.forward(
        batch.ids_BQ, batch.targets_BQ, None if batch.fresh else memory, routing
    )
    return output


def _finite(output: Output, step: int) -> float:
    """Mean nats of the micro-batch; reads the loss back from the device."""
    loss = output.nll_BQ.mean().item()
    if not math.isfinite(loss) or not math.isfinite(output.loss.item()):
        raise RunFailed(f"the loss is {loss} at step {step}")
    return loss


def _load(counts: list[Tensor | None]) -> float:
    present = [count_LE for count_LE in counts if count_LE is not None]
    if not present:
        return 0.0
    total_LE = torch.stack(present).sum(0).double()
    return (total_LE.max() / total_LE.mean()).item()
