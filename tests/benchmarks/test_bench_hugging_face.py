"""The benchmark of Hugging Face models ends with the keys that others read; small shapes, times mean nothing."""

import json

import pytest


@pytest.mark.slow
@pytest.mark.transformers
def test_bench_hugging_face(run):
    pytest.importorskip("transformers")
    code, out, err = run("bench_hugging_face", "--quick", "--rounds", "1", "--systems", "replayed", "own")
    assert code == 0, err
    (name,) = result = json.loads(out.splitlines()[-1])
    assert name == "step_ratio" and list(result[name]["loopback"]) == ["replayed", "live", "own"]
    assert ("NOT MEASURED: 2 nodes" in out) == ("200mbit" not in result[name])
