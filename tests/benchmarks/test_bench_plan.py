"""The benchmark of plans ends with the keys that others read; small shapes, times mean nothing."""

import json

import pytest


@pytest.mark.slow
def test_bench_plan(run):
    code, out, err = run("bench_plan", "--rounds", "1", "--steps", "1")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    rows = ["rows_ms", "rows_of_all_ms", "rows_wait_fraction"]
    assert list(result) == ["plan_ms", "scale_ms", "lookup_mib", "plan_wait_fraction", *rows]
    assert result["lookup_mib"] < 8 and all(value >= 0 for value in result.values())
