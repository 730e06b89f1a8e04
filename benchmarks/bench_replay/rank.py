"""One rank of the runs that are compared: as one of many over gloo, or alone (engine/replay/)."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import distributed as dist

from benchmarks.bench_replay.calls import Calls, numbered_parameters
from benchmarks.bench_replay.turns import Turns
from foreroute.engine.certificate.counts.layout import Layout
from foreroute.engine.data.corpus import PreparedCorpus, prepare
from foreroute.engine.optim.lone_rank import agreeing_with_itself
from foreroute.engine.parallel.cpu_group import GlooGroup
from foreroute.engine.parallel.world import World
from foreroute.engine.replay.rank import HeldStep, RankSteps, ReplayedStep, lone_rank, steps_around
from foreroute.engine.testing.tensor_bytes import slow_waits

_HELD = 8  # steps whose memory is counted
_GLOO_S = 0.02  # in which gloo's thread releases its tensors, on busy cores too


@dataclass(frozen=True)
class Case:
    """A run, and the steps of it that are compared."""

    layout: Layout  # resolved
    steps: range  # that are run, at least one
    listed: bool  # their calls and the memory of some are recorded; otherwise they are timed


@dataclass(frozen=True)
class Ran:
    """The results of a rank."""

    calls: list[NDArray[np.uint64]]  # of each listed step
    sent: list[list[int]]  # of each timed step, bytes to each rank
    compute_ms: list[float]  # of each timed step
    peak_bytes: list[dict[str, int]]  # of each held step, by moment


def real(rank: int, case: Case, turns: Turns | None) -> Ran:
    """Run as one of the ranks of the present process group; turns as for replayed.

    In ZeRO-3's comparisons with rank 0 each rank gives numbers of its own, which are overwritten, as a lone rank does.
    """
    mesh = case.layout.mesh(rank)
    group, planning = (GlooGroup(dist.new_group()) for _ in range(2))
    calls = Calls()
    blocks = () if turns is None else turns.blocks(case.steps, replayed=False)
    with numbered_parameters(), calls.collectives(), agreeing_with_itself():
        steps = RankSteps(case.layout, _corpus(case), World(mesh, cpu_group=group, planning=planning))
        return _run(case, steps, calls, partial(slow_waits, _GLOO_S), blocks)


def replayed(case: Case, rank: int, turns: Turns | None) -> Ran:
    """Run alone, as one of the ranks.

    Args:
        turns: of a case that is timed.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    calls = Calls()
    blocks = () if turns is None else turns.blocks(case.steps, replayed=True)
    with numbered_parameters(), calls.collectives(), lone_rank(case.layout, _corpus(case), rank) as steps:
        return _run(case, steps, calls, nullcontext, blocks)


def _corpus(case: Case) -> PreparedCorpus:
    return prepare(case.layout.config.corpus, lambda _: None)


def _run(
    case: Case, steps: RankSteps, calls: Calls, around_memory: Callable[[], Any], blocks: Iterable[Sequence[int]]
) -> Ran:
    before, after = steps_around(case.layout, case.steps)
    some = case.steps[:: -max(1, len(case.steps) // _HELD)][::-1] if case.listed else range(0)
    found, times, held = list[NDArray[np.uint64]](), list[ReplayedStep](), list[HeldStep]()
    with steps.loading([*before, *case.steps, *some[:1], *some, *after]) as loader:
        for step in before:
            steps.step(loader, step)
        for block in blocks:
            times += [steps.timed(loader, step) for step in block]
        for step in case.steps if case.listed else ():
            with calls:
                steps.step(loader, step)
            found.append(calls.found)
        if some:
            with around_memory():
                held = steps.held(loader, some)
    sent, compute_ms = [step.sent_bytes_P for step in times], [step.cpu_ms for step in times]
    return Ran(found, sent, compute_ms, [step.peak_bytes for step in held])
