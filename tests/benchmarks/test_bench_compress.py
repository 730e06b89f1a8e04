"""The benchmark of smaller models ends with the keys that others read; small shapes, times mean nothing."""

import json

import pytest

from foreroute.engine.testing.saved_run import save_model, untrained_run
from foreroute.launch.start.config_files import write_config


@pytest.mark.slow
def test_bench_compress(run, tmp_path):
    made = untrained_run(tmp_path, k=2, experts=8, expert_width=6)
    save_model(tmp_path / "run", made)
    write_config(made.config, tmp_path / "run/config.yaml")
    code, out, err = run("bench_compress", str(tmp_path / "run"), "--experts", "4", "--k", "1", "8", "--symbols", "256")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert list(result["bpc"]["whole"]) == ["1", "8"] and list(result["bpc"]["4 merge outputs"]) == ["1"]
    assert max(map(abs, result["int8_relative_change"].values())) < 1e-3
    assert result["expert_bytes"]["4 prune use"] == result["expert_bytes"]["whole"] / 2
