"""The kernels and what plans for them, with the oldest and the newest packages that docs/versions.md names and that are
small: PyTorch, several GB for each version, stays as it is.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLANS = (
    "0",
    *(f"tests/engine/routing/{name}.py" for name in ("test_plan", "test_tables")),
    "-m",
    "not slow and not gpu",
)
KERNELS = ("1", *(f"tests/kernels/on_triton/{name}.py" for name in ("test_examples", "test_interpreter")))
COMPILED = ("0", "tests/kernels/test_static_gate.py", "-k", "sm_80 or lines_alone")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("packages", "runs"),
    [
        pytest.param(("triton==3.6.0", "numpy==2.0.0"), (PLANS, KERNELS, COMPILED), id="oldest"),
        pytest.param(("triton==3.8.0",), (KERNELS, COMPILED), id="newest"),
    ],
)
def test_they_pass(packages, runs, tmp_path):
    """Installed in a folder, which a Python that has it on its path takes before its own packages."""
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path, *packages]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip cannot install {' '.join(packages)} here: {done.stderr.splitlines()[-1]}")
    environ = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    for name, version in (package.split("==") for package in packages):
        code = f"import {name}; print({name}.__version__, {name}.__file__)"
        found = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
        assert found.stdout.split() == [version, str(tmp_path / name / "__init__.py")]
    for interpret, *tests in runs:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
        environ["TRITON_INTERPRET"] = interpret
        done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr
