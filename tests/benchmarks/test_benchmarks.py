"""The benchmarks run to their last line, which has the keys that others read; small shapes, times mean nothing."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import bench_certify
from foreroute.engine.certificate.counts.layout import Layout
from foreroute.engine.certificate.counts.replay import replay
from foreroute.engine.routing.planned.hashed import HashedRouter
from foreroute.engine.routing.planned_router import RouterInputs
from foreroute.engine.testing.saved_run import save_model, untrained_run
from foreroute.launch.start.config_files import write_config

ROOT = Path(__file__).resolve().parents[2]


def run(module, *arguments):
    """Exit code, stdout and stderr of a benchmark."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_bench_kernels():
    code, out, err = run("bench_kernels", "--quick", "--rounds", "2")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert list(result) == ["fp32", "bf16", "peers", "saved_bytes", "saved_bytes_bound"]
    assert list(result["bf16"]) == ["uniform", "skewed", "all", "lean"]
    assert result["saved_bytes"] == result["saved_bytes_bound"]
    assert all(ratio > 0 for peer in result["peers"].values() for ratio in peer.values())
    assert "19 of 19 cases pass their check" in out


@pytest.mark.slow
def test_bench_loss():
    code, out, err = run("bench_loss", "--symbols", "64", "3000", "--tokens", "300", "--width", "32", "--rounds", "2")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert list(result) == ["time", "peak", "shape", "environment"]
    assert result["peak"]["3000"]["plain"] == 1 and result["peak"]["3000"]["chunks"] < 1
    assert all(ratio > 0 for ways in result["time"].values() for ratio in ways.values())


@pytest.mark.slow
def test_bench_host():
    code, out, err = run("bench_host", "--rounds", "1")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert list(result)[:4] == ["layer_ms", "attention_ms", "step_ms", "launches"]
    assert result["launches"] == 9 and min(result[name] for name in list(result)[:3]) > 0


@pytest.mark.slow
def test_bench_metrics():
    code, out, err = run("bench_metrics", "--steps", "40", "--experiment", "debug")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert list(result) == ["metric_share", "median_share", "most", "hook_us"]
    assert len(result["metric_share"]) == 8 and result["most"] == max(result["metric_share"].values())
    assert all(share > 0 for share in result["metric_share"].values())


@pytest.mark.slow
def test_bench_quickstart():
    code, out, err = run("bench_quickstart", "--steps", "20", "--symbols", "512")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert list(result) == ["alone", "beside"]
    alone, beside = result.values()
    assert alone.keys() == beside.keys() == {"training", "evaluation", "all", "losses"}
    assert alone["losses"] == beside["losses"]
    assert 0 < alone["training"] < alone["all"] and 0 < alone["evaluation"] < alone["all"]


@pytest.mark.slow
def test_bench_plan():
    code, out, err = run("bench_plan", "--rounds", "2", "--steps", "1")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    rows = ["rows_ms", "rows_of_all_ms", "rows_wait_fraction"]
    assert list(result) == ["plan_ms", "scale_ms", "lookup_mib", "plan_wait_fraction", *rows]
    assert result["lookup_mib"] < 8 and all(value >= 0 for value in result.values())


@pytest.mark.slow
def test_bench_exchange():
    code, out, err = run("bench_exchange", "--quick", "--rounds", "1")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert list(result) == ["bytes_ratio", "step_ratio", "live_ratio", "hidden_fraction", "planned_equals_measured"]
    assert list(result["step_ratio"]) == ["loopback", "1gbit", "200mbit", "200mbit_packed"]
    assert result["live_ratio"]["loopback"] > 0
    assert result["bytes_ratio"]["spread"] <= 0.49 and result["bytes_ratio"]["packed"] <= 0.26
    assert ("NOT MEASURED: 2 nodes" in out) == (result["hidden_fraction"] is None)


@pytest.mark.slow
def test_bench_memory():
    code, out, err = run("bench_memory", "--quick", "--rounds", "1")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    host, steps = ["host_wait_fraction", "host_equals_device"], ["step_ratio", "step_ratio_bpe8k"]
    assert list(result) == ["bytes_ratio", *steps, *host, "rows_flatness"]
    assert 0.2 < result["bytes_ratio"]["bytes"] < result["bytes_ratio"]["bpe8k"] < 1
    assert result["host_equals_device"] is True and result["rows_flatness"] >= 1
    assert ("NOT MEASURED: 2 nodes" in out) == (result["step_ratio"]["200mbit"] is None)
    assert result["step_ratio"]["loopback"] > 0


@pytest.mark.slow
@pytest.mark.transformers
def test_bench_hugging_face():
    pytest.importorskip("transformers")
    code, out, err = run("bench_hugging_face", "--quick", "--rounds", "1", "--systems", "replayed", "own")
    assert code == 0, err
    (name,) = result = json.loads(out.splitlines()[-1])
    assert name == "step_ratio" and list(result[name]["loopback"]) == ["replayed", "live", "own"]
    assert ("NOT MEASURED: 2 nodes" in out) == ("200mbit" not in result[name])


@pytest.mark.slow
def test_bench_compress(tmp_path):
    made = untrained_run(tmp_path, k=2, experts=8, expert_width=6)
    save_model(tmp_path / "run", made)
    write_config(made.config, tmp_path / "run/config.yaml")
    code, out, err = run("bench_compress", str(tmp_path / "run"), "--experts", "4", "--k", "1", "8", "--symbols", "256")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert list(result["bpc"]["whole"]) == ["1", "8"] and list(result["bpc"]["4 merge outputs"]) == ["1"]
    assert max(map(abs, result["int8_relative_change"].values())) < 1e-3
    assert result["expert_bytes"]["4 prune use"] == result["expert_bytes"]["whole"] / 2


@pytest.mark.slow
def test_bench_certify(tmp_path):
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


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--rounds", "0"), "must be a whole number of at least 1"),
        (("--device", "cuda"), "PyTorch finds no CUDA device here"),
    ],
)
def test_bad_arguments_end_with_one_line_and_code_2(arguments, line):
    code, _, err = run("bench_kernels", *arguments)
    assert code == 2 and line in err.splitlines()[-1]


@pytest.mark.slow
def test_bench_faults():
    """A rank is killed in training, around a checkpoint's writing and at a restart, and one is stopped: the run ends
    the same."""
    code, out, err = run("bench_faults", "--quick")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert (result["trials"], result["identical"]) == (2, 2), out
    assert 0 <= result["inside_checkpoint"] <= 2  # a write may be over before the signal comes
    assert (result["stops"], result["stops_identical"]) == (1, 1), out
    assert result["sigterm_seconds_median"] > 0 and result["end_seconds_median"] > 0
