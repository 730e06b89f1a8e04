"""Each benchmark of trainings ends with the keys that others read; small shapes, times mean nothing."""

import json

import pytest


@pytest.mark.slow
def test_bench_metrics(run):
    code, out, err = run("bench_metrics", "--steps", "40", "--experiment", "debug")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert list(result) == ["metric_share", "median_share", "most", "hook_us"]
    assert len(result["metric_share"]) == 8 and result["most"] == max(result["metric_share"].values())
    assert all(share > 0 for share in result["metric_share"].values())


@pytest.mark.slow
def test_bench_quickstart(run):
    code, out, err = run("bench_quickstart", "--steps", "4", "--symbols", "256")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert list(result) == ["alone", "beside"]
    alone, beside = result.values()
    assert alone.keys() == beside.keys() == {"training", "evaluation", "all", "losses"}
    assert alone["losses"] == beside["losses"]
    assert 0 < alone["training"] < alone["all"] and 0 < alone["evaluation"] < alone["all"]
