"""The main job, shortened, on real text: it learns what counting cannot know of so little text, and it slims."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_quickstart_learns_and_slims(tmp_path):
    subprocess.run(
        [
            sys.executable,
            "-m",
            "launch.train",
            "experiment=quickstart",
            "train.steps=500",
            f"train.runs_dir={tmp_path}",
            "eval.max_symbols=60000",
            "train.log_every=100",
        ],
        cwd=ROOT,
        check=True,
        timeout=900,
    )
    summary = json.loads((tmp_path / "quickstart/summary.json").read_text())
    bpc = {int(k): value for k, value in summary["bpc"].items()}
    best = min(bpc.values())
    assert best < 3.0  # 2.07 after all 1,600 steps
    assert max(bpc, key=lambda k: bpc[k]) == 1
    assert all(bpc[k] < 1.08 * best for k in (4, 8, 16))
    assert summary["peak_memory_bytes"] < 2e9
