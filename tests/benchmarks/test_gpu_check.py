"""The check for GPUs, dry: on the CPU with interpreted kernels."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = {"kernels", "reads", "graph", "training"}
NEEDLESS = (
    "deepspeed",
    "hydra",
    "omegaconf",
    "wandb",
    "safetensors",
    "mpi4py",
    "matplotlib",
    "plotly",
    "psutil",
    "rich",
    "tqdm",
)
BLOCKED = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {NEEDLESS}:
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import benchmarks.gpu_check.stage_1, benchmarks.bench_kernels
"""


def start(*arguments, **more):
    environ = {**os.environ, "OMP_NUM_THREADS": "1", **more}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=900
    )


@pytest.mark.slow
def test_a_dry_run_is_fine_and_goes_on_where_it_was(tmp_path):
    command = ["-m", "benchmarks.gpu_check", "--dry-run", "--out", str(tmp_path), "--only"]
    done = start(*command, *sorted(PARTS))
    found = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0 and found["failures"] == [], done.stdout + done.stderr
    assert found["stages"]["1"].keys() == PARTS
    kept = tmp_path / "gpu_check.dry.json"
    told = json.loads(kept.read_text())
    told["training"]["first_loss"] = 123  # is not measured again
    told["reads"]["failed"] = ["broken"]  # is
    kept.write_text(json.dumps(told))
    again = json.loads(start(*command, "training", "reads").stdout.splitlines()[-1])
    assert again["failures"] == [] and again["stages"]["1"]["training"]["first_loss"] == 123


@pytest.mark.slow
def test_it_needs_torch_triton_and_numpy_alone():
    done = start("-c", BLOCKED)
    assert done.returncode == 0, done.stderr


def test_what_cannot_be_asked_is_one_line(tmp_path):
    done = start("-m", "benchmarks.gpu_check", "--out", str(tmp_path), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and "no GPU here; --dry-run" in done.stderr.splitlines()[-1]
