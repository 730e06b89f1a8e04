"""Each benchmark of one process ends with the keys that others read; small shapes, times mean nothing."""

import json

import pytest


@pytest.mark.slow
def test_bench_kernels(run):
    code, out, err = run("bench_kernels", "--quick", "--rounds", "2")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert list(result) == ["fp32", "bf16", "peers", "saved_bytes", "saved_bytes_bound"]
    assert list(result["bf16"]) == ["uniform", "skewed", "all", "lean"]
    assert result["saved_bytes"] == result["saved_bytes_bound"]
    assert all(ratio > 0 for peer in result["peers"].values() for ratio in peer.values())
    assert "19 of 19 cases pass their check" in out


@pytest.mark.slow
def test_bench_loss(run):
    code, out, err = run("bench_loss", "--symbols", "64", "3000", "--tokens", "300", "--width", "32", "--rounds", "2")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert list(result) == ["time", "peak", "shape", "environment"]
    assert result["peak"]["3000"]["plain"] == 1 and result["peak"]["3000"]["chunks"] < 1
    assert all(ratio > 0 for ways in result["time"].values() for ratio in ways.values())


@pytest.mark.slow
def test_bench_host(run):
    code, out, err = run("bench_host", "--rounds", "1")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert list(result)[:4] == ["layer_ms", "attention_ms", "step_ms", "launches"]
    assert result["launches"] == 9 and min(result[name] for name in list(result)[:3]) > 0


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--rounds", "0"), "must be a whole number of at least 1"),
        (("--device", "cuda"), "PyTorch finds no CUDA device here"),
    ],
)
def test_bad_arguments_end_with_one_line_and_code_2(run, arguments, line):
    code, _, err = run("bench_kernels", *arguments)
    assert code == 2 and line in err.splitlines()[-1]
