"""The example of a run with an n-gram table, from documents to a sample, as its head says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.dist
@pytest.mark.slow
def test_the_whole_way(tmp_path):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "examples.ngram_table", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "killing a rank" in done.stdout and "rank 1 is lost" in done.stderr
    commands = [line.split(" launch.")[1].split()[0] for line in done.stdout.splitlines() if line.startswith("$ ")]
    assert commands == ["certify", "train", "certify", "train", "generate"]
    run = tmp_path / "run"
    losses = {row["step"]: row["loss"] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}
    assert losses[24] < losses[4]
    (resumed,) = [line for line in done.stdout.splitlines() if line.startswith("resumed at step ")]
    step = int(resumed.split()[3])
    assert 8 <= step < 24 and f"{24 - step} steps were as certified" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("def ") or "\ndef " in done.stdout
    # the table is in the certificate and moved bytes
    certified = json.loads((tmp_path / "certificate-3" / "certificate.json").read_text())["tables"]
    assert certified["tables"][0]["place"] == "layer 1" and certified["rank"]["mean"] > 0
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["table_bytes"] > 0
