"""A replayed rank against the same rank of a real run over gloo: calls, memory and time."""

import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.bench_replay.calls import differing
from benchmarks.bench_replay.rank import Case, Ran, real, replayed
from foreroute.engine.certificate.counts.layout import Layout
from foreroute.engine.certificate.counts.placement import Placement
from foreroute.engine.config import (
    Config,
    Corpus,
    CorpusConfig,
    DataConfig,
    EvalConfig,
    Growth,
    KernelsConfig,
    ModelConfig,
    MoEConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainConfig,
)
from foreroute.engine.testing.ranks import run_ranks


@dataclass(frozen=True)
class Ways:
    """How a case trains."""

    ranks: int
    group: int
    zero: int
    chunks: int = 1
    accumulation: int = 1


WAYS = (Ways(2, 2, 1), Ways(2, 2, 3, chunks=3, accumulation=2), Ways(4, 2, 1, chunks=2), Ways(4, 4, 3))


def case_of(ways: Ways, text: Path, cache: Path, steps: int) -> Case:
    """Return a small run whose k grows from 1 to 4."""
    config = Config(
        corpus=CorpusConfig(name=Corpus.file, path=str(text), cache_dir=str(cache)),
        data=DataConfig(streams=2 * ways.ranks * ways.accumulation, segment=64),
        model=ModelConfig(layers=2, width=128, heads=4, head_width=32, memory=64, dropout=0.1),
        moe=MoEConfig(experts=8, expert_width=128, rows=1024, ngram=2),
        schedule=ScheduleConfig(growth=Growth.linear, k_min=1, k_max=4),
        eval=EvalConfig(k=[1]),
        train=TrainConfig(steps=steps, zero_stage=ways.zero, accumulation=ways.accumulation),
        parallel=ParallelConfig(expert_ranks=ways.group, chunks=ways.chunks),
        kernels=KernelsConfig(masked_from_k=9),
    )
    layout = Layout(config, Placement(ways.ranks, ways.group, ways.ranks))
    return Case(layout, range(steps), range(steps), range(max(0, steps - 3), steps))


def planted(case: Case, rank: int) -> list[tuple[str, Layout, int]]:
    """Return runs that differ from a case in one thing, each with the rank to replay."""
    layout, config = case.layout, case.layout.config
    changes = {
        "k": replace(config, schedule=replace(config.schedule, k_min=2)),
        "table": replace(config, train=replace(config.train, seed=config.train.seed + 1)),
        "text": replace(config, data=replace(config.data, start=0.5)),
    }
    found = [(name, replace(layout, config=changed), rank) for name, changed in changes.items()]
    return [*found, ("placement", layout, (rank + 1) % layout.placement.world_size)]


@dataclass(frozen=True)
class Compared:
    """A replayed rank against the real one."""

    calls: int  # of the real rank
    differences: int
    memory_error: float  # the largest over the steps
    time_error: float  # of the median over the steps


def compare(case: Case, *, ranks: Sequence[int] | None = None) -> list[Compared]:
    """Run all ranks over gloo, then replay some of them or all, side by side as the real ones."""
    of_ranks: list[Ran] = run_ranks(_real, case.layout.placement.world_size, case, seconds=1800)
    wanted = range(case.layout.placement.world_size) if ranks is None else ranks
    alone = replay_beside_each_other(case, wanted)
    return [_compared(found, of_ranks[rank]) for rank, found in zip(wanted, alone, strict=True)]


def replay_beside_each_other(case: Case, ranks: Sequence[int]) -> list[Ran]:
    """Replay ranks in processes of their own, which run at the same time and do not know of each other."""
    with ThreadPoolExecutor(len(ranks)) as pool:
        return [found for (found,) in pool.map(lambda rank: run_ranks(_alone, 1, case, rank, seconds=1800), ranks)]


def _real(rank: int, case: Case) -> Ran:
    return real(rank, case)


def _alone(_: int, case: Case, rank: int) -> Ran:
    return replayed(case, rank)


def _compared(found: Ran, expected: Ran) -> Compared:
    differences = sum(differing(a, b) for a, b in zip(found.calls, expected.calls, strict=True))
    memory = [max(a.values()) / max(b.values()) - 1 for a, b in zip(found.peak_bytes, expected.peak_bytes, strict=True)]
    times = [a / b for a, b in zip(found.compute_ms, expected.compute_ms, strict=True)]
    return Compared(sum(map(len, expected.calls)), differences, max(map(abs, memory)), statistics.median(times) - 1)
