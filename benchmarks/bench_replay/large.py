"""Replays of runs on ranks that this machine does not have: 512 at a published size, and places of 64."""

import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foreroute.engine.certificate.counts.layout import Layout
from foreroute.engine.certificate.counts.placement import Placement
from foreroute.engine.certificate.counts.replay import replay
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
    Split,
    TrainConfig,
)
from foreroute.engine.config.enums import Backend
from foreroute.engine.data.corpus import prepare
from foreroute.engine.model.build import build_routers
from foreroute.engine.replay.places import Chosen, Place, Places, expected_at
from foreroute.engine.replay.rank import StepPlan
from foreroute.launch.replay.apart import Apart, replay_apart


def _layout(text: Path, world: int, group: int, **sections: Any) -> Layout:
    config = Config(
        corpus=CorpusConfig(name=Corpus.file, path=str(text), cache_dir=str(text.parent / "cache")),
        parallel=ParallelConfig(expert_ranks=group),
        kernels=KernelsConfig(backend=Backend.cpu, masked_from_k=65),
        eval=EvalConfig(k=[1]),
        **sections,
    )
    return Layout(config, Placement(world, group, 8))


@dataclass(frozen=True)
class Large:
    """A place of a large run, replayed."""

    found_s: float
    chosen: Chosen
    apart: Apart


def one_of_512(text: Path, steps: int) -> Large:
    """Find the place with most rows of the first steps, at most 200, of SMoE-Dropout's recipe on 512 ranks, and replay
    it.

    One stream of 512 on each rank, 64 experts of 512 hidden units, one of them on each rank of a group; k from 4 to 8.
    """
    layout = _layout(
        _repeated(text, 512 * 513 * 12),
        512,
        64,
        data=DataConfig(streams=512, segment=512),
        model=ModelConfig(layers=4, width=256, heads=8, head_width=64, memory=512, dropout=0.1),
        moe=MoEConfig(experts=64, expert_width=512),
        schedule=ScheduleConfig(growth=Growth.linear, k_min=4, k_max=8),
        train=TrainConfig(steps=200, zero_stage=1, threads=1),
    )
    begin = time.perf_counter()
    corpus = prepare(layout.config.corpus, lambda _: None)
    routers = build_routers(layout.config, corpus) or []
    places = Places(layout, corpus.vocab.size, gpu=False)
    for counts in replay(layout, corpus.split(Split.train), routers, range(steps)):
        places.add(counts)
    chosen = places.choose()[0]
    found_s = time.perf_counter() - begin
    place = chosen.place
    return Large(found_s, chosen, replay_apart(layout, place.rank, StepPlan([place.step])))


def memory_errors(text: Path, number: int, draw: random.Random) -> list[float]:
    """Compare the certificate's memory with a replay's at random places of a run on 64 ranks; return the relative
    errors."""
    layout = _layout(
        text,
        64,
        16,
        data=DataConfig(streams=128, segment=128),
        model=ModelConfig(layers=2, width=128, heads=4, head_width=32, memory=128),
        moe=MoEConfig(experts=64, expert_width=256, ngram=2, rows=4096),
        schedule=ScheduleConfig(growth=Growth.linear, k_min=2, k_max=6),
        train=TrainConfig(steps=20, zero_stage=1, threads=1),
    )
    corpus = prepare(layout.config.corpus, lambda _: None)
    routers = build_routers(layout.config, corpus) or []

    def error(place: Place) -> float:
        expected = expected_at(layout, corpus.split(Split.train), routers, place, vocab=corpus.vocab.size, gpu=False)
        (held,) = replay_apart(layout, place.rank, StepPlan([place.step], rounds=0)).rank.held
        found = expected.memory.peak_bytes / held.most - 1
        print(f"rank {place.rank}, step {place.step + 1}: {held.most:,} bytes, {found:+.2%}", flush=True)
        return found

    places = [Place(draw.randrange(layout.config.train.steps), draw.randrange(64)) for _ in range(number)]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(error, places))


def _repeated(text: Path, size: int) -> Path:
    path, content = text.with_name("long"), text.read_bytes()
    path.write_bytes((content * (size // len(content) + 1))[:size])
    return path
