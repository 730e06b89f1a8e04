"""Which streams a rank reads for a step, and when it asks the others for theirs."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from foreroute.engine.config import ScheduleConfig
from foreroute.engine.config.enums import Growth, PeerIds
from foreroute.engine.data.planned_batches import TrainingBatches, group_batch, share_ids
from foreroute.engine.data.streams import Streams
from foreroute.engine.parallel.cpu_group import CpuGroup
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.testing.tiny_run import SEGMENT, STREAMS, tiny_config

TEXT = np.random.default_rng(0).integers(0, 9, 900).astype(np.uint8)


class Group(CpuGroup):
    """Counts what is asked of it; the other rank of two says the same as this one."""

    ranks, asked = 2, 0

    def all_gather(self, values):
        self.asked += 1
        return np.stack([values, values])


class Reads(list):
    """The streams of each batch that was cut."""

    def batch(self, index, streams):
        self.append(list(streams))
        return Streams(TEXT, STREAMS, SEGMENT, 1).batch(index, streams)

    def streams_of(self, *place, **whole):
        return Streams(TEXT, STREAMS, SEGMENT, 1).streams_of(*place, **whole)


@pytest.mark.parametrize(
    ("mesh", "peer_ids", "read", "asked"),
    [
        (Mesh(1, 2, 2), PeerIds.corpus, [[0, 1], [2, 3]], 0),
        (Mesh(1, 2, 2), PeerIds.exchange, [[2, 3]], 1),
        (Mesh(1, 2, 1), PeerIds.corpus, [[2, 3]], None),
        (Mesh(1, 2, 1), PeerIds.exchange, [[2, 3]], None),
        (Mesh(0, 1, 1), PeerIds.corpus, [[0, 1, 2, 3]], None),
    ],
)
def test_a_rank_reads_its_group_or_asks_it(mesh, peer_ids, read, asked):
    config = tiny_config()
    config = replace(config, parallel=replace(config.parallel, expert_ranks=mesh.ep_size, peer_ids=peer_ids))
    host, streams = CpuGroup() if asked is None else Group(), Reads()
    group = TrainingBatches(config, streams, mesh, None, planning_group=host).read(3, 0)
    assert streams == read and getattr(host, "asked", None) == asked
    assert group.own.stream_B.tolist() == read[-1] and group.own.index == 3
    assert group.ids_PBQ.shape[0] == mesh.ep_size


def test_k_follows_the_schedule_of_the_run():
    config = replace(tiny_config(), schedule=ScheduleConfig(growth=Growth.linear, k_min=1, k_max=3))
    batches = TrainingBatches(config, Reads(), Mesh(), None)
    assert [batches.k(step) for step in range(11)] == [1, 1, 1, 2, 2, 2, 2, 2, 3, 3, 3]


def test_streams_are_those_of_rank_and_micro_batch():
    config = replace(tiny_config(), train=replace(tiny_config().train, accumulation=2))
    batches = TrainingBatches(config, Reads(), Mesh(0, 2, 1), None)
    assert [list(batches.streams_of(rank, micro)) for rank in (0, 1) for micro in (0, 1)] == [[0], [1], [2], [3]]


def test_a_single_stream_of_an_odd_length_is_shared():
    """Its left ids, ids and number are 19 numbers, so places of two numbers each begin at an odd one."""
    own = group_batch([Streams(TEXT, STREAMS, 16, 2).batch(3, range(1, 2))])
    found = share_ids(own, CpuGroup())
    for name in ("ids_PBQ", "left_PBC", "stream_PB", "place_PB"):
        assert torch.equal(getattr(found, name), getattr(own, name)), name
