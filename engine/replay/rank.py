"""Run some steps of one rank of a run, alone in this process: forward, backward and DeepSpeed's step, on its true rows.

The trainer's own parts do the work: batches and plans, model, engine, step (engine/train/). The other ranks' answers
come from engine/replay/answers.py. Steps before the first one fill the memory of Transformer-XL and warm the process
up. Then the steps run for their times, and once more for their memory, since counting allocations takes time.

Letters: y layers, m micro-batches of a step, P ranks of the expert group.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from foreroute.engine.certificate.check import RowCounts, StepRows
from foreroute.engine.certificate.counts.layout import Layout
from foreroute.engine.config import PeerIds
from foreroute.engine.data.corpus import PreparedCorpus
from foreroute.engine.data.loader import PlannedLoader
from foreroute.engine.metrics.step_result import LaunchedStep
from foreroute.engine.metrics.timers import StepTimes
from foreroute.engine.model.build import build_routers
from foreroute.engine.optim.lone_rank import agreeing_with_itself, fill_padding
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.parallel.world import World
from foreroute.engine.profiling.profiler import QUIET
from foreroute.engine.profiling.tensor_bytes import CountedBatches, PlanBytes, blocks, peaks, storages
from foreroute.engine.profiling.trace_summary import MAIN, nest
from foreroute.engine.replay.answers import ANSWER, alone_as, spent
from foreroute.engine.replay.row_requests import without_others
from foreroute.engine.tracing import Recorder, record_into, span
from foreroute.engine.train.step import Observer, read, train_step
from foreroute.engine.train.trainer import Trainer

MOMENTS = "forward", "backward", "totals", "optimizer"
"""Parts of a step, as train_step names them."""


class StepPlan(NamedTuple):
    """The steps to run."""

    steps: Sequence[int]  # 0-based, ascending, neighbours
    rounds: int = 1  # times that each of them is timed
    memory: bool = True  # count allocations


@dataclass(frozen=True, slots=True)
class ReplayedStep:
    """One step of the rank, as it ran."""

    step: int  # 0-based
    k: int
    rows: StepRows
    sent_bytes_P: list[int]  # to each rank of the expert group
    times: StepTimes  # answers are in them
    own_ms: dict[str, float]  # of the host, by range, without the ranges inside and without answers
    answers_ms: float  # of the host
    cpu_ms: float  # of the main thread's processor, without answers
    loss: float


@dataclass(frozen=True, slots=True)
class HeldStep:
    """The memory of one step."""

    step: int
    peak_bytes: dict[str, int]  # of tensors of the device, by moment; plans are in it on a CPU
    plan_bytes: int  # most at once

    @property
    def most(self) -> int:
        """The peak of the step."""
        return max(self.peak_bytes.values())


@dataclass(frozen=True, slots=True)
class ReplayedRank:
    """The steps of one rank."""

    mesh: Mesh
    device: str
    steps: list[ReplayedStep]  # in the order in which they ran
    held: list[HeldStep]
    parameters: int  # of the rank


def replay_rank(layout: Layout, corpus: PreparedCorpus, rank: int, plan: StepPlan) -> ReplayedRank:
    """Run steps of one rank in this process, which must have no process group and may have none afterwards.

    Args:
        layout: the run on its ranks, resolved for this process's device (engine/train/resolve.py).

    Raises:
        UserError: the run cannot be laid out on these ranks.
        RunFailed: a loss or a gradient is not finite.
    """
    with lone_rank(layout, corpus, rank) as steps:
        return _replay(steps, plan)


@contextmanager
def lone_rank(layout: Layout, corpus: PreparedCorpus, rank: int) -> Iterator["RankSteps"]:
    """Make this process a rank of the run, without the others, until the block ends; arguments as for replay_rank."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config, mesh = layout.config, layout.mesh(rank)
    # ids of the others are read, not asked for
    layout = replace(layout, config=replace(config, parallel=replace(config.parallel, peer_ids=PeerIds.corpus)))
    with alone_as(mesh, config.train.zero_stage), agreeing_with_itself():
        steps = RankSteps(layout, corpus, World(mesh, device))
        steps.trainer.batches = without_others(steps.trainer.batches)
        fill_padding(steps.trainer.model)
        yield steps


def _replay(rank: "RankSteps", plan: StepPlan) -> ReplayedRank:
    """Run the steps before, those to time, those to count, with plans ahead of the last one as in a run."""
    trainer = rank.trainer
    before, after = steps_around(rank.layout, plan.steps)
    timed = [step for step in plan.steps for _ in range(plan.rounds)]
    counted = [plan.steps[0], *plan.steps] if plan.memory else []
    with rank.loading([*before, *timed, *counted, *after]) as loader:
        for step in before:
            rank.step(loader, step)
        steps = [rank.timed(loader, step) for step in timed]
        held = rank.held(loader, plan.steps) if plan.memory else []
    device = trainer.engine.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return ReplayedRank(trainer.world.mesh, name, steps, held, sum(p.numel() for p in trainer.model.parameters()))


class Silent:
    """A reporter to nobody."""

    def note(self, line: str) -> None:
        """Show nothing."""

    def step(self, step: int) -> None:
        """Show nothing."""

    def metrics(self, step: int, values: Mapping[str, Any], seconds_left: float) -> None:
        """Show nothing."""


class RankSteps:
    """Steps of one rank, measured; the other ranks may be there or answer alone.

    Args:
        layout: as for replay_rank.
        world: the rank's; with a process group.
    """

    def __init__(self, layout: Layout, corpus: PreparedCorpus, world: World) -> None:
        self.layout = layout
        routers = build_routers(layout.config, corpus, world.mesh)
        self.trainer = Trainer(layout.config, corpus, routers, Path(), Silent(), world)
        self._counts, self._plans = _Counts(RowCounts(self.trainer.model)), PlanBytes()

    @contextmanager
    def loading(self, steps: Sequence[int]) -> Iterator[PlannedLoader]:
        """Plan the batches of these steps, in this order, until the block ends."""
        config, tables = self.trainer.config, self.trainer.model.ngram_tables
        if tables is not None:
            tables.settle(restart=True)
        loader = PlannedLoader(
            CountedBatches(self.trainer.batches, self._plans),
            steps=steps,
            accumulation=config.train.accumulation,
            prefetch=config.data.prefetch,
            device=self.trainer.engine.device,
            ahead=None if tables is None else tables.ahead,
        )
        try:
            yield loader
        finally:
            loader.close()

    def step(self, loader: PlannedLoader, step: int, *observers: Observer) -> LaunchedStep:
        """Run a step, the loader's next one."""
        trainer, config = self.trainer, self.trainer.config
        launched = train_step(
            trainer.engine,
            loader,
            trainer.memory,
            train=config.train,
            optim=config.optim,
            step=step,
            meter=trainer.meter,
            observers=observers,
        )
        launched.wait()
        return launched

    def timed(self, loader: PlannedLoader, step: int) -> ReplayedStep:
        """Run a step and take its times, rows and bytes."""
        comm, recorder = self.trainer.engine.comm, Recorder(annotate=False)
        sent_before = list(comm.sent_bytes_P) if comm else []
        answers, cpu_s = replace(spent), time.thread_time()
        record_into(recorder)
        try:
            launched = self.step(loader, step, self._counts)
        finally:
            record_into(None)
        cpu_s = time.thread_time() - cpu_s
        result = read(launched)
        own_ms = dict[str, float]()
        for part in nest(recorder.ranges):
            if part.track == MAIN and part.name != ANSWER:
                own_ms[part.name] = own_ms.get(part.name, 0.0) + part.own_ns / 1e6
        return ReplayedStep(
            step=step,
            k=result.k,
            rows=self._counts.rows,
            sent_bytes_P=[now - b for now, b in zip(comm.sent_bytes_P, sent_before, strict=True)] if comm else [],
            times=result.times,
            own_ms=own_ms,
            answers_ms=1e3 * (spent.wall_s - answers.wall_s),
            cpu_ms=1e3 * (cpu_s - spent.cpu_s + answers.cpu_s),
            loss=result.loss,
        )

    def held(self, loader: PlannedLoader, steps: Sequence[int]) -> list[HeldStep]:
        """Run the first of the steps once without counting it, then each of them, and count their memory."""
        if self.trainer.engine.device.type == "cuda":
            self.step(loader, steps[0])
            return [self._held_on_gpu(loader, step) for step in steps]
        before = self._storages()
        with _profiled() as found:
            self.step(loader, steps[0])
            now, plan_bytes = self._storages(), list[int]()
            with _annotated():
                for step in steps:
                    self._plans.restart()
                    with span(f"step {step}"):
                        self.step(loader, step)
                    plan_bytes.append(self._plans.peak_bytes)
        stayed = {address: size for address, size in before.items() if now.get(address) == size}
        most = peaks(blocks(found, {*MOMENTS, *(f"step {step}" for step in steps)}), stayed)
        return [_held_step(step, plans, most) for step, plans in zip(steps, plan_bytes, strict=True)]

    def _held_on_gpu(self, loader: PlannedLoader, step: int) -> HeldStep:
        self._plans.restart()
        moments = _DeviceMoments(self.trainer.engine.device)
        self.step(loader, step, moments)
        moments.end("optimizer")
        return HeldStep(step, moments.peak_bytes, self._plans.peak_bytes)

    def _storages(self) -> dict[int, int]:
        with self._plans.planning:
            here = storages()
        for address in self._plans.addresses():
            here.pop(address, None)
        return here


def _held_step(step: int, plan_bytes: int, most: dict[str, int]) -> HeldStep:
    found = {moment: most.get(f"step {step}/{moment}", 0) + plan_bytes for moment in MOMENTS}
    return HeldStep(step, found, plan_bytes)


def steps_around(layout: Layout, steps: Sequence[int]) -> tuple[range, range]:
    """Return the steps that are run before, which fill the memory, and those that are planned after.

    Example: memory of two segments, one step planned ahead, the step 10: 8 and 9, and 11.
    """
    config = layout.config
    filling = max(1, ceil(config.model.memory / config.data.segment))
    first, last = steps[0], steps[-1]
    return range(max(0, first - filling), first), range(
        last + 1, min(last + 1 + config.data.prefetch, config.train.steps)
    )


@contextmanager
def _profiled() -> Iterator[profile]:
    """Record allocations."""
    os.environ.setdefault("KINETO_LOG_LEVEL", QUIET)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        yield found


@contextmanager
def _annotated() -> Iterator[None]:
    """Make ranges visible to PyTorch's profiler."""
    record_into(Recorder(annotate=True))
    try:
        yield
    finally:
        record_into(None)


class _Counts:
    """Observes a step's rows and bytes."""

    def __init__(self, counts: RowCounts) -> None:
        self._counts = counts
        self.rows: StepRows

    def forward(self) -> AbstractContextManager[None]:
        """Count a forward pass."""
        return self._counts.forward()

    def compare(self, step: int) -> None:
        """Take the step's counts."""
        self.rows = self._counts.take()


class _DeviceMoments:
    """Observes the peak of a GPU's allocator in the moments of a step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.peak_bytes: dict[str, int] = {}
        torch.cuda.reset_peak_memory_stats(device)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """End what comes before a forward pass, and the pass itself."""
        if self.peak_bytes:
            self.end("backward")
        yield
        self.end("forward")

    def compare(self, step: int) -> None:
        """End the last backward pass."""
        self.end("backward")

    def end(self, moment: str) -> None:
        """End a moment; the next one begins."""
        most = torch.cuda.max_memory_allocated(self._device)
        self.peak_bytes[moment] = max(self.peak_bytes.get(moment, 0), most)
        torch.cuda.reset_peak_memory_stats(self._device)
