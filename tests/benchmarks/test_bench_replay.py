"""A replayed rank against the same rank among real ones over gloo: every call, every byte; and changes are seen."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.bench_replay.calls import differing
from benchmarks.bench_replay.compare import WAYS, case_of, compare, planted, replay_beside_each_other


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    path = folder / "text"
    path.write_bytes((np.random.default_rng(0).random(60_000) ** 2 * 64).astype(np.uint8).tobytes())
    return path


@pytest.mark.parametrize("number", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3))])
def test_a_replayed_rank_does_what_the_real_one_does(text, number):
    case = case_of(WAYS[number], text, text.parent / "cache", 4)
    (found,) = compare(case, ranks=[1])
    assert found.calls > 1000 and found.differences == 0
    assert found.memory_error < 0.005


@pytest.mark.slow
def test_planted_changes_are_seen(text):
    case = case_of(WAYS[0], text, text.parent / "cache", 2)
    (before,) = replay_beside_each_other(case, [1])
    assert sum(map(len, before.calls)) > 1000
    for name, other, rank in planted(case, 1):
        (after,) = replay_beside_each_other(replace(case, layout=other), [rank])
        assert sum(differing(a, b) for a, b in zip(after.calls, before.calls, strict=True)) > 0, name


def test_differing_calls_are_counted():
    assert differing(["a", "b", "c"], ["a", "x"]) == 2
    assert differing(["a"], ["a"]) == 0
