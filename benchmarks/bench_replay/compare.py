"""A replayed rank against the same rank of a real run over gloo: calls, memory and time."""

import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.bench_replay.calls import differing
from benchmarks.bench_replay.rank import Case, Ran, real, replayed
from benchmarks.bench_replay.turns import Turns
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
    NgramEntry,
    NgramTablesConfig,
    ParallelConfig,
    RowPlace,
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
    tables: RowPlace | None = None  # where rows of n-gram tables lie; None: there are none


_SECONDS = 1800  # that a comparison may take

WAYS = (
    Ways(2, 2, 1),
    Ways(2, 2, 3, chunks=3, accumulation=2),
    Ways(4, 2, 1, chunks=2, tables=RowPlace.device),
    Ways(4, 4, 3),
    Ways(2, 2, 1, accumulation=2, tables=RowPlace.host),
)


def case_of(ways: Ways, text: Path, cache: Path, steps: int, *, timed: bool = False) -> Case:
    """Return a small run whose k grows from 1 to 4, for its calls and memory.

    Args:
        timed: one for its times, with steps so long that a wait for others costs little: it empties the caches.
    """
    segment, width = (256, 256) if timed else (64, 128)
    tables = NgramTablesConfig()
    if ways.tables is not None:
        tables = NgramTablesConfig(rows=1024, heads=2, layers=[0, 1], entry=NgramEntry.gate, place=ways.tables)
    config = Config(
        corpus=CorpusConfig(name=Corpus.file, path=str(text), cache_dir=str(cache)),
        data=DataConfig(streams=2 * ways.ranks * ways.accumulation, segment=segment),
        model=ModelConfig(layers=2, width=width, heads=4, head_width=width // 4, memory=64, dropout=0.1),
        moe=MoEConfig(experts=8, expert_width=width, rows=1024, ngram=2),
        schedule=ScheduleConfig(growth=Growth.linear, k_min=1, k_max=4),
        eval=EvalConfig(k=[1]),
        train=TrainConfig(steps=steps, zero_stage=ways.zero, accumulation=ways.accumulation),
        parallel=ParallelConfig(expert_ranks=ways.group, chunks=ways.chunks),
        kernels=KernelsConfig(masked_from_k=9),
        ngram_tables=tables,
    )
    layout = Layout(config, Placement(ways.ranks, ways.group, ways.ranks))
    return Case(layout, range(steps), listed=not timed)


def planted(case: Case, rank: int) -> dict[str, int]:
    """Return, for each of some runs that differ from a case in one thing, the calls of a rank that differ."""
    changed = _planted(case, rank)
    before, *after = replay_beside_each_other([(case, rank), *changed.values()])
    return {
        name: sum(differing(a, b) for a, b in zip(found.calls, before.calls, strict=True))
        for name, found in zip(changed, after, strict=True)
    }


def _planted(case: Case, rank: int) -> dict[str, tuple[Case, int]]:
    """Return the runs, each with the rank to replay."""
    layout, config = case.layout, case.layout.config
    changes = {
        "k": replace(config, schedule=replace(config.schedule, k_min=2)),
        "table": replace(config, train=replace(config.train, seed=config.train.seed + 1)),
        "text": replace(config, data=replace(config.data, start=0.5)),
    }
    found = {name: (replace(case, layout=replace(layout, config=one)), rank) for name, one in changes.items()}
    return {**found, "placement": (case, (rank + 1) % layout.placement.world_size)}


@dataclass(frozen=True)
class Compared:
    """A replayed rank against the real one."""

    calls: int  # of the real rank
    differences: int
    memory_error: float  # the largest over the steps; 0 of a case that is timed
    time_error: float  # of the median over the steps; 0 of a case whose calls are listed


def compare(case: Case, *, ranks: Sequence[int] | None = None) -> list[Compared]:
    """Run all ranks over gloo, and some of them or all alone, side by side as the real ones; timed sides take turns."""
    world = case.layout.placement.world_size
    wanted = range(world) if ranks is None else ranks
    turns = None if case.listed else Turns(world + len(wanted))
    with ThreadPoolExecutor(1 + len(wanted)) as pool:
        real_ones = pool.submit(run_ranks, _real, world, case, turns, seconds=_SECONDS)
        alone = [pool.submit(run_ranks, _alone, 1, case, rank, turns, seconds=_SECONDS) for rank in wanted]
        for done in as_completed((real_ones, *alone)):
            if error := done.exception():
                if turns is not None:
                    turns.abort()
                raise error
    of_ranks: list[Ran] = real_ones.result()
    return [_compared(one.result()[0], of_ranks[rank]) for rank, one in zip(wanted, alone, strict=True)]


def replay_beside_each_other(places: Sequence[tuple[Case, int]]) -> list[Ran]:
    """Replay ranks in processes of their own, which run at the same time and do not know of each other; untimed."""
    with ThreadPoolExecutor(len(places)) as pool:
        alone = pool.map(lambda place: run_ranks(_alone, 1, *place, None, seconds=_SECONDS), places)
        return [found for (found,) in alone]


def _real(rank: int, case: Case, turns: Turns | None) -> Ran:
    return real(rank, case, turns)


def _alone(_: int, case: Case, rank: int, turns: Turns | None) -> Ran:
    return replayed(case, rank, turns)


def _compared(found: Ran, expected: Ran) -> Compared:
    differences = sum(differing(a, b) for a, b in zip(found.calls, expected.calls, strict=True))
    differences += differing(found.sent, expected.sent)
    memory = [max(a.values()) / max(b.values()) - 1 for a, b in zip(found.peak_bytes, expected.peak_bytes, strict=True)]
    times = [a / b for a, b in zip(found.compute_ms, expected.compute_ms, strict=True)]
    return Compared(
        calls=sum(map(len, expected.calls)),
        differences=differences,
        memory_error=max(map(abs, memory), default=0.0),
        time_error=statistics.median(times) - 1 if times else 0.0,
    )
