"""A rank's row of the block that all ranks add up; the sum itself is tested on ranks (test_metrics_on_ranks.py)."""

from dataclasses import fields

import pytest
import torch

from foreroute.engine.metrics.rank_sums import MOST_RANKS, RankRow, _block
from foreroute.engine.parallel.mesh import Mesh

NAMES = [field.name for field in fields(RankRow)]


def test_a_rank_fills_its_own_row():
    row = RankRow(own_ms=3.0, wire_bytes=50.0)
    block = _block(row, [20, 0, 30, 0], Mesh(2, 8, 4))
    assert block.shape == (8, len(NAMES) + 4) and block.dtype == torch.float64
    want = [0.0] * len(NAMES) + [20.0, 0.0, 30.0, 0.0]
    want[NAMES.index("own_ms")], want[NAMES.index("wire_bytes")] = 3.0, 50.0
    assert block[2].tolist() == want
    assert block[[0, 1, 3, 4, 5, 6, 7]].count_nonzero() == 0


def test_a_row_begins_as_nothing():
    """What a rank has nothing to say of adds nothing."""
    assert _block(RankRow(), [], Mesh(0, 1, 1)).count_nonzero() == 0


@pytest.mark.parametrize(("world", "told"), [(1, False), (2, True), (16, True), (17, False)])
def test_links_are_told_of_2_to_16_ranks(world, told):
    links = [7] * world
    block = _block(RankRow(), links, Mesh(0, world, world))
    assert MOST_RANKS == 16  # docs/watch.md and the metric's meaning say so
    assert block.shape == (world, len(NAMES) + (world if told else 0))
    assert block[0, len(NAMES) :].tolist() == (links if told else [])
