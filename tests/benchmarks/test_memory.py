"""What bench_memory rests on: bytes by plain counting, and systems that compute the same."""

import numpy as np
import pytest

from benchmarks.bench_memory import rank as memory_rank
from benchmarks.bench_memory.problem import SEGMENT, STREAMS, Table, Text, count_bytes
from benchmarks.bench_memory.systems import SYSTEMS
from foreroute.engine.testing.ranks import run_ranks

SYMBOLS = 40
OURS = "planned", "replicated", "sparse"


def text(ranks):
    """Zipf-like ids, enough for some batches."""
    draws = np.random.default_rng(2).zipf(1.2, 12 * ranks * STREAMS * SEGMENT)
    return Text((np.minimum(draws, SYMBOLS) - 1).astype(np.uint8), SYMBOLS)


@pytest.mark.parametrize("ranks", [1, 2, 8])
@pytest.mark.parametrize("ngram", [1, 3])
def test_bytes_equal_plain_counting(ranks, ngram):
    table, given = Table(5000, 16, ngram), text(ranks)
    rows = [given.rows(table, rank, ranks, 1) for rank in range(ranks)]
    distinct, asked = 0, 0
    for rank, own in enumerate(rows):
        far = [row for row in own.tolist() if row % ranks != rank]
        distinct += len(set(far))
        asked += len(far)
    pairs, vector = ranks * (ranks - 1), 16 * 4
    found = count_bytes(rows, table)
    assert found.planned == 2 * distinct * vector  # there and back
    assert found.ids == 4 * (distinct + pairs)
    assert found.requested == asked * (2 * vector + 8) + 8 * pairs
    assert ranks == 1 or found.planned < found.requested


def checked(rank, ranks, wrong):
    """The error of a check of all systems; None if they are the same."""
    if wrong:  # a system that forgets to change its rows
        step = SYSTEMS["replicated"]
        SYSTEMS["replicated"] = lambda case: _Still(step(case))
    try:
        memory_rank.check(list(OURS), text(ranks))
    except RuntimeError as error:
        return str(error)
    return None


class _Still:
    def __init__(self, system):
        self.system = system

    def step(self, batch):
        weight = self.system.embedding.weight
        before = weight.detach().clone()
        found = self.system.step(batch).clone()
        weight.data.copy_(before)
        return found


@pytest.mark.dist
@pytest.mark.parametrize("wrong", [False, True])
def test_systems_compute_the_same(wrong):
    found = run_ranks(checked, 2, 2, wrong)
    assert all(("NOT TIMED: replicated differs" in error) if wrong else error is None for error in found), found
