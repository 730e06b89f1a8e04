"""The benchmark of faults ends with the keys that others read; small shapes, times mean nothing."""

import json

import pytest


@pytest.mark.slow
def test_bench_faults(run):
    """A rank is killed in training, around a checkpoint's writing and at a restart, and one is stopped: the run ends
    the same."""
    code, out, err = run("bench_faults", "--quick")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert (result["trials"], result["identical"]) == (2, 2), out
    assert 0 <= result["inside_checkpoint"] <= 2  # a write may be over before the signal comes
    assert (result["stops"], result["stops_identical"]) == (1, 1), out
    assert result["sigterm_seconds_median"] > 0 and result["end_seconds_median"] > 0
