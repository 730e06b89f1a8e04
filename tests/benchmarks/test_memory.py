"""What bench_memory rests on: bytes by plain counting, and systems that compute the same."""

import itertools
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from benchmarks.bench_memory import rank as memory_rank
from benchmarks.bench_memory.homes import Readings, count_vectors, readings
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


def plain_fewest(steps, hash_home, ranks, remembered, moved):
    """The fewest vectors of one row, by all ways to choose its homes; steps: the readers of each."""
    best = math.inf
    read = [step for step, readers in enumerate(steps) if readers]
    for homes in itertools.product(range(ranks), repeat=len(read)):
        home, total, last = hash_home, 0, -1
        for step, new in zip(read, homes, strict=True):
            if last >= 0 and step - last > remembered and home != hash_home:
                home, total = hash_home, total + moved
            total += len(steps[step] - {home}) + len(steps[step] - {new})
            if new != home:
                total += moved - (new in steps[step])
            home, last = new, step
        best = min(best, total)
    return best


def plain_rule(steps, hash_home, remembered, moved):
    """Vectors and row numbers by the rule, for one row."""
    home, total, told, alone, last = hash_home, 0, 0, None, -1
    for step, readers in enumerate(steps):
        if not readers:
            continue
        if last >= 0 and step - last > remembered:
            total, told = total + moved * (home != hash_home), told + (home != hash_home)
            home, alone = hash_home, None
        far = len(readers - {home})
        told += 2 * far * (home != hash_home)
        if len(readers) == 1 and readers == alone and readers != {home}:
            (home,) = readers
            total, told = total + moved, told + 2
        else:
            total += 2 * far
        alone, last = readers if len(readers) == 1 else None, step
    return total, told


@pytest.mark.parametrize("moved", [1, 3])
@pytest.mark.parametrize("remembered", [1, 3])
def test_moving_homes_equal_plain_counting(remembered, moved):
    generator, ranks, rows, steps = np.random.default_rng(4), 3, 30, 6
    reads = generator.random((rows, steps, ranks)) < generator.random((rows, 1, ranks)) * 0.7
    reads[:, 0] |= ~reads.any((1, 2))[:, None]  # each row is read
    by_row = [[set(np.flatnonzero(step).tolist()) for step in row] for row in reads]
    row_N, step_N = np.nonzero(reads.any(2))
    found = Readings(row_N, step_N, reads[row_N, step_N] @ (1 << np.arange(ranks)))
    counted = count_vectors(found, ranks, remembered, moved)
    assert counted.fixed == sum(2 * len(readers - {row % ranks}) for row in range(rows) for readers in by_row[row])
    plain = [plain_rule(by_row[row], row % ranks, remembered, moved) for row in range(rows)]
    assert (counted.ruled, counted.told) == tuple(map(sum, zip(*plain, strict=True)))
    fewest = sum(plain_fewest(by_row[row], row % ranks, ranks, remembered, moved) for row in range(rows))
    assert counted.fewest == fewest <= min(counted.ruled, counted.fixed)
    assert count_vectors(found, ranks, remembered, 1e9).fewest == counted.fixed  # none moves


def test_readings_equal_plain_counting():
    given, table = text(2), Table(500, 16, 2)
    found = readings(given, table, 2, 3)
    reads = {(row, step): 0 for step in range(3) for rank in range(2) for row in given.rows(table, rank, 2, step)}
    for row, step in reads:
        reads[row, step] = sum(1 << rank for rank in range(2) if row in given.rows(table, rank, 2, step))
    assert list(zip(*map(np.ndarray.tolist, found), strict=True)) == [(*key, reads[key]) for key in sorted(reads)]


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


@pytest.mark.slow
def test_bench_memory(run, tmp_path):
    text = tmp_path / "sources"
    text.write_bytes(b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py")))[:1_500_000])
    code, out, err = run("bench_memory", "--quick", "--rounds", "1", "--text", str(text))
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    host, steps = ["host_wait_fraction", "host_equals_device"], ["step_ratio", "step_ratio_bpe8k"]
    assert list(result) == ["bytes_ratio", *steps, *host, "rows_flatness"]
    assert 0.2 < result["bytes_ratio"]["bytes"] < result["bytes_ratio"]["bpe8k"] < 1
    assert result["host_equals_device"] is True and result["rows_flatness"] >= 1
    assert ("NOT MEASURED: 2 nodes" in out) == (result["step_ratio"]["200mbit"] is None)
    assert result["step_ratio"]["loopback"] > 0
