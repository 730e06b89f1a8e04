"""The benchmark of certificates ends with the keys that others read; small shapes, times mean nothing."""

import json
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import bench_certify
from foreroute.engine.certificate.counts.layout import Layout
from foreroute.engine.certificate.counts.replay import replay
from foreroute.engine.routing.planned.hashed import HashedRouter
from foreroute.engine.routing.planned_router import RouterInputs


@pytest.mark.slow
def test_bench_certify(run, tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(b"the quick brown fox jumps over the lazy dog. " * 50)
    code, out, err = run(
        "bench_certify",
        "--text",
        str(text),
        "--ids",
        "140000",
        "--checked",
        "2",
        "--memory-cases",
        "1",
        "--time-ways",
        "1",
    )
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    errors = ["time_model_median_error", "memory_model_error"]
    assert list(result) == ["seconds", "peak_bytes", "count_mismatches", *errors]
    assert 0 <= result["memory_model_error"] < 0.1
    assert ("time model was not measured" in out) == (result["time_model_median_error"] is None)
    assert result["count_mismatches"] == 0 and result["peak_bytes"] > 1e7


def test_bench_certify_sees_a_mismatch():
    """Negative control: one row too many is four numbers of two ranks that differ."""
    ids = np.resize(np.arange(97, 123, dtype=np.uint8), 40_000)
    config = bench_certify.epoch(ids)
    routers = HashedRouter.build(config.moe, RouterInputs(256, 1, 1, ids))
    (counts,) = replay(Layout(config, bench_certify.PLACEMENT), ids, routers * 4, [0])
    assert bench_certify.differing(Layout(config, bench_certify.PLACEMENT), ids, routers, counts) == 0
    sent_ymgPP = counts.sent_ymgPP.copy()
    sent_ymgPP[0, 0, 5, 1, 2] += 1
    wrong = replace(counts, sent_ymgPP=sent_ymgPP)
    assert bench_certify.differing(Layout(config, bench_certify.PLACEMENT), ids, routers, wrong) == 4
