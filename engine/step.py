"""One optimizer step: forward and backward of each micro-batch, then the update. Everything that takes time is timed.

Routing is already planned when a batch arrives (engine/loader.py); memory goes in and comes out.
"""

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from engine.certificate.check import Check
from engine.config import Config
from engine.deepspeed_adapter import Engine
from engine.errors import RunFailed, everywhere
from engine.loader import PlannedBatch, PlannedLoader
from engine.model import Memory, Output, Routing
from engine.optim import learning_rate
from engine.parallel.world import World
from engine.timing import ForwardTimes, OwnTime


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
    exchange_exposed_ms: float = 0.0  # part of forward_ms and backward_ms
    exchange_hidden_ms: float = 0.0  # beside computation
    own_ms: float = 0.0  # part of forward_ms: not waiting for other ranks

    @property
    def outside_ms(self) -> float:
        """Time of the loop itself, waiting for plans included."""
        return self.step_ms - self.forward_ms - self.backward_ms - self.optimizer_ms


@dataclass(slots=True)
class StepResult:
    """What one step gives; the same on every rank but for the times."""

    loss: float  # mean nats per symbol over micro-batches and ranks, without auxiliary losses
    auxiliary_loss: float
    k: int
    learning_rate: float
    grad_norm: float
    load_max_over_mean: (
        float  # busiest expert of any layer against the mean; 1 is perfect, 0 for dense
    )
    wire_bytes: int = 0  # rows that left any rank
    stop_asked: bool = False  # of any rank
    own_ms_P: list[float] = field(default_factory=list)  # what was passed in, of all ranks
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
    world: World | None = None,
    stop_asked: bool = False,
    check: Check | None = None,
    own_ms: float = 0.0,
) -> StepResult:
    """Run one optimizer step and replace each micro-batch's entry of `memory` by its new memory.

    Args:
        check: what the step is held to.
        stop_asked, own_ms: of this rank; all ranks learn of them. own_ms is StepTimes.own_ms of the step before.

    Raises:
        RunFailed: the loss or the gradient is not finite, or the step differs from its certificate; no weight has been
            changed by this step.
    """
    world = world or World()
    clock, times, own = Clock(), StepTimes(), OwnTime(engine.device, engine.wire)
    rate = learning_rate(config.optim, step, config.train.steps)
    engine.set_lr(rate)
    outputs: list[Output] = []
    wire = engine.wire
    sent_before = wire.sent_bytes if wire else 0
    for micro in range(config.train.accumulation):
        planned, wait_seconds = loader.next()
        times.plan_wait_ms += 1e3 * wait_seconds
        clock.lap_ms()
        with own.forward(), check.forward() if check else nullcontext():
            output = _forward(engine, planned, memory[micro], config, step)
        times.forward_ms += clock.lap_ms()
        attention_ms, experts_ms = forward_times.take()
        times.attention_ms += attention_ms
        times.experts_ms += experts_ms
        clock.lap_ms()
        engine.backward(output.loss)
        times.backward_ms += clock.lap_ms()
        forward_times.take()  # with recomputation, backward runs the modules again
        memory[micro] = output.memory
        outputs.append(output)
    if check is not None:
        check.compare(step)
    sent = wire.sent_bytes - sent_before if wire else 0
    totals = _totals(outputs, world, [stop_asked, sent], own_ms)
    if not math.isfinite(totals.loss + totals.auxiliary_loss):
        raise everywhere(
            RunFailed(f"the loss is {totals.loss + totals.auxiliary_loss} at step {step}")
        )
    clock.lap_ms()
    applied = engine.step()
    times.optimizer_ms = clock.lap_ms()
    if not applied:
        raise everywhere(RunFailed(f"the gradient norm is {engine.grad_norm()} at step {step}"))
    result = StepResult(
        loss=totals.loss,
        auxiliary_loss=totals.auxiliary_loss,
        k=planned.k,
        learning_rate=rate,
        grad_norm=engine.grad_norm(),
        load_max_over_mean=totals.load_max_over_mean,
        wire_bytes=totals.wire_bytes,
        stop_asked=totals.stop_asked,
        own_ms_P=totals.own_ms_P,
        times=times,
    )
    times.own_ms = own.total_ms()
    if wire is not None:
        times.exchange_exposed_ms, times.exchange_hidden_ms = wire.take_times()
    times.step_ms = clock.total_ms()
    return result


def _forward(
    engine: Engine, planned: PlannedBatch, memory: Memory | None, config: Config, step: int
) -> Output:
    batch = planned.batch
    routing = Routing(
        planned.k,
        planned.plans,
        token_T=planned.token_T,
        dropout_seed=config.train.seed * 2**32 + step,
        second_plans=planned.second_plans,
        input_row_tBQ=planned.input_row_tBQ,
    )
    output: Output = engine.forward(
        batch.ids_BQ, batch.targets_BQ, None if batch.fresh else memory, routing
    )
    return output


class _Totals(NamedTuple):
    loss: float
    auxiliary_loss: float
    stop_asked: bool
    wire_bytes: int
    load_max_over_mean: float
    own_ms_P: list[float]


def _totals(
    outputs: list[Output], world: World, stop_and_sent_bytes: list[float], own_ms: float
) -> _Totals:
    """Means over micro-batches and ranks: one sum over the ranks, and the only read-back of a step from the device."""
    mesh = world.mesh
    nll = torch.stack([output.nll_BQ.mean() for output in outputs]).double().sum()
    auxiliary = torch.stack([output.auxiliary_loss for output in outputs]).double().sum()
    counts = [output.count_LE for output in outputs if output.count_LE is not None]
    own_P = [own_ms if rank == mesh.rank else 0.0 for rank in range(mesh.world)]
    own = torch.tensor([*stop_and_sent_bytes, *own_P], dtype=torch.float64, device=nll.device)
    parts = [torch.stack((nll, auxiliary)), own]
    if counts:
        parts.append(torch.stack(counts).sum(0).to(nll.device, torch.float64).flatten())
    loss, auxiliary_loss, stops, wire_bytes, *rest = world.sum(torch.cat(parts)).tolist()
    own_ms_P, load = rest[: mesh.world], rest[mesh.world :]
    number = len(outputs) * mesh.world
    return _Totals(
        loss / number,
        auxiliary_loss / number,
        stops > 0,
        int(wire_bytes),
        max(load) * len(load) / sum(load) if load else 0.0,
        own_ms_P,
    )
