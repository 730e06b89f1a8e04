"""One optimizer step: forward and backward of each micro-batch, then the update. Everything that takes time is timed.

Routing is already planned when a batch arrives (engine/data/loader.py); memory goes in and comes out.
"""

import math
import time
from contextlib import nullcontext

import torch

from foreroute.engine.certificate.check import Check
from foreroute.engine.config import Config
from foreroute.engine.data.loader import PlannedLoader
from foreroute.engine.data.planned_batches import PlannedBatch
from foreroute.engine.errors import RunFailed, everywhere
from foreroute.engine.metrics.host_memory import memory_bytes
from foreroute.engine.metrics.rank_sums import RankRow, add_up, block_of
from foreroute.engine.metrics.step_result import StepResult, StepTimes
from foreroute.engine.metrics.timers import ForwardTimes, OwnTime
from foreroute.engine.model.transformer_xl import Memory, Output
from foreroute.engine.optim.adam import learning_rate
from foreroute.engine.optim.deepspeed_engine import Engine
from foreroute.engine.parallel.world import World
from foreroute.engine.tracing import span


class Clock:
    """Measures what lies between its laps."""

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
    save_asked: bool = False,
    check: Check | None = None,
    before: StepTimes | None = None,
) -> StepResult:
    """Run one optimizer step and replace each micro-batch's entry of `memory` by its new memory.

    Args:
        check: what the step is held to.
        stop_asked, save_asked: of this rank; all ranks learn of it.
        before: this rank's times of the step before; all ranks learn of some of them.

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
    sent_before_P = list(wire.sent_bytes_P) if wire else []
    for micro in range(config.train.accumulation):
        with span("plan_wait"):
            planned, wait_seconds = loader.next()
        times.plan_wait_ms += 1e3 * wait_seconds
        times.data_ms += planned.prepare_ms
        clock.lap_ms()
        with span("forward"), own.forward(), check.forward() if check else nullcontext():
            output = _forward(engine, planned, memory[micro])
        times.forward_ms += clock.lap_ms()
        attention_ms, experts_ms = forward_times.take()
        times.attention_ms += attention_ms
        times.experts_ms += experts_ms
        clock.lap_ms()
        with span("backward"):
            engine.backward(output.loss)
        times.backward_ms += clock.lap_ms()
        forward_times.take()  # with recomputation, backward runs the modules again
        memory[micro] = output.memory
        outputs.append(output)
    if check is not None:
        check.compare(step)
    clock.lap_ms()
    if engine.device.type == "cuda":  # launched, not done; the ranks' sum would wait for it next
        torch.cuda.synchronize(engine.device)
        times.backward_ms += clock.lap_ms()
    sent_G = [now - then for now, then in zip(wire.sent_bytes_P, sent_before_P, strict=True)] if wire else []
    row = _row(world, sent_G, times, before or StepTimes())
    row.stop_asked, row.save_asked = float(stop_asked), float(save_asked)
    block = block_of(row, sent_G, world.mesh)
    times.metric_ms = clock.lap_ms()
    with span("totals"):
        totals = add_up(outputs, world, block)
    if not math.isfinite(totals.loss + totals.auxiliary_loss):
        raise everywhere(RunFailed(f"the loss is {totals.loss + totals.auxiliary_loss} at step {step}"))
    clock.lap_ms()
    with span("optimizer"):
        applied = engine.step()
    times.optimizer_ms = clock.lap_ms()
    if not applied:
        raise everywhere(RunFailed(f"the gradient norm is {engine.grad_norm()} at step {step}"))
    result = StepResult(
        loss=totals.loss,
        auxiliary_loss=totals.auxiliary_loss,
        k=planned.routing.k,
        learning_rate=rate,
        grad_norm=engine.grad_norm(),
        block_PX=totals.block_PX,
        sent_bytes_PG=totals.sent_bytes_PG,
        count_LE=totals.count_LE,
        times=times,
    )
    clock.lap_ms()
    times.own_ms = own.total_ms()
    if wire is not None:
        times.exchange_exposed_ms, times.exchange_hidden_ms = wire.take_times()
    times.metric_ms += clock.lap_ms()
    times.step_ms = clock.total_ms()
    return result


def _row(world: World, sent_G: list[int], times: StepTimes, before: StepTimes) -> RankRow:
    """What this rank tells the others: all that is known on the host before the ranks' sum."""
    near_G = world.near(world.mesh.group_ranks) if sent_G else []
    return RankRow(
        own_ms=before.own_ms,
        exchange_exposed_ms=before.exchange_exposed_ms,
        plan_wait_ms=times.plan_wait_ms,
        memory_bytes=memory_bytes(),
        wire_bytes=sum(sent_G),
        wire_bytes_inside=sum(sent for sent, near in zip(sent_G, near_G, strict=True) if near),
    )


def _forward(engine: Engine, planned: PlannedBatch, memory: Memory | None) -> Output:
    batch = planned.batch
    output: Output = engine.forward(batch.ids_BQ, batch.targets_BQ, None if batch.fresh else memory, planned.routing)
    return output
