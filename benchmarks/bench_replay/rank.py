"""One rank of the runs that are compared: as one of many over gloo, or alone (engine/replay/)."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import distributed as dist

from benchmarks.bench_replay.calls import Calls
from foreroute.engine.certificate.counts.layout import Layout
from foreroute.engine.data.corpus import PreparedCorpus, prepare
from foreroute.engine.parallel.cpu_group import GlooGroup
from foreroute.engine.parallel.world import World
from foreroute.engine.replay.rank import RankSteps, lone_rank, steps_around
from foreroute.engine.testing.tensor_bytes import slow_waits


@dataclass(frozen=True)
class Case:
    """A run, and the steps of it that are compared."""

    layout: Layout  # resolved
    timed: range
    listed: range
    held: range


@dataclass(frozen=True)
class Ran:
    """The results of a rank."""

    calls: list[list[str]]  # of each listed step
    compute_ms: list[float]  # of each timed step
    peak_bytes: list[dict[str, int]]  # of each held step, by moment


def real(rank: int, case: Case) -> Ran:
    """Run as one of the ranks of the present process group."""
    mesh = case.layout.mesh(rank)
    group = GlooGroup(dist.group.WORLD)  # type: ignore[arg-type]
    calls = Calls()
    with calls.collectives():
        return _run(case, RankSteps(case.layout, _corpus(case), World(mesh, cpu_group=group)), calls, slow_waits)


def replayed(case: Case, rank: int) -> Ran:
    """Run alone, as one of the ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()
    calls = Calls()
    with calls.collectives(), lone_rank(case.layout, _corpus(case), rank) as steps:
        return _run(case, steps, calls, nullcontext)


def _corpus(case: Case) -> PreparedCorpus:
    return prepare(case.layout.config.corpus, lambda _: None)


def _run(case: Case, steps: RankSteps, calls: Calls, around_memory: Any) -> Ran:
    before, after = steps_around(case.layout, case.timed)
    order = [*before, *case.timed, *case.listed, case.held[0], *case.held, *after]
    found = []
    with steps.loading(order) as loader:
        for step in before:
            steps.step(loader, step)
        timed = [steps.timed(loader, step) for step in case.timed]
        for step in case.listed:
            with calls:
                steps.step(loader, step)
            found.append(calls.found)
        with around_memory():
            held = steps.held(loader, case.held)
    return Ran(found, [step.cpu_ms for step in timed], [step.peak_bytes for step in held])
