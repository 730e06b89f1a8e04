"""Steps of single ranks of larger runs, replayed on this machine, and the same steps by the time model.

A rank that shares its experts out packs rows for others, computes rows of others and adds up what comes back: a run on
one rank does none of it. benchmarks/calibrate.py fits the model's scales to these steps as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from foreroute.engine.certificate.counts.layout import Layout
from foreroute.engine.certificate.counts.replay import StepCounts, replay
from foreroute.engine.certificate.time.cluster import ClusterConfig, LinkConfig
from foreroute.engine.certificate.time.step_time import StepModel, StepTime
from foreroute.engine.config import Backend, Split
from foreroute.engine.data.corpus import prepare
from foreroute.engine.model.build import build_routers
from foreroute.engine.replay.rank import StepPlan
from foreroute.launch.replay.apart import replay_apart

STEPS, ROUNDS = range(4, 7), 3
_NO_NETWORK = LinkConfig(gb_per_s=1e12, message_us=0.0)


def replayed_seconds(layouts: Sequence[Layout]) -> list[float]:
    """Run rank 0 of each layout alone; return the fastest step of each in seconds, without the others' answers."""
    found = []
    for layout in layouts:
        config = layout.config
        train, kernels = replace(config.train, threads=1), replace(config.kernels, backend=Backend.cpu)
        alone = replace(layout, config=replace(config, train=train, kernels=kernels))
        steps = replay_apart(alone, 0, StepPlan(STEPS, ROUNDS, memory=False)).rank.steps
        found.append(min(step.times.step_ms - step.answers_ms for step in steps) / 1e3)
    return found


@dataclass(frozen=True, slots=True)
class CountedSteps:
    """Counted steps of a run, for its time on any cluster."""

    layout: Layout
    vocab: int
    counts: Sequence[StepCounts]
    network: bool = True  # is modelled, and ranks that share cores

    def time(self, cluster: ClusterConfig) -> StepTime:
        """Model the steps; return their mean."""
        if not self.network:
            cluster = replace(cluster, inside=_NO_NETWORK, between=_NO_NETWORK, sharing=[])
        model = StepModel(self.layout, cluster, self.vocab)
        return StepTime.mean([model.time(step) for step in self.counts])


def count_steps(layout: Layout, first: int, last: int | None = None) -> CountedSteps:
    """Count the steps of a run from the first on, 0-based, before the last; None: to its end."""
    corpus = prepare(layout.config.corpus, lambda line: None)
    routers, steps = build_routers(layout.config, corpus) or [], range(first, last or layout.config.train.steps)
    counts = replay(layout, corpus.split(Split.train), routers, steps, corpus.document_starts(Split.train))
    return CountedSteps(layout, corpus.vocab.size, list(counts))


def of_rank_0(layout: Layout) -> CountedSteps:
    """Count the steps that replayed_seconds runs, as if all ranks had the rows of rank 0."""
    counted = count_steps(layout, STEPS.start, STEPS.stop)
    return replace(counted, counts=list(map(all_like_rank_0, counted.counts)), network=False)


def all_like_rank_0(counts: StepCounts) -> StepCounts:
    """Return counts of one expert group by which every rank has the rows of rank 0.

    The model takes the busiest rank of each layer: so it is this one.
    """
    ranks = counts.sent_ymgPP.shape[-1]
    local = counts.count_ymgE.shape[3] // ranks
    return replace(
        counts,
        sent_ymgPP=np.repeat(counts.sent_ymgPP[:, :, :1, :, :1], ranks, axis=4),
        nodes_ymgPh=counts.nodes_ymgPh[:, :, :1],
        count_ymgE=np.tile(counts.count_ymgE[:, :, :1, :local], ranks),
    )
