"""A replayed rank against the same rank among real ones over gloo: every call, every byte; and changes are seen."""

import numpy as np
import pytest

from benchmarks.bench_replay.calls import differing
from benchmarks.bench_replay.compare import WAYS, case_of, compare, planted


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    path = folder / "text"
    path.write_bytes((np.random.default_rng(0).random(60_000) ** 2 * 64).astype(np.uint8).tobytes())
    return path


@pytest.mark.parametrize("number", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3, 4))])
def test_a_replayed_rank_does_what_the_real_one_does(text, number):
    case = case_of(WAYS[number], text, text.parent / "cache", 4)
    (found,) = compare(case, ranks=[1])
    assert found.calls > 1000 and found.differences == 0
    assert found.memory_error < 0.005


@pytest.mark.slow
def test_planted_changes_are_seen(text):
    found = planted(case_of(WAYS[0], text, text.parent / "cache", 2), 1)
    assert list(found) == ["k", "table", "text", "placement"]
    assert all(number > 0 for number in found.values()), found


def test_differing_calls_are_counted():
    assert differing(["a", "b", "c"], ["a", "x"]) == 2
    assert differing(["a"], ["a"]) == 0
