"""The summary of runs: means, intervals and differences by hand, and files that are not mixed."""

import json
import math
from pathlib import Path

import pytest

from benchmarks.bench_encoders.__main__ import read_file, settings, summary, write_file

DOCS = Path(__file__).resolve().parents[2] / "docs"


def one(arm, seed, **correct):
    return {
        "task": "sst2",
        "arm": arm,
        "seed": seed,
        "correct": {k[1:]: n for k, n in correct.items()},
        "examples": 100,
    }


RUNS = [one("dense", 1, k8=80), one("dense", 2, k8=84), one("hashed_half", 2, k8=82, k4=70)]


def test_means_intervals_and_differences():
    runs = [*RUNS, one("hashed_half", 1, k8=81, k4=60)]
    rows = {(row["arm"], row["k"]): row for row in summary(runs)}
    assert list(rows) == [("dense", 8), ("hashed_half", 8), ("hashed_half", 4)]
    half = 12.706 * math.sqrt(8) / math.sqrt(2) / 100  # t of one degree of freedom; s = sqrt(8)
    dense = rows["dense", 8]
    assert dense["accuracy"]["mean"] == pytest.approx(0.82) and dense["minus_dense"] is None
    assert dense["accuracy"]["high"] == pytest.approx(0.82 + half, abs=1e-4)
    low, high = dense["wilson_of_a_run"]  # 82 of 100 (Wilson 1927): (p + z^2/2n -+ z sqrt(..)) / (1 + z^2/n)
    assert (low, high) == (pytest.approx(0.7333, abs=1e-4), pytest.approx(0.8830, abs=1e-4))
    assert rows["hashed_half", 8]["minus_dense"]["mean"] == pytest.approx((0.01 - 0.02) / 2)
    assert rows["hashed_half", 4]["minus_dense"]["mean"] == pytest.approx((-0.20 - 0.14) / 2)


def test_a_stopped_measurement_goes_on_only_with_the_same_settings(tmp_path):
    path = tmp_path / "found.json"
    assert read_file(path, 1) == []
    write_file(path, RUNS[:2], 1)
    assert read_file(path, 1) == RUNS[:2] and json.loads(path.read_text())["settings"] == settings(1)
    with pytest.raises(SystemExit, match="has other settings"):
        read_file(path, 2)


def test_a_file_may_lack_tasks_that_came_later(tmp_path):
    path = tmp_path / "found.json"
    write_file(path, RUNS[:2], 1)
    found = json.loads(path.read_text())
    del found["settings"]["tasks"]["svamp"]
    path.write_text(json.dumps(found))
    assert read_file(path, 1) == RUNS[:2]
    found["settings"]["tasks"]["sst2"]["steps"] = 1
    path.write_text(json.dumps(found))
    with pytest.raises(SystemExit, match="has other settings"):
        read_file(path, 1)


def test_the_published_files_are_of_these_settings():
    """Another measurement would go on with them."""
    assert len(read_file(DOCS / "encoders.json", 1)) > 20 and read_file(DOCS / "encoders_longer.json", 4)
