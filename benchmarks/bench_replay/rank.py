"""One rank of the runs that are compared: as one of many over gloo, or alone (engine/replay/)."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import distributed as dist

from benchmarks.bench_replay.calls import Calls
from benchmarks.bench_replay.turns import Turns
from foreroute.engine.certificate.counts.layout import Layout
from foreroute.engine.data.corpus import PreparedCorpus, prepare
from foreroute.engine.parallel.cpu_group import GlooGroup
from foreroute.engine.parallel.world import World
from foreroute.engine.replay.rank import RankSteps, ReplayedStep, lone_rank, steps_around
from foreroute.engine.testing.tensor_bytes import slow_waits


@dataclass(frozen=True)
class Case:
    """A run, and the steps of it that are compared."""

    layout: Layout  # resolved
    steps: range
    timed: Sequence[int]
    held: Sequence[int]  # whose memory is counted


@dataclass(frozen=True)
class Ran:
    """The results of a rank."""

    calls: list[NDArray[np.uint64]]  # of each step
    sent: list[list[int]]  # of each timed step, bytes to each rank
    compute_ms: list[float]  # of each timed step
    peak_bytes: list[dict[str, int]]  # of each held step, by moment


def real(rank: int, case: Case, turns: Turns) -> Ran:
    """Run as one of the ranks of the present process group."""
    mesh = case.layout.mesh(rank)
    group = GlooGroup(dist.group.WORLD)  # type: ignore[arg-type]
    calls = Calls()
    with calls.collectives():
        steps = RankSteps(case.layout, _corpus(case), World(mesh, cpu_group=group))
        return _run(case, steps, calls, slow_waits, turns.blocks(case.timed, replayed=False))


def replayed(case: Case, rank: int, turns: Turns | None) -> Ran:
    """Run alone, as one of the ranks.

    Args:
        turns: None: not timed.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    calls = Calls()
    blocks = () if turns is None else turns.blocks(case.timed, replayed=True)
    with calls.collectives(), lone_rank(case.layout, _corpus(case), rank) as steps:
        return _run(case, steps, calls, nullcontext, blocks)


def _corpus(case: Case) -> PreparedCorpus:
    return prepare(case.layout.config.corpus, lambda _: None)


def _run(
    case: Case, steps: RankSteps, calls: Calls, around_memory: Callable[[], Any], blocks: Iterable[Sequence[int]]
) -> Ran:
    before, after = steps_around(case.layout, case.steps)
    timed = [] if blocks == () else case.timed
    order = [*before, *timed, *case.steps, case.held[0], *case.held, *after]
    found, times = list[NDArray[np.uint64]](), list[ReplayedStep]()
    with steps.loading(order) as loader:
        for step in before:
            steps.step(loader, step)
        for block in blocks:
            times += [steps.timed(loader, step) for step in block]
        for step in case.steps:
            with calls:
                steps.step(loader, step)
            found.append(calls.found)
        with around_memory():
            held = steps.held(loader, case.held)
    sent, compute_ms = [step.sent_bytes_P for step in times], [step.cpu_ms for step in times]
    return Ran(found, sent, compute_ms, [step.peak_bytes for step in held])
